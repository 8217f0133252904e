"""What is random about a training batch follows from the numbers that its rows carry, and is as asked for."""

import random
from itertools import islice, pairwise

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
from dart_hf.data.seeded_rows import SeededRows, SeededStream, seeded

SIDE = 32
RANDAUGMENT = "rand-m9-mstd0.5-inc1"


def picture(seed: int, side: int = SIDE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def rows() -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    columns = {"image": [picture(seed) for seed in range(12)], "label": [seed % 3 for seed in range(12)]}
    return datasets.Dataset.from_dict(columns, features).cast_column("image", datasets.Image(decode=False))


@pytest.fixture(scope="module")
def processor() -> DartImageProcessor:
    return DartImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE)


def seeds(batch: list[dict]) -> list[int]:
    return [row["augmentation_seed"] for row in batch]


# Rows -------------------------------------------------------------------------------------------------------------


def test_the_number_follows_from_seed_epoch_and_row(rows):
    first, again, other = SeededRows(rows, 5), SeededRows(rows, 5), SeededRows(rows, 6)
    indices = [3, 0, 11]
    assert seeds(first.__getitems__(indices)) == seeds(again.__getitems__(indices))
    assert first[0]["augmentation_seed"] == seeds(first.__getitems__(indices))[1]
    assert len(set(seeds(first.__getitems__(range(12))))) == 12
    assert not set(seeds(first.__getitems__(range(12)))) & set(seeds(other.__getitems__(range(12))))
    before = seeds(first.__getitems__(indices))
    first.set_epoch(1)
    assert not set(before) & set(seeds(first.__getitems__(indices)))
    assert first[3]["label"] == rows[3]["label"]


def test_rows_in_a_list():
    assert [row["a"] for row in SeededRows([{"a": 1}, {"a": 2}]).__getitems__([1, 0])] == [2, 1]


@pytest.mark.parametrize(("size", "repeats"), [(6, 3), (7, 3), (4, 2), (2, 3), (5, 1)])
def test_repeated_augmentation_repeats_images_with_other_numbers(rows, size, repeats):
    batch = SeededRows(rows, 0, repeats).__getitems__(range(size))
    assert len(batch) == size
    assert len(set(seeds(batch))) == size
    images = [row["image"]["bytes"] for row in batch]
    distinct = set(images)
    assert len(distinct) == -(-size // repeats)
    assert max(images.count(image) for image in distinct) == min(repeats, size)
    if len(distinct) > 1:
        # Mixup would otherwise mix an image with itself.
        assert all(image != neighbour for image, neighbour in pairwise(images))


def test_an_epoch_has_as_many_rows_with_repeats(rows):
    assert len(SeededRows(rows, 0, 3)) == len(rows)


def test_the_epoch_reaches_workers_that_stay(rows):
    data = SeededRows(rows)
    loader = DataLoader(data, batch_size=12, num_workers=1, persistent_workers=True, collate_fn=seeds)
    first = next(iter(loader))
    data.set_epoch(1)
    assert not set(first) & set(next(iter(loader)))


def test_a_stream_is_shuffled_and_begins_again(rows):
    stream = SeededStream(rows.to_iterable_dataset(), 0, repeats=2)
    first, second = (list(islice(stream, 48))[part] for part in (slice(24), slice(24, 48)))
    assert len(set(seeds(first + second))) == 48
    images = [[row["image"]["bytes"] for row in part] for part in (first, second)]
    assert all(sorted(set(part)) == sorted(row["image"]["bytes"] for row in rows) for part in images)
    assert images[0][:12] not in ([row["image"]["bytes"] for row in rows], images[1][:12])
    assert seeds(first) == seeds(list(islice(stream, 24)))
    assert list(SeededStream(rows.to_iterable_dataset().take(0))) == []


def test_repeats_below_one(rows):
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        SeededRows(rows, repeats=0)
    with pytest.raises(ValueError, match="repeats must be at least 1, got -1"):
        SeededStream(rows.to_iterable_dataset(), repeats=-1)


def test_seeded_leaves_the_global_numbers_alone():
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    with seeded(0):
        first = draw()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = [draw(), draw()]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    undisturbed = draw()
    with seeded(0):
        assert draw() == first
    assert [undisturbed, draw()] == expected


# One image --------------------------------------------------------------------------------------------------------


def test_without_augmentation_it_is_the_image_processor(processor):
    image = picture(0)
    plain = training_transform(processor, horizontal_flip=0.0)(image)
    torch.testing.assert_close(plain, processor(image, return_tensors="pt").pixel_values[0])


def test_a_mirror_image(processor):
    image = picture(0)
    mirrored = training_transform(processor, horizontal_flip=1.0)(image)
    torch.testing.assert_close(mirrored, processor(image, return_tensors="pt").pixel_values[0].flip(-1))


@pytest.mark.parametrize(
    "settings",
    [{"auto_augment": RANDAUGMENT}, {"random_erasing": 1.0}, {"crop_scale": 0.1}, {"color_jitter": 0.4}],
    ids=lambda settings: next(iter(settings)),
)
def test_each_augmentation_changes_the_image_as_the_number_says(processor, settings):
    transform, image = training_transform(processor, **{"horizontal_flip": 0.0, **settings}), picture(0)
    plain = training_transform(processor, horizontal_flip=0.0)(image)

    def augmented(seed):
        with seeded(seed):
            return transform(image)

    changed = [augmented(seed) for seed in range(4)]
    assert all(result.shape == (3, SIDE, SIDE) for result in changed)
    assert any(not torch.allclose(result, plain, atol=0.1) for result in changed)
    assert any(not torch.equal(result, changed[0]) for result in changed[1:])
    assert torch.equal(augmented(2), changed[2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"random_erasing": 1.5}, "random_erasing must be from 0 to 1, got 1.5"),
        ({"color_jitter": -1}, "color_jitter must be from 0 to 1, got -1"),
        ({"horizontal_flip": -0.1}, "horizontal_flip must be from 0 to 1, got -0.1"),
        ({"crop_scale": 0.0}, "crop_scale must be above 0 and at most 1, got 0.0"),
        ({"auto_augment": "best"}, "auto_augment='best' is no policy of timm's"),
    ],
)
def test_settings_out_of_range(processor, settings, message):
    with pytest.raises(ValueError, match=message):
        training_transform(processor, **settings)


