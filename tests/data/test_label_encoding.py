"""Columns of labels of any type become classes, sets of classes, or numbers."""

import json
from decimal import Decimal

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Sequence
from helpers.tiny_images import png, write_images
from PIL import Image as PILImage

from dart_hf.data.class_table import class_table
from dart_hf.data.image_data import load_image_data

MULTI_LABEL = "multi_label_classification"


def images(count: int) -> list[dict]:
    return [{"bytes": png(PILImage.new("RGB", (8, 8), (number, 0, 0))), "path": None} for number in range(count)]


def load(tmp_path, labels, **settings):
    """Image data from a parquet file with this column of labels, as Arrow, pandas or Polars write it."""
    table = pa.table({"image": [image["bytes"] for image in images(len(labels))], "label": labels})
    pa.parquet.write_table(table, tmp_path / "x.parquet")
    return load_image_data(tmp_path / "x.parquet", **settings)


TEXTS = pa.array(["b", "a", "b"])


@pytest.mark.parametrize(
    "labels",
    [TEXTS, TEXTS.cast(pa.large_string()), TEXTS.cast(pa.string_view()), TEXTS.dictionary_encode()],
    ids=lambda labels: str(labels.type),
)
def test_text_of_any_arrow_type(tmp_path, labels):
    data = load(tmp_path, labels)
    assert (data.label_names, data.train["label"][:]) == (["a", "b"], [1, 0, 1])
    assert data.problem_type == "single_label_classification"
    streamed = load(tmp_path, labels, class_names=["b", "a"], streaming=True)
    assert [row["label"] for row in streamed.train] == [0, 1, 0]


def test_tables_of_pandas(tmp_path):
    table = pandas.DataFrame({"image": images(3), "label": pandas.Categorical(["b", "a", "b"])})
    table.to_parquet(tmp_path / "x.parquet")
    data = load_image_data(tmp_path / "x.parquet")
    assert (data.label_names, data.train["label"][:]) == (["a", "b"], [1, 0, 1])


@pytest.mark.parametrize(
    ("labels", "settings", "names", "expected"),
    [
        ([100, 300, 200, 100], {}, ["100", "200", "300"], [0, 2, 1, 0]),
        ([0, 2, 1], {}, ["0", "1", "2"], [0, 2, 1]),
        ([True, False], {}, ["False", "True"], [1, 0]),
        ([True, False], {"class_names": ["no", "yes"]}, ["no", "yes"], [1, 0]),
        ([0, 2], {"class_names": ["x", "y", "z"]}, ["x", "y", "z"], [0, 2]),
        (["b", "a"], {"class_names": ["b", "a", "c"]}, ["b", "a", "c"], [0, 1]),
    ],
)
def test_classes_are_the_values_that_occur_unless_they_are_given(tmp_path, labels, settings, names, expected):
    data = load(tmp_path, labels, **settings)
    assert (data.label_names, data.train["label"][:]) == (names, expected)


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        ([["b", "a"], [], ["c"]], ["a", "b", "c"], [[1, 0], [], [2]]),
        ([[100, 7], [300], []], ["7", "100", "300"], [[1, 0], [2], []]),
        (['["b", "a"]', "[]", "['c']"], ["a", "b", "c"], [[1, 0], [], [2]]),
        (pa.array([["b"], ["a"]], pa.large_list(pa.large_string())), ["a", "b"], [[1], [0]]),
    ],
)
def test_lists_are_several_labels(tmp_path, labels, names, expected):
    data = load(tmp_path, labels)
    assert (data.problem_type, data.label_names, data.train["label"][:]) == (MULTI_LABEL, names, expected)


