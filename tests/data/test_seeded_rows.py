"""The random numbers of a training batch follow from the seeds in its rows."""

import random
from itertools import islice, pairwise

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dart_hf.data.seeded_rows import SeededRows, SeededStream, seeded


@pytest.fixture(scope="module")
def rows() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"image": [f"{number:02}.png" for number in range(12)]})


def seeds(batch: list[dict]) -> list[int]:
    return [row["augmentation_seed"] for row in batch]


def images(batch: list[dict]) -> list[str]:
    return [row["image"] for row in batch]


def test_the_seed_of_a_row_follows_from_seed_epoch_and_row(rows):
    first, again, other = SeededRows(rows, 5), SeededRows(rows, 5), SeededRows(rows, 6)
    indices = [3, 0, 11]
    before = seeds(first.__getitems__(indices))
    assert before == seeds(again.__getitems__(indices))
    assert first[0] == {"image": "00.png", "augmentation_seed": before[1]}
    assert len(set(seeds(first.__getitems__(range(12)) + other.__getitems__(range(12))))) == 24
    first.set_epoch(1)
    assert not set(before) & set(seeds(first.__getitems__(indices)))
    assert images(SeededRows([{"image": 1}, {"image": 2}]).__getitems__([1, 0])) == [2, 1]


@pytest.mark.parametrize(("size", "repeats"), [(6, 3), (7, 3), (4, 2), (2, 3), (5, 1)])
def test_repeated_augmentation_repeats_images_with_other_seeds(rows, size, repeats):
    data = SeededRows(rows, 0, repeats)
    batch = data.__getitems__(range(size))
    assert len(data) == len(rows)
    assert len(batch) == len(set(seeds(batch))) == size
    distinct = set(images(batch))
    assert len(distinct) == -(-size // repeats)
    assert max(images(batch).count(image) for image in distinct) == min(repeats, size)
    # Mixup must not mix an image with itself.
    assert len(distinct) == 1 or all(image != neighbour for image, neighbour in pairwise(images(batch)))


def test_the_epoch_reaches_persistent_workers(rows):
    data = SeededRows(rows)
    loader = DataLoader(data, batch_size=12, num_workers=1, persistent_workers=True, collate_fn=seeds)
    first = next(iter(loader))
    data.set_epoch(1)
    assert not set(first) & set(next(iter(loader)))


def test_a_stream_is_shuffled_and_starts_again(rows):
    stream = SeededStream(rows.to_iterable_dataset(), 0, repeats=2)
    both = list(islice(stream, 48))
    first, second = both[:24], both[24:]
    assert len(set(seeds(both))) == 48
    assert all(sorted(set(images(part))) == rows["image"][:] for part in (first, second))
    assert images(first)[:12] not in (rows["image"][:], images(second)[:12])
    assert seeds(first) == seeds(list(islice(stream, 24)))
    assert list(SeededStream(rows.to_iterable_dataset().take(0))) == []


def test_repeats_below_one_are_refused(rows):
    for kind, given in ((SeededRows, rows), (SeededStream, rows.to_iterable_dataset())):
        with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
            kind(given, repeats=0)


def test_seeded_restores_the_global_random_states():
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    def start():
        random.seed(1), np.random.seed(1), torch.manual_seed(1)

    start()
    expected = [draw(), draw()]
    start()
    found = [draw()]
    with seeded(0):
        first = draw()
    with seeded(0):
        assert draw() == first
    assert [*found, draw()] == expected
