"""Sources become rows, and rows become batches as the model wants them; what is wrong is one clear error."""

import io
import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from torch.utils.data import DataLoader

from dart_hf import DartImageProcessor
from dart_hf.data.batch_mixing import MixImages
from dart_hf.data.batches import evenly_spread, without_worker_traceback
from dart_hf.data.collator import ImageClassificationCollator
from dart_hf.data.seeded_rows import SeededRows
from dart_hf.data.sources import load_image_data


@pytest.fixture(scope="module")
def collate() -> ImageClassificationCollator:
    return ImageClassificationCollator(DartImageProcessor(size=16, crop_size=16), num_labels=3)


def images(count: int) -> list[PILImage.Image]:
    rng = np.random.default_rng(0)
    return [PILImage.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in range(count)]


def rows(*labels) -> list[dict]:
    return [{"image": image, "label": label} for image, label in zip(images(len(labels)), labels, strict=True)]


def test_a_batch_is_what_the_image_processor_makes(collate):
    batch = collate(rows(0, 2, 1))
    expected = collate.image_processor(images(3), return_tensors="pt").pixel_values
    assert set(batch) == {"pixel_values", "labels"}
    assert torch.equal(batch["pixel_values"], expected)
    assert batch["labels"].dtype == torch.int64
    assert batch["labels"].tolist() == [0, 2, 1]


def test_rows_of_a_data_set(collate):
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"])})
    data = Dataset.from_dict({"image": images(2), "label": ["c", "a"]}, features=features)
    assert collate(data.__getitems__([0, 1]))["labels"].tolist() == [2, 0]


def test_other_columns():
    data = Dataset.from_dict({"picture": images(1), "kind": [1]}, Features({"picture": Image(), "kind": Value("int8")}))
    collate = ImageClassificationCollator(DartImageProcessor(size=16, crop_size=16), 2, "picture", "kind")
    assert collate([data[0]])["labels"].tolist() == [1]


def test_numpy_labels(collate):
    assert collate(rows(np.int64(2)))["labels"].tolist() == [2]


@pytest.mark.parametrize("label", [3, -1, -100, np.int64(7)])
def test_a_label_out_of_range(collate, label):
    with pytest.raises(ValueError, match=f"Label {label} in column 'label' is out of range: .* 3 classes.* 0 to 2"):
        collate(rows(0, label))


@pytest.mark.parametrize("label", ["2", 1.0, None, True])
def test_a_label_that_is_no_integer(collate, label):
    with pytest.raises(ValueError, match=f"must be an integer, got {label!r} in column 'label'"):
        collate(rows(0, label))


def test_a_missing_column(collate):
    with pytest.raises(ValueError, match="no column 'label'; it has 'image'"):
        collate([{"image": images(1)[0]}])
    with pytest.raises(ValueError, match="no column 'image'; it has 'label'"):
        collate([{"label": 1}])


def test_pixels_that_are_not_finite(collate):
    with pytest.raises(ValueError, match="NaN"):
        collate([{"image": np.full((16, 16, 3), np.nan, dtype=np.float32), "label": 0}])


def test_it_reaches_worker_processes(collate):
    copy = pickle.loads(pickle.dumps(collate))
    assert torch.equal(copy(rows(0, 1))["pixel_values"], collate(rows(0, 1))["pixel_values"])


# Unreadable images ------------------------------------------------------------------------------------------------


def undecoded(count: int, damaged: set[int]) -> list[dict]:
    contents = []
    for number, image in enumerate(images(count)):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        content = buffer.getvalue()[:100] if number in damaged else buffer.getvalue()
        contents.append({"image": {"bytes": content, "path": f"{number}.png"}, "label": number % 3})
    return contents


@pytest.fixture
def skipping() -> ImageClassificationCollator:
    return ImageClassificationCollator(DartImageProcessor(size=16, crop_size=16), num_labels=3, skip_unreadable=True)


def test_undecoded_images_are_decoded(collate):
    batch = collate(undecoded(3, set()))
    assert torch.equal(batch["pixel_values"], collate(rows(0, 1, 2))["pixel_values"])


def test_an_unreadable_image_stops_with_its_name(collate):
    with pytest.raises(OSError, match=r"The image '1.png' cannot be read: .*; skip_unreadable=True .* leaves it out"):
        collate(undecoded(3, {1}))


def test_a_missing_file(collate, tmp_path):
    with pytest.raises(OSError, match=r"gone.png' cannot be read"):
        collate([{"image": {"bytes": None, "path": str(tmp_path / "gone.png")}, "label": 0}])


def test_an_unreadable_image_is_left_out_of_a_training_batch_and_counted(skipping, collate):
    batch = skipping(SeededRows(ListData(undecoded(4, {1, 2}))).__getitems__(range(4)))
    assert batch["labels"].tolist() == [0, 0]
    assert torch.equal(batch["pixel_values"], collate(rows(0, 0, 0, 0))["pixel_values"][[0, 3]])
    assert skipping.num_skipped == 2