# A batch ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_a_mixed_batch_has_the_targets_of_its_pixels(kind):
    # Each image has its class's number for pixels, so the mean of the pixels tells the shares.
    labels = torch.tensor([0, 1, 2])
    pixel_values = labels.float().view(3, 1, 1, 1).expand(3, 3, 16, 16).clone()
    mixed, targets = MixImages(3, **{kind: 1.0})(pixel_values, labels)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(3))
    torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), targets @ torch.arange(3.0), atol=1e-5, rtol=0)
    assert targets.max() < 1


def test_mixup_and_cutmix_take_turns():
    mix, labels = MixImages(2, mixup=1.0, cutmix=1.0), torch.tensor([0, 1])
    pixel_values = labels.float().view(2, 1, 1, 1).expand(2, 3, 16, 16).clone()
    with seeded(0):
        # Pixels are whole in cutmix and blended in mixup.
        blended = [
            bool(((mixed > 0) & (mixed < 1)).any()) for mixed, _ in (mix(pixel_values, labels) for _ in range(30))
        ]
    assert 5 < sum(blended) < 25


def test_label_smoothing_spreads_a_share_over_all_classes():
    pixel_values, labels = torch.rand(2, 3, 4, 4), torch.tensor([1, 3])
    unmixed, targets = MixImages(4, label_smoothing=0.1)(pixel_values, labels)
    assert torch.equal(unmixed, pixel_values)
    torch.testing.assert_close(targets, torch.tensor([[0.025, 0.925, 0.025, 0.025], [0.025, 0.025, 0.025, 0.925]]))


def test_mixing_out_of_range():
    for settings, message in (({"mixup": -1}, "mixup must be"), ({"label_smoothing": 1.0}, "label_smoothing must be")):
        with pytest.raises(ValueError, match=message):
            MixImages(3, **settings)


@pytest.fixture(scope="module")
def collate(processor) -> ImageClassificationCollator:
    return ImageClassificationCollator(
        processor, 3, transform=training_transform(processor, RANDAUGMENT, 0.25, 0.3), mix=MixImages(3, 0.8, 1.0, 0.1)
    )


def test_training_rows_are_augmented_and_others_are_not(rows, collate, processor):
    batch = collate(SeededRows(rows).__getitems__(range(4)))
    assert batch["pixel_values"].shape == (4, 3, SIDE, SIDE)
    assert batch["pixel_values"].is_contiguous(memory_format=torch.channels_last)
    assert batch["labels"].shape == (4, 3)
    plain = collate(rows.__getitems__(range(4)))
    assert plain["labels"].tolist() == [0, 1, 2, 0]
    expected = processor([picture(seed) for seed in range(4)], return_tensors="pt").pixel_values
    assert torch.equal(plain["pixel_values"], expected)


def test_a_batch_follows_from_its_rows_alone(rows, collate):
    def batches(workers):
        torch.manual_seed(workers)
        loader = DataLoader(SeededRows(rows, 3, 2), batch_size=5, num_workers=workers, collate_fn=collate)
        return list(loader)

    for alone, with_workers in zip(batches(0), batches(2), strict=True):
        assert torch.equal(alone["pixel_values"], with_workers["pixel_values"])
        assert torch.equal(alone["labels"], with_workers["labels"])


def test_the_copies_of_an_image_are_augmented_differently(rows, processor):
    collate = ImageClassificationCollator(processor, 3, transform=training_transform(processor, crop_scale=0.1))
    pixel_values = collate(SeededRows(rows, 0, 2).__getitems__([0, 1]))["pixel_values"]
    assert not torch.allclose(pixel_values[0], pixel_values[1], atol=0.1)
