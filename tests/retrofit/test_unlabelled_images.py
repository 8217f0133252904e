"""Images without labels: which are found, held out and shown, and the budgets of their batches."""

import numpy as np
import pytest
import torch
from helpers.tiny_training import tiny_pictures
from PIL import Image
from torch.nn.functional import interpolate

from dart_hf import DartImageProcessor
from dart_hf.data.seeded_rows import SeededRows
from dart_hf.retrofit.image_processors import resized_processor
from dart_hf.retrofit.unlabelled_images import FeatureCollator, image_rows, split_rows, unlabelled_images


def test_all_images_below_a_folder_are_found(photos):
    found = [row["image"]["path"] for row in unlabelled_images(photos)]
    assert sorted(found) == sorted(str(path) for path in photos.rglob("*.png"))


def test_paths_images_and_data_sets_become_rows(photos):
    data, path = unlabelled_images(photos), next(photos.glob("*.png"))
    assert image_rows(data)[0] == data[0] == image_rows(photos)[0]
    picture = Image.open(path)
    assert image_rows([picture, path]) == [{"image": picture}, {"image": {"path": str(path), "bytes": None}}]


@pytest.mark.parametrize(("count", "share", "expected"), [(10, 0.25, 2), (3, 0.01, 1), (2, 0.99, 1), (9000, 0.5, 500)])
def test_some_images_are_held_out(count, share, expected):
    learned, held_out = split_rows([{"image": number} for number in range(count)], share)
    assert len(held_out) == expected
    assert sorted(row["image"] for part in (learned, held_out) for row in part) == list(range(count))


def test_a_batch_draws_its_budget_from_its_rows(processor):
    collator, rows = FeatureCollator(processor, processor, [4, 9, 16]), SeededRows(tiny_pictures(8))
    batches = [rows.__getitems__([number % 8, number * 3 % 8]) for number in range(12)]
    drawn = [collator(batch)["num_patches"] for batch in batches]
    assert set(drawn) == {4, 9, 16}
    assert drawn == [collator(batch)["num_patches"] for batch in batches]
    assert "num_patches" not in collator(tiny_pictures(2))


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"shortest_edge": 40}, "crop_size": 32},
        {"size": {"height": 40, "width": 40}, "crop_size": 32},
        {"size": {"height": 32, "width": 32}, "do_center_crop": False},
    ],
)
def test_the_teacher_sees_the_same_part_of_an_image(settings):
    rows, columns = np.mgrid[:120, :200]
    picture = Image.fromarray(np.stack([rows, columns, rows], axis=2).astype(np.uint8))
    student = DartImageProcessor(**settings)
    collator = FeatureCollator(student, resized_processor(student, 64), [4])
    batch = collator([{"image": picture}])
    assert batch["teacher_pixel_values"].shape == (1, 3, 64, 64)
    seen = interpolate(batch["teacher_pixel_values"], 32, mode="area")
    torch.testing.assert_close(batch["pixel_values"], seen, rtol=0, atol=0.05)
