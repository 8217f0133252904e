"""Folders, files, saved data sets and streams give the same images and labels; a wrong source is one clear error."""

from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Features, Image, Value
from PIL import Image as PILImage

from dart_hf.data.image_data import load_image_data


def write_images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        PILImage.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{number}.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """train/cat, train/dog (5 each), test/cat, test/dog (3 each)."""
    root = tmp_path_factory.mktemp("pets")
    for split, count in (("train", 5), ("test", 3)):
        for name in ("cat", "dog"):
            write_images(root / split / name, count)
    return root


@pytest.fixture(scope="module")
def parquet(folder, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("parquet") / "pets.parquet"
    datasets.load_dataset("imagefolder", data_dir=str(folder), split="train").to_parquet(path)
    return path


def contents(split) -> list[tuple[int, bytes]]:
    rows = [(row["label"], row["image"]) for row in split]
    return sorted((label, image["bytes"] or Path(image["path"]).read_bytes()) for label, image in rows)


@pytest.fixture(scope="module")
def expected(folder):
    return {
        split: sorted(
            (label, path.read_bytes())
            for label, name in enumerate(("cat", "dog"))
            for path in (folder / split / name).iterdir()
        )
        for split in ("train", "test")
    }


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_and_a_saved_data_set(folder, expected, tmp_path, streaming):
    datasets.load_dataset("imagefolder", data_dir=str(folder)).save_to_disk(tmp_path / "saved")
    for source in (folder, tmp_path / "saved"):
        data = load_image_data(source, streaming=streaming)
        assert isinstance(data.train, datasets.IterableDataset if streaming else datasets.Dataset)
        assert data.label_names == ["cat", "dog"]
        assert contents(data.train) == expected["train"]
        assert contents(data.evaluation) == expected["test"]
        assert data.evaluation_split == "test"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_parquet_file_and_a_folder_of_them(parquet, expected, streaming):
    for source in (parquet, parquet.parent):
        data = load_image_data(source, streaming=streaming)
        assert data.evaluation is None
        assert contents(data.train) == expected["train"]


def test_images_are_held_out_if_no_split_is_for_evaluation(folder, expected):
    data = load_image_data(folder / "train", held_out=0.2)
    assert data.evaluation_split is None
    assert (len(data.train), len(data.evaluation)) == (8, 2)
    assert sorted(contents(data.train) + contents(data.evaluation)) == expected["train"]
    assert load_image_data(folder / "train").evaluation is None


def test_parts_of_splits(folder):
    data = load_image_data(folder, train_split="train[:8]", evaluation_split="train[50%:]")
    assert (len(data.train), len(data.evaluation)) == (8, 5)
    assert load_image_data(folder, train_split=None).train is None
    assert load_image_data(folder, train_split="test").evaluation is None


def test_columns_are_found_by_type_or_named(tmp_path):
    features = Features({"photo": Image(), "kind": Value("string"), "number": Value("int64")})
    columns = {"photo": [PILImage.new("RGB", (8, 8))] * 2, "kind": ["b", "a"], "number": [0, 1]}
    datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "x.parquet")
    assert load_image_data(tmp_path / "x.parquet", label_column="kind").label_names == ["a", "b"]
    assert load_image_data(tmp_path / "x.parquet", needs_labels=False).train.column_names == ["image"]
    with pytest.raises(
        ValueError, match=r"label_column: say which column .* none is recognised; it has 'photo', 'kind', 'number'"
    ):
        load_image_data(tmp_path / "x.parquet")


def test_the_columns_of_a_stream_that_does_not_tell_them(tmp_path, monkeypatch):
    rows = [{"image": PILImage.new("RGB", (8, 8)), "label": number} for number in (1, 0)]
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
    assert stream.features is None
    monkeypatch.setattr("dart_hf.data.image_data.load_splits", lambda *arguments: {"train": stream})
    data = load_image_data("user/stream", class_names=["a", "b"], streaming=True)
    assert [row["label"] for row in data.train] == [1, 0]


def test_images_without_labels(folder):
    data = load_image_data(folder / "train" / "cat", needs_labels=False)
    assert data.train.column_names == ["image"]
    assert (len(data.train), data.label_names) == (5, [])
    with pytest.raises(ValueError, match=r"data: the images of .*cat' have no labels: expected .* at least two"):
        load_image_data(folder / "train" / "cat")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"evaluation_split": "val"}, "data: .* has no split 'val'; it has 'train', 'test'"),
        ({"train_split": "train[:x]"}, r"data: 'train\[:x\]' is not a part of a split"),
        ({"image_column": "photo"}, "image_column: .* has no column 'photo'; it has 'image', 'label'"),
        ({"label_column": "kind"}, "label_column: .* has no column 'kind'; it has 'image', 'label'"),
        ({"subset": "large"}, "could not be read: .*'large' not found"),
        ({"held_out": 1.0}, "held_out must be at least 0 and below 1, got 1.0"),
    ],
)
def test_settings_that_a_source_does_not_have(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        load_image_data(folder, **settings)


def test_a_stream_has_no_parts_and_a_single_split_needs_a_name_to_evaluate(parquet):
    with pytest.raises(ValueError, match="data: a stream has no parts"):
        load_image_data(parquet, train_split="train[:3]", streaming=True)
    with pytest.raises(ValueError, match=r"has none of the splits 'validation', .* it has 'train': name one"):
        load_image_data(parquet, train_split=None)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("empty", ValueError, "data: the folder '.*empty' has no images; expected are .*/CLASS/IMAGE"),
        ("texts", ValueError, "data: the folder '.*texts' has no images"),
        ("one", ValueError, "data: .*one' has one class, 'cat'; a classifier needs at least two"),
        ("broken", ValueError, "data: .*broken' could not be read: "),
        ("gone", FileNotFoundError, "data: there is no folder '.*gone'"),
        ("data.xyz", ValueError, "data: '.*data.xyz' is a file of unknown kind"),
    ],
)
def test_sources_without_images(tmp_path, name, error, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts" / "cat").mkdir(parents=True)
    (tmp_path / "texts" / "cat" / "a.txt").write_text("meow")
    write_images(tmp_path / "one" / "cat", 2)
    write_images(tmp_path / "broken", 1)
    (tmp_path / "broken" / "metadata.csv").write_text("name,label\n0.png,cat\n")
    (tmp_path / "data.xyz").write_text("?")
    with pytest.raises(error, match=message):
        load_image_data(tmp_path / name)


def test_a_name_that_is_neither_a_folder_nor_on_the_hub():
    with pytest.raises(OSError, match="data: there is no folder 'user/pets', and the Hub did not give such a data set"):
        load_image_data("user/pets")
