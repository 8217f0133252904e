"""A later evaluation finds exactly the held-out images, and a changed data set has another fingerprint."""

import json
import shutil
from pathlib import Path

import pytest
from datasets import Dataset, concatenate_datasets
from helpers.tiny_images import write_images
from PIL import Image

from dart_hf.data.fingerprint import data_fingerprint
from dart_hf.data.held_out import held_out_record, select_held_out
from dart_hf.data.image_data import load_image_data


@pytest.fixture
def pets(tmp_path) -> Path:
    for seed, name in enumerate(("cat", "dog")):
        write_images(tmp_path / "pets" / name, 10, seed)
    return tmp_path / "pets"


CHANGES = {
    "rename": lambda pets: (pets / "cat" / "0.png").rename(pets / "cat" / "new.png"),
    "relabel": lambda pets: (pets / "cat" / "0.png").rename(pets / "dog" / "00.png"),
    "replace": lambda pets: Image.new("RGB", (9, 9)).save(pets / "dog" / "1.png"),
    "add": lambda pets: Image.new("RGB", (8, 8)).save(pets / "dog" / "99.png"),
    "add a broken link": lambda pets: (pets / "dog" / "99.png").symlink_to(pets / "nowhere"),
}


def contents(split) -> list[bytes]:
    return sorted(row["image"]["bytes"] or Path(row["image"]["path"]).read_bytes() for row in split)


def test_held_out_images_are_found_after_files_were_added_and_moved(pets, tmp_path):
    held_out = load_image_data(pets, held_out=0.3).evaluation
    record, expected = json.loads(json.dumps(held_out_record(held_out))), contents(held_out)
    write_images(pets / "cow", 3, seed=2)
    CHANGES["rename"](pets)
    (pets / "dog" / "gone.png").symlink_to(tmp_path / "nowhere")
    moved = Path(shutil.move(pets, tmp_path / "elsewhere"))
    assert contents(select_held_out(load_image_data(moved).train, record)) == expected
    (moved / "dog" / "gone.png").unlink()
    load_image_data(moved).train.to_parquet(tmp_path / "pets.parquet")
    assert contents(select_held_out(load_image_data(tmp_path / "pets.parquet").train, record)) == expected


def test_held_out_images_that_are_missing_or_unrecorded_are_an_error(pets):
    record = held_out_record(load_image_data(pets, held_out=0.3).evaluation)
    shutil.rmtree(pets / "dog")
    write_images(pets / "dog", 10, seed=5)
    train = load_image_data(pets).train
    with pytest.raises(ValueError, match=r"of the 6 images that the training held out are not in the data"):
        select_held_out(train, record)
    with pytest.raises(ValueError, match=r"held_out.json has no record"):
        select_held_out(train, {"pictures": []})


def test_a_file_that_is_there_twice_is_selected_as_often_as_it_was_held_out(pets):
    shutil.copy(pets / "cat" / "0.png", pets / "cat" / "copy.png")
    train = load_image_data(pets).train
    one = train.filter(lambda row: row["image"]["path"].endswith("copy.png"))
    assert len(select_held_out(train, held_out_record(one))) == 1


def test_a_row_without_an_image_is_no_held_out_image(pets):
    train = load_image_data(pets).train
    empty = Dataset.from_dict({"image": [None], "label": [1]}, features=train.features)
    rows = concatenate_datasets([train, empty])
    assert held_out_record(rows) == held_out_record(train)
    assert len(select_held_out(rows, held_out_record(train))) == 20
    assert data_fingerprint(rows) != data_fingerprint(train)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
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