def test_an_unreadable_image_is_ignored_in_evaluation_and_counted(skipping, collate):
    batch = skipping(undecoded(3, {1}))
    assert batch["labels"].tolist() == [0, -100, 2]
    assert torch.equal(batch["pixel_values"][[0, 2]], collate(rows(0, 1, 2))["pixel_values"][[0, 2]])
    assert batch["pixel_values"].isfinite().all()
    assert skipping.num_skipped == 1


def test_a_training_batch_without_any_readable_image_has_no_weight(skipping):
    batch = skipping(SeededRows(ListData(undecoded(2, {0, 1}))).__getitems__(range(2)))
    assert batch["labels"].tolist() == [-100, -100]
    skipping.mix = MixImages(3, 0.8)
    batch = skipping(SeededRows(ListData(undecoded(2, {0, 1}))).__getitems__(range(2)))
    assert batch["labels"].tolist() == [[-100] * 3] * 2


def test_what_workers_skip_is_counted(skipping):
    data = ListData(undecoded(6, {0, 3, 5}))
    batches = list(DataLoader(data, batch_size=2, num_workers=2, collate_fn=skipping))
    assert [batch["labels"].tolist() for batch in batches] == [[-100, 1], [2, -100], [1, -100]]
    assert skipping.num_skipped == 3


def test_a_workers_error_is_one_sentence(collate):
    loader = DataLoader(ListData(undecoded(2, {1})), batch_size=2, num_workers=1, collate_fn=collate)
    with pytest.raises(OSError) as caught, without_worker_traceback():
        list(loader)
    assert str(caught.value).startswith("The image '1.png' cannot be read: ")
    assert "\n" not in str(caught.value)


def test_batches_without_labels():
    collate = ImageClassificationCollator(DartImageProcessor(size=16, crop_size=16), 0, label_column=None)
    assert set(collate([{"image": images(1)[0]}])) == {"pixel_values"}


class ListData(list):
    def __getitems__(self, indices):
        return [self[index] for index in indices]


# Sources ----------------------------------------------------------------------------------------------------------


