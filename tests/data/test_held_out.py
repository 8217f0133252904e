"""A later evaluation finds exactly the held-out images, and a changed data set has another fingerprint."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets
from PIL import Image

from dart_hf.data.fingerprint import data_fingerprint
from dart_hf.data.held_out import held_out_record, select_held_out
from dart_hf.data.image_data import load_image_data


def save_images(folder: Path, count: int, seed: int) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number}.png")


@pytest.fixture
def pets(tmp_path) -> Path:
    for seed, name in enumerate(("cat", "dog")):
        save_images(tmp_path / "pets" / name, 10, seed)
    return tmp_path / "pets"


def contents(split) -> list[bytes]:
    return sorted(row["image"]["bytes"] or Path(row["image"]["path"]).read_bytes() for row in split)


def test_held_out_images_are_found_after_files_were_added_and_moved(pets, tmp_path):
    held_out = load_image_data(pets, held_out=0.3).evaluation
    record, expected = json.loads(json.dumps(held_out_record(held_out))), contents(held_out)
    save_images(pets / "cow", 3, seed=2)
    (pets / "cat" / "0.png").rename(pets / "cat" / "renamed.png")
    moved = shutil.move(pets, tmp_path / "elsewhere")
    assert contents(select_held_out(load_image_data(moved).train, record)) == expected
    load_image_data(moved).train.to_parquet(tmp_path / "pets.parquet")
    assert contents(select_held_out(load_image_data(tmp_path / "pets.parquet").train, record)) == expected


def test_held_out_images_that_are_missing_or_unrecorded_are_an_error(pets):
    record = held_out_record(load_image_data(pets, held_out=0.3).evaluation)
    shutil.rmtree(pets / "dog")
    save_images(pets / "dog", 10, seed=5)
    with pytest.raises(ValueError, match=r"of the 6 images that the training held out are not in the data"):
        select_held_out(load_image_data(pets).train, record)
    with pytest.raises(ValueError, match=r"held_out.json has no record"):
        select_held_out(load_image_data(pets).train, {"pictures": []})


def test_a_file_that_is_there_twice_is_selected_as_often_as_it_was_held_out(pets):
    shutil.copy(pets / "cat" / "0.png", pets / "cat" / "copy.png")
    train = load_image_data(pets).train
    one = train.filter(lambda row: row["image"]["path"].endswith("copy.png"))
    assert len(select_held_out(train, held_out_record(one))) == 1


def rename(pets: Path) -> None:
    (pets / "cat" / "0.png").rename(pets / "cat" / "new.png")


def relabel(pets: Path) -> None:
    (pets / "cat" / "0.png").rename(pets / "dog" / "00.png")


def replace(pets: Path) -> None:
    Image.new("RGB", (9, 9)).save(pets / "dog" / "1.png")


def add(pets: Path) -> None:
    Image.new("RGB", (8, 8)).save(pets / "dog" / "99.png")


def test_a_file_that_does_not_exist_is_no_held_out_image(pets, tmp_path):
    expected = held_out_record(load_image_data(pets).train)
    before = data_fingerprint(load_image_data(pets).train)
    (pets / "dog" / "gone.png").symlink_to(tmp_path / "nowhere")
    train = load_image_data(pets).train
    empty = Dataset.from_dict({"image": [None], "label": [1]}, features=train.features)
    for rows in (train, concatenate_datasets([load_image_data(pets).train.select(range(20)), empty])):
        assert (len(rows), held_out_record(rows)) == (21, expected)
        assert len(select_held_out(rows, expected)) == 20
        assert data_fingerprint(rows) != before


@pytest.mark.parametrize("change", [rename, relabel, replace, add])
def test_the_fingerprint_changes_with_the_data_but_not_with_its_place(pets, tmp_path, change):
    before = data_fingerprint(load_image_data(pets).train)
    moved = Path(shutil.move(pets, tmp_path / "elsewhere"))
    assert data_fingerprint(load_image_data(moved).train) == before
    change(moved)
    assert data_fingerprint(load_image_data(moved).train) != before


def test_the_fingerprint_of_image_bytes_and_of_streams(pets, tmp_path):
    train = load_image_data(pets).train
    train.to_parquet(tmp_path / "pets.parquet")
    packed = load_image_data(tmp_path / "pets.parquet").train
    assert data_fingerprint(packed) == data_fingerprint(packed.cast_column("image", packed.features["image"]))
    assert data_fingerprint(packed) != data_fingerprint(packed.select(range(19)))
    assert data_fingerprint(packed) != data_fingerprint(packed.map(lambda row: {"label": 0}))
    assert data_fingerprint(load_image_data(pets, streaming=True).train) is None
    assert data_fingerprint(None) is None
