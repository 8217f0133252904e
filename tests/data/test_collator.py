"""Rows become batches as the model wants them; a wrong row is one clear error."""

import pickle
import re

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from helpers.tiny_images import png
from PIL import Image as PILImage
from torch.utils.data import DataLoader

from dart_hf import DartImageProcessor
from dart_hf.data.batch_mixing import MixImages
from dart_hf.data.batches import evenly_spread
from dart_hf.data.collator import ImageClassificationCollator, is_labelled
from dart_hf.data.image_augmentation import training_transform
from dart_hf.data.seeded_rows import SeededRows


def collator(num_labels: int = 3, **settings) -> ImageClassificationCollator:
    return ImageClassificationCollator(DartImageProcessor(size=16, crop_size=16), num_labels, **settings)


@pytest.fixture(scope="module")
def collate() -> ImageClassificationCollator:
    return collator()


def images(count: int) -> list[PILImage.Image]:
    rng = np.random.default_rng(0)
    return [PILImage.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in range(count)]


def rows(*labels) -> list[dict]:
    return [{"image": image, "label": label} for image, label in zip(images(len(labels)), labels, strict=True)]


def test_a_batch_has_what_the_image_processor_makes(collate):
    batch = collate(rows(0, np.int64(2), 1))
    expected = collate.image_processor(images(3), return_tensors="pt").pixel_values
    assert set(batch) == {"pixel_values", "labels"}
    assert torch.equal(batch["pixel_values"], expected)
    assert batch["labels"].dtype == torch.int64
    assert batch["labels"].tolist() == [0, 2, 1]
    copy = pickle.loads(pickle.dumps(collate))
    assert torch.equal(copy(rows(0, 2, 1))["pixel_values"], expected)


def test_rows_of_a_data_set_and_other_columns(collate):
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"])})
    data = Dataset.from_dict({"image": images(2), "label": ["c", "a"]}, features=features)
    assert collate(data.__getitems__([0, 1]))["labels"].tolist() == [2, 0]
    data = Dataset.from_dict({"picture": images(1), "kind": [1]}, Features({"picture": Image(), "kind": Value("int8")}))
    assert collator(image_column="picture", label_column="kind")([data[0]])["labels"].tolist() == [1]
    assert set(collator(label_column=None)([{"image": images(1)[0]}])) == {"pixel_values"}


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "labels", "expected"),
    [
        ("multi_label_classification", 3, [[2, 0], [], [1]], [[1, 0, 1], [0, 0, 0], [0, 1, 0]]),
        ("regression", 1, [0.5, -100], [0.5, -100]),
        ("regression", 2, [[1.0, 2.0]], [[1, 2]]),
    ],
)
def test_sets_of_labels_become_zeros_and_ones_and_numbers_stay(problem_type, num_labels, labels, expected):
    found = collator(num_labels, problem_type=problem_type)(rows(*labels))["labels"]
    assert (found.dtype, found.tolist()) == (torch.float32, expected)


@pytest.mark.parametrize(
    ("problem_type", "label", "message"),
    [
        ("single_label_classification", 3, "Label 3 in column 'label' is out of range: .* 3 classes.* 0 to 2"),
        ("single_label_classification", -100, "Label -100 in column 'label' is out of range"),
        ("single_label_classification", "2", "must be an integer, got '2' in column 'label'"),
        ("single_label_classification", 1.0, "must be an integer, got 1.0 in column 'label'"),
        ("single_label_classification", None, "must be an integer, got None in column 'label'"),
        ("single_label_classification", True, "must be an integer, got True in column 'label'"),
        ("multi_label_classification", 1, "must be a list of classes, got 1"),
        ("multi_label_classification", [0, 3], "Label 3 in column 'label' is out of range"),
        ("regression", 1.0, "must be 3 finite numbers, got 1.0"),
        ("regression", [0, 1, float("nan")], "must be 3 finite numbers, got "),
    ],
)
def test_labels_that_do_not_fit_the_task(problem_type, label, message):
    with pytest.raises(ValueError, match=message):
        collator(problem_type=problem_type)(rows(label))


def test_settings_that_do_not_fit_together():
    with pytest.raises(ValueError, match=r"problem_type must be one of .*, got 'detection'"):
        collator(problem_type="detection")
    with pytest.raises(ValueError, match="mixup, cutmix and label smoothing need one class for each image"):
        collator(problem_type="regression", mix=MixImages(3, 0.8))


def test_rows_that_lack_a_column_or_have_pixels_that_are_not_finite(collate):
    with pytest.raises(ValueError, match="no column 'label'; it has 'image'"):
        collate([{"image": images(1)[0]}])
    with pytest.raises(ValueError, match="no column 'image'; it has 'label'"):
        collate([{"label": 1}])
    with pytest.raises(ValueError, match="NaN"):
        collate([{"image": np.full((16, 16, 3), np.nan, dtype=np.float32), "label": 0}])


