"""Training images are augmented as asked for, the same way for the same seeds; evaluation images are not."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dart_hf import DartImageProcessor
from dart_hf.data.batch_mixing import MixImages
from dart_hf.data.collator import ImageClassificationCollator
from dart_hf.data.image_augmentation import training_transform
from dart_hf.data.seeded_rows import SeededRows, seeded

SIDE = 32
RANDAUGMENT = "rand-m9-mstd0.5-inc1"


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def rows() -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    columns = {"image": [picture(seed) for seed in range(12)], "label": [seed % 3 for seed in range(12)]}
    return datasets.Dataset.from_dict(columns, features).cast_column("image", datasets.Image(decode=False))


@pytest.fixture(scope="module")
def processor() -> DartImageProcessor:
    return DartImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE)


@pytest.fixture(scope="module")
def collate(processor) -> ImageClassificationCollator:
    return ImageClassificationCollator(
        processor, 3, transform=training_transform(processor, RANDAUGMENT, 0.25, 0.3), mix=MixImages(3, 0.8, 1.0, 0.1)
    )


def test_without_augmentation_the_transform_is_the_image_processor(processor):
    expected = processor(picture(0), return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(training_transform(processor, horizontal_flip=0.0)(picture(0)), expected)
    torch.testing.assert_close(training_transform(processor, horizontal_flip=1.0)(picture(0)), expected.flip(-1))


@pytest.mark.parametrize(
    "settings", [{"auto_augment": RANDAUGMENT}, {"random_erasing": 1.0}, {"crop_scale": 0.1}, {"color_jitter": 0.4}]
)
def test_each_augmentation_changes_the_image_by_the_seed(processor, settings):
    transform, image = training_transform(processor, **{"horizontal_flip": 0.0, **settings}), picture(0)
    plain, changed = training_transform(processor, horizontal_flip=0.0)(image), []
    for seed in (0, 1, 2, 3, 2):
        with seeded(seed):
            changed.append(transform(image))
    assert all(result.shape == (3, SIDE, SIDE) for result in changed)
    assert any(not torch.allclose(result, plain, atol=0.1) for result in changed)
    assert any(not torch.equal(result, changed[0]) for result in changed[1:])
    assert torch.equal(changed[4], changed[2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"random_erasing": 1.5}, "random_erasing must be from 0 to 1, got 1.5"),
        ({"horizontal_flip": -0.1}, "horizontal_flip must be from 0 to 1, got -0.1"),
        ({"crop_scale": 0.0}, "crop_scale must be above 0 and at most 1, got 0.0"),
        ({"auto_augment": "best"}, "auto_augment='best' is no policy of timm's"),
    ],
)
def test_settings_out_of_range_are_refused(processor, settings, message):
    with pytest.raises(ValueError, match=message):
        training_transform(processor, **settings)


def test_training_rows_are_augmented_and_others_are_not(rows, collate, processor):
    batch = collate(SeededRows(rows, 0, 2).__getitems__(range(4)))
    assert batch["pixel_values"].shape == (4, 3, SIDE, SIDE)
    assert batch["pixel_values"].is_contiguous(memory_format=torch.channels_last)
    assert batch["labels"].shape == (4, 3)
    # With repeated augmentation the copies of an image are augmented differently.
    copies = ImageClassificationCollator(processor, 3, transform=training_transform(processor, crop_scale=0.1))
    first, second = copies(SeededRows(rows, 0, 2).__getitems__([0, 1]))["pixel_values"]
    assert not torch.allclose(first, second, atol=0.1)
    plain = collate(rows.__getitems__(range(4)))
    assert plain["labels"].tolist() == [0, 1, 2, 0]
    expected = processor([picture(seed) for seed in range(4)], return_tensors="pt").pixel_values
    assert torch.equal(plain["pixel_values"], expected)


def test_a_batch_follows_from_its_rows_alone(rows, collate):
    batches = []
    for workers in (0, 2):
        torch.manual_seed(workers)
        batches += [list(DataLoader(SeededRows(rows, 3, 2), batch_size=5, num_workers=workers, collate_fn=collate))]
    for alone, with_workers in zip(*batches, strict=True):
        assert all(torch.equal(alone[name], with_workers[name]) for name in ("pixel_values", "labels"))