def write_images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for number, image in enumerate(images(count)):
        image.save(folder / f"{number}.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """train/cat, train/dog (5 each), test/cat, test/dog (3 each)."""
    root = tmp_path_factory.mktemp("pets")
    for split, count in (("train", 5), ("test", 3)):
        for name in ("cat", "dog"):
            write_images(root / split / name, count)
    return root


def contents(split) -> list[tuple[int, bytes]]:
    def content(image):
        return image["bytes"] or Path(image["path"]).read_bytes()

    return sorted((row["label"], content(row["image"])) for row in split)


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


def test_a_folder_of_folders(folder, expected):
    data = load_image_data(folder)
    assert data.label_names == ["cat", "dog"]
    assert contents(data.train) == expected["train"]
    assert contents(data.evaluation) == expected["test"]
    assert data.evaluation_split == "test"


def test_a_saved_data_set_a_parquet_file_and_streams(folder, expected, tmp_path):
    loaded = datasets.load_dataset(str(folder))
    loaded.save_to_disk(tmp_path / "saved")
    loaded["train"].to_parquet(tmp_path / "pets.parquet")
    for source in (folder, tmp_path / "saved"):
        data = load_image_data(source, streaming=True)
        assert isinstance(data.train, datasets.IterableDataset)
        assert contents(data.evaluation) == expected["test"]
    assert contents(load_image_data(tmp_path / "saved").train) == expected["train"]
    data = load_image_data(tmp_path / "pets.parquet")
    assert data.evaluation is None
    assert contents(data.train) == expected["train"]


def test_images_are_held_out_where_no_split_is_for_evaluation(folder, expected):
    data = load_image_data(folder / "train", held_out=0.2)
    assert data.evaluation_split is None
    assert (len(data.train), len(data.evaluation)) == (8, 2)
    assert sorted(contents(data.train) + contents(data.evaluation)) == expected["train"]
    assert load_image_data(folder / "train").evaluation is None


def test_parts_of_splits(folder):
    data = load_image_data(folder, train_split="train[:3]", evaluation_split="train[50%:]")
    assert (len(data.train), len(data.evaluation)) == (3, 5)
    assert load_image_data(folder, train_split=None).train is None


def test_labels_that_are_names_or_numbers(tmp_path):
    features = Features({"photo": Image(), "kind": Value("string"), "number": Value("int64")})
    columns = {"photo": images(3), "kind": ["b", "a", "b"], "number": [0, 2, 1]}
    Dataset.from_dict(columns, features).to_parquet(tmp_path / "x.parquet")
    named = load_image_data(tmp_path / "x.parquet", label_column="kind")
    assert (named.label_names, named.train["label"][:]) == (["a", "b"], [1, 0, 1])
    numbered = load_image_data(tmp_path / "x.parquet", label_column="number")
    assert (numbered.label_names, numbered.train["label"][:]) == (["0", "1", "2"], [0, 2, 1])
    streamed = load_image_data(tmp_path / "x.parquet", label_column="kind", class_names=["b", "a"], streaming=True)
    assert [row["label"] for row in streamed.train] == [0, 1, 0]
    with pytest.raises(ValueError, match=r"class_names: the stream .* does not tell its classes"):
        load_image_data(tmp_path / "x.parquet", label_column="kind", streaming=True)
    with pytest.raises(ValueError, match=r"label_column: say which column .* it has 'photo', 'kind', 'number'"):
        load_image_data(tmp_path / "x.parquet")


def test_a_split_to_learn_from_is_none_to_evaluate_with(folder):
    data = load_image_data(folder, train_split="test")
    assert data.evaluation is None


def test_classes_in_another_order(tmp_path, folder):
    with pytest.raises(ValueError, match=r"are 'cat', 'dog', in this order, for all splits; got 'dog'"):
        load_image_data(folder, class_names=["dog", "cat"])
    features = [Features({"image": Image(), "label": ClassLabel(names=names)}) for names in ("ab", "ba")]
    splits = {
        name: Dataset.from_dict({"image": images(2), "label": [0, 1]}, each)
        for name, each in zip(("train", "test"), features, strict=True)
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "mixed")
    with pytest.raises(ValueError, match=r"are 'a', 'b', in this order, for all splits; got 'b', 'a'"):
        load_image_data(tmp_path / "mixed")


@pytest.mark.parametrize(
    ("labels", "message"), [([1, 1], "has one class, '1'"), ([0, -1], "neither names nor numbers")]
)
def test_labels_that_are_no_classes(tmp_path, labels, message):
    features = Features({"image": Image(), "label": Value("int64")})
    Dataset.from_dict({"image": images(2), "label": labels}, features).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=message):
        load_image_data(tmp_path / "x.parquet")


def test_test_images_without_labels_are_found_before_the_training(tmp_path):
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    splits = {"train": [0, 1], "test": [-1, -1]}
    datasets.DatasetDict(
        {name: Dataset.from_dict({"image": images(2), "label": each}, features) for name, each in splits.items()}
    ).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match=r"the split 'test' of .* has label -1, which is none of its 2 classes"):
        load_image_data(tmp_path / "data")


def test_images_without_labels(folder):
    data = load_image_data(folder / "train" / "cat", needs_labels=False)
    assert data.train.column_names == ["image"]
    assert data.label_names == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"evaluation_split": "val"}, "data: .* has no split 'val'; it has 'train', 'test'"),
        ({"train_split": "train[:x]"}, r"data: 'train\[:x\]' is no part of a split"),
        ({"image_column": "photo"}, "image_column: .* has no column 'photo'; it has 'image', 'label'"),
        ({"label_column": "kind"}, "label_column: .* has no column 'kind'; it has 'image', 'label'"),
        ({"subset": "large"}, "could not be read: .*'large' not found"),
        ({"train_split": "train[:3]", "streaming": True}, "data: a stream has no parts"),
    ],
)
def test_what_a_source_does_not_have(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        load_image_data(folder, **settings)


def test_sources_that_are_none(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts" / "cat").mkdir(parents=True)
    (tmp_path / "texts" / "cat" / "a.txt").write_text("meow")
    write_images(tmp_path / "one" / "cat", 2)
    (tmp_path / "data.xyz").write_text("?")
    for name, error, message in (
        ("empty", ValueError, "data: the folder '.*empty' has no images; expected are .*/CLASS/IMAGE"),
        ("texts", ValueError, "data: the folder '.*texts' has no images"),
        ("one", ValueError, "data: the images of '.*one' have no labels or one class: .* at least two classes"),
        ("gone", FileNotFoundError, "data: there is no folder '.*gone'"),
        ("data.xyz", ValueError, "data: '.*data.xyz' is a file of unknown kind"),
    ):
        with pytest.raises(error, match=message):
            load_image_data(tmp_path / name)
    with pytest.raises(
        OSError, match="data: there is no folder 'user/pets', and no such data set could be had from the Hub"
    ):
        load_image_data("user/pets")


def test_a_part_is_evenly_spread():
    rows = Dataset.from_dict({"row": range(10)})
    assert evenly_spread(rows, None) is rows and evenly_spread(rows, 10) is rows
    assert evenly_spread(rows, 4)["row"][:] == [0, 2, 5, 7]
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        evenly_spread(rows, 0)