class ListData(list):
    def __getitems__(self, indices):
        return [self[index] for index in indices]


def undecoded(count: int, damaged: set[int], label=lambda number: number % 3) -> ListData:
    contents = [png(image)[: 100 if number in damaged else None] for number, image in enumerate(images(count))]
    return ListData(
        {"image": {"bytes": content, "path": f"{number}.png"}, "label": label(number)}
        for number, content in enumerate(contents)
    )


def odd_file(tmp_path, kind: str) -> str:
    path = tmp_path / "odd.tif"
    if kind == "damaged":
        path.write_bytes(b"II*\0 and no more")
    elif kind == "unknown layout":
        # PIL raises NotImplementedError for the kind of pixels.
        PILImage.new("RGB", (9, 9)).save(path, "DDS")
        content = path.read_bytes()
        path.write_bytes(content[:80] + bytes(4) + content[84:])
    elif kind != "missing":
        PILImage.fromarray(np.full((9, 9), 300, {"16 bits": np.uint16, "32 bits": np.int32}.get(kind, kind))).save(path)
    return str(path)


def test_a_row_without_an_image_is_an_error_or_skipped(collate):
    batch, skipping = [{"image": None, "label": 1}, *undecoded(1, set())], collator(skip_unreadable=True)
    with pytest.raises(OSError, match="cannot be read: its row has nothing in column 'image'; skip_unreadable"):
        collate(batch)
    assert (skipping(batch)["labels"].tolist(), skipping.num_skipped) == ([-100, 0], 1)


@pytest.mark.parametrize("kind", ["float32", "32 bits", "16 bits", "damaged", "missing", "unknown layout"])
@pytest.mark.parametrize("transform", [None, training_transform(DartImageProcessor(size=16, crop_size=16))])
def test_an_image_that_cannot_be_used_is_named_or_skipped(tmp_path, kind, transform):
    path = odd_file(tmp_path, kind)
    bad = [{"image": {"bytes": None, "path": path}, "label": 1}, *undecoded(2, set())]
    training = SeededRows(ListData(bad)).__getitems__(range(3))
    message = f"The image '{re.escape(path)}' cannot be read: .*skip_unreadable=True \\(--skip-unreadable\\) leaves"
    for batch in (bad, training):
        with pytest.raises(OSError, match=message) as caught:
            collator(transform=transform)(batch)
        assert "\n" not in str(caught.value)
    skip = collator(transform=transform, skip_unreadable=True)
    assert (skip(bad)["labels"].tolist(), skip(training)["labels"].tolist()) == ([-100, 0, 1], [0, 1])
    assert skip.num_skipped == 2


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "label"),
    [
        ("single_label_classification", 3, lambda number: number),
        ("multi_label_classification", 3, lambda number: [number]),
        ("regression", 1, float),
        ("regression", 2, lambda number: [number, -100.0]),
    ],
)
def test_an_unreadable_image_leaves_training_batches_and_gets_no_label(problem_type, num_labels, label, collate):
    expected = collate(rows(0, 1, 2))["pixel_values"][[0, 2]]
    skipping = collator(num_labels, problem_type=problem_type, skip_unreadable=True)
    images = undecoded(3, {1}, label)
    assert torch.equal(skipping(SeededRows(images).__getitems__(range(3)))["pixel_values"], expected)
    batch = skipping(images)
    assert torch.equal(batch["pixel_values"][[0, 2]], expected) and batch["pixel_values"].isfinite().all()
    assert is_labelled(batch["labels"]).tolist() == [True, False, True]


@pytest.mark.parametrize(("mix", "label"), [(None, -100), (MixImages(3, 0.8), [-100] * 3)])
def test_a_training_batch_without_any_readable_image_has_no_weight(mix, label):
    batch = collator(mix=mix, skip_unreadable=True)(SeededRows(undecoded(2, {0, 1})).__getitems__(range(2)))
    assert batch["labels"].tolist() == [label] * 2


def test_skipped_images_are_counted_in_all_worker_processes():
    skipping = collator(skip_unreadable=True)
    batches = list(DataLoader(undecoded(6, {0, 3, 5}), batch_size=2, num_workers=2, collate_fn=skipping))
    assert [batch["labels"].tolist() for batch in batches] == [[-100, 1], [2, -100], [1, -100]]
    assert skipping.num_skipped == 3


def test_a_limited_number_of_rows_is_evenly_spread():
    rows = datasets.Dataset.from_dict({"row": range(10)})
    assert evenly_spread(rows, None) is rows and evenly_spread(rows, 10) is rows
    assert evenly_spread(rows, 4)["row"][:] == [0, 2, 5, 7]
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        evenly_spread(rows, 0)
