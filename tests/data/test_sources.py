"""Folders, files, saved data sets and streams give the same images and labels; a wrong source is one clear error."""

from pathlib import Path

import datasets
import pytest
from datasets import Features, Image, Value
from helpers.tiny_images import write_images
from PIL import Image as PILImage

from dart_hf.data.image_data import load_image_data


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
    names = [(split, label, name) for split in ("train", "test") for label, name in enumerate(("cat", "dog"))]
    found = {"train": [], "test": []}
    for split, label, name in names:
        found[split] += [(label, path.read_bytes()) for path in (folder / split / name).iterdir()]
    return {split: sorted(rows) for split, rows in found.items()}


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_saved_data_sets_and_parquet_files(folder, parquet, expected, tmp_path, streaming):
    datasets.load_dataset("imagefolder", data_dir=str(folder)).save_to_disk(tmp_path / "saved")
    for source in (folder, tmp_path / "saved"):
        data = load_image_data(source, streaming=streaming)
        assert isinstance(data.train, datasets.IterableDataset if streaming else datasets.Dataset)
        assert (data.label_names, data.evaluation_split) == (["cat", "dog"], "test")
        assert (contents(data.train), contents(data.evaluation)) == (expected["train"], expected["test"])
    for source in (parquet, parquet.parent):
        data = load_image_data(source, streaming=streaming)
        assert data.evaluation is None
        assert contents(data.train) == expected["train"]


def test_images_are_held_out_if_no_split_is_for_evaluation(folder, expected):
    data = load_image_data(folder / "train", held_out=0.2)
    assert (data.evaluation_split, len(data.train), len(data.evaluation)) == (None, 8, 2)
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
def test_settings_that_a_source_does_not_have(folder, parquet, settings, message):
    with pytest.raises(ValueError, match=message):
        load_image_data(folder, **settings)
    with pytest.raises(ValueError, match="data: a stream has no parts"):
        load_image_data(parquet, train_split="train[:3]", streaming=True)
    with pytest.raises(ValueError, match=r"has none of the splits 'validation', .* it has 'train': name one"):
        load_image_data(parquet, train_split=None)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("empty", ValueError, "data: the folder 'empty' has no images; expected are .*/CLASS/IMAGE"),
        ("texts", ValueError, "data: the folder 'texts' has no images"),
        ("one", ValueError, "data: 'one' has one class, 'cat'; a classifier needs at least two"),
        ("broken", ValueError, "data: 'broken' could not be read: "),
        ("./gone", FileNotFoundError, "data: there is no folder './gone'"),
        ("data.xyz", ValueError, "data: 'data.xyz' is a file of unknown kind"),
        ("user/pets", OSError, "data: there is no folder 'user/pets', and the Hub did not give such a data set"),
    ],
)
def test_sources_without_images(tmp_path, monkeypatch, name, error, message):
    monkeypatch.chdir(tmp_path)
    for path in ("empty", "texts/cat"):
        Path(path).mkdir(parents=True)
    Path("texts/cat/a.txt").write_text("meow")
    Path("data.xyz").write_text("?")
    write_images(Path("one/cat"), 2)
    write_images(Path("broken"), 1)
    Path("broken/metadata.csv").write_text("name,label\n0.png,cat\n")
    with pytest.raises(error, match=message):
        load_image_data(name)
