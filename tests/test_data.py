"""The collator: batches as the model wants them, and one clear error for a label that no class has."""

import pickle

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage

from dart_hf import DartImageProcessor
from dart_hf.data import ImageClassificationCollator


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