def test_several_labels_from_metadata_and_from_class_labels(tmp_path):
    write_images(tmp_path / "pets", 2)
    rows = [{"file_name": "0.png", "labels": ["dog", "cat"]}, {"file_name": "1.png", "labels": ["cat"]}]
    (tmp_path / "pets" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = load_image_data(tmp_path / "pets")
    assert (data.problem_type, data.label_names, data.train["label"][:]) == (MULTI_LABEL, ["cat", "dog"], [[1, 0], [0]])
    assert list(class_table(data))[1:] == ["cat         2", "dog         1", "images      2"]
    features = Features({"image": Image(), "tags": Sequence(ClassLabel(names=["x", "y"]))})
    split = Dataset.from_dict({"image": images(1), "tags": [["y", "x"]]}, features)
    DatasetDict({"train": split}).save_to_disk(tmp_path / "saved")
    data = load_image_data(tmp_path / "saved")
    assert (data.problem_type, data.label_names, data.train["label"][:]) == (MULTI_LABEL, ["x", "y"], [[1, 0]])


@pytest.mark.parametrize(
    ("labels", "names"),
    [([0.5, 2.0], ["LABEL_0"]), (np.float16([0.5, 2]), ["LABEL_0"]), ([[0.5, 1], [2, 3.0]], ["LABEL_0", "LABEL_1"])],
)
def test_floating_point_labels_are_a_regression(tmp_path, labels, names):
    for streaming in (False, True):
        data = load(tmp_path, labels, streaming=streaming)
        assert (data.problem_type, data.label_names) == ("regression", names)
        assert np.array_equal([row["label"] for row in data.train], labels)
    assert list(class_table(load(tmp_path, labels)))[1].split()[:3] == ["train", "2", "0.5"]


@pytest.mark.parametrize(
    ("labels", "settings", "message"),
    [
        ([0, -1], {}, "label_column: the labels of .* include -1, which cannot be a class"),
        (["a", None], {}, "label_column: an image of .* has no label"),
        ([["a"], None], {}, "label_column: an image of .* has no label"),
        ([0.5, None], {}, "label_column: an image of .* has no label"),
        ([[0, 1, 1], [1, 0, 0]], {}, r"has the labels \[0, 1, 1\], one of them twice; .* not zeros and ones"),
        ([[0.5], [0.5, 1.0]], {}, "must be equally many numbers for each image, got 1, 2"),
        ([[[1]], [[2]]], {}, "label_column: the labels of .* are of type .*; accepted are text, integers"),
        ([Decimal("0.5"), None], {}, "label_column: the labels of .* are of type .*; accepted are text, integers"),
        ([0.5, 1.0], {"class_names": ["x", "y"]}, "class_names: .* has 1 numbers for each image, got 2 names"),
        (["a", "b"], {"class_names": ["a", "c"]}, "class_names: the labels of .* include 'b', not among .* 'a', 'c'"),
        ([0, 5], {"class_names": ["a", "c"]}, "the split 'train' of .* has label 5, not one of its 2 classes"),
        (["a", "b"], {"streaming": True}, "class_names: the stream .* does not tell its classes"),
        ([1, 1], {}, "has one class, '1'; a classifier needs at least two"),
    ],
)
def test_labels_that_are_no_classes(tmp_path, labels, settings, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, labels, **settings)


@pytest.mark.parametrize(
    ("splits", "settings", "message"),
    [
        ({"train": "ab", "test": "ba"}, {}, r"are 'a', 'b', in this order, for all splits; got 'b', 'a'\."),
        ({"test": "ab"}, {"train_split": None}, r"the split 'test' of .* has label -1, not one of its 2 classes"),
        ({"train": "ab"}, {"class_names": ["a", "b", "c"]}, r"got 'a', 'b', 'c' \(not in both: 'c'\)"),
    ],
)
def test_splits_with_other_classes_or_test_images_without_labels_are_errors(tmp_path, splits, settings, message):
    parts = {}
    for split, names in splits.items():
        features = Features({"image": Image(), "label": ClassLabel(names=list(names))})
        labels = [0, 1] if "train" in splits else [-1, -1]
        parts[split] = Dataset.from_dict({"image": images(2), "label": labels}, features)
    DatasetDict(parts).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=message):
        load_image_data(tmp_path / "saved", **settings)
