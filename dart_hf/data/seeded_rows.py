"""Seeded rows: each row of a training data set carries the number that decides its augmentation.

So a batch is the same after a resume, whatever else draws random numbers.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count, islice
from typing import Any

import datasets
import numpy as np
import torch

AUGMENTATION_SEED = "augmentation_seed"
# The copies of a stream's image are this many rows apart: mixup and cutmix pair neighbours.
STREAM_PIECE = 64
SHUFFLE_BUFFER = 1000


class SeededRows(torch.utils.data.Dataset):
    """Rows of a data set, each with the number that decides its augmentation, `row["augmentation_seed"]`.

    The number depends on the seed, the epoch and the row. With `repeats` above 1 the augmentation is repeated
    (arXiv 1901.09335, as in DeiT): a batch of B rows holds B / repeats images, each `repeats` times with different
    numbers. An epoch has as many rows as without repeats. timm has a sampler for this, but `Trainer` takes no sampler.

    A stock `Trainer` takes this as `train_dataset`, with [`EpochCallback`] among its callbacks.

    Args:
        rows: A map-style data set, or a list, whose rows are dicts.
        seed: The seed of all numbers.
        repeats: How often an image is in a batch.

    Raises:
        ValueError: `repeats` is below 1.
    """

    def __init__(self, rows: Sequence[dict[str, Any]] | datasets.Dataset, seed: int = 0, repeats: int = 1) -> None:
        _check_repeats(repeats)
        self.rows = rows
        self.seed = seed
        self.repeats = repeats
        # Worker processes that live longer than an epoch read the epoch from shared memory.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The rows of a batch. PyTorch's loader asks for all of them at once."""
        distinct = list(indices)[: -(-len(indices) // self.repeats)]
        read_rows = getattr(self.rows, "__getitems__", lambda indices: [self.rows[index] for index in indices])
        rows = list(zip(distinct, read_rows(distinct), strict=True))
        # The copies of an image are not neighbours: mixup and cutmix pair neighbours.
        copies = [
            {**row, AUGMENTATION_SEED: combined_seed(self.seed, int(self._epoch), index, copy)}
            for copy in range(self.repeats)
            for index, row in rows
        ]
        return copies[: len(indices)]


class SeededStream(torch.utils.data.IterableDataset):
    """[`SeededRows`] for a stream. The stream is shuffled in a buffer and starts again when it ends.

    `Trainer` gets `max_steps` and sees one long epoch, so a resumed training skips to the right row. Each worker
    process has its own numbers.

    Args:
        rows: A streaming data set whose rows are dicts.
        seed, repeats: As in [`SeededRows`].
        shuffle_buffer: Number of rows in the shuffle buffer. A stream that is sorted by class needs many.

    Raises:
        ValueError: `repeats` is below 1.
    """

    def __init__(
        self, rows: datasets.IterableDataset, seed: int = 0, repeats: int = 1, shuffle_buffer: int = SHUFFLE_BUFFER
    ) -> None:
        _check_repeats(repeats)
        self.rows = rows.shuffle(seed=seed, buffer_size=shuffle_buffer)
        self.seed = seed
        self.repeats = repeats

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        worker_id = 0 if worker is None else worker.id
        for epoch in count():
            self.rows.set_epoch(epoch)
            numbered = enumerate(self.rows)
            piece = list(islice(numbered, STREAM_PIECE))
            if not piece:
                return
            while piece:
                for copy in range(self.repeats):
                    for index, row in piece:
                        yield {**row, AUGMENTATION_SEED: combined_seed(self.seed, epoch, worker_id, index, copy)}
                piece = list(islice(numbered, STREAM_PIECE))


def _check_repeats(repeats: int) -> None:
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}.")


def combined_seed(*numbers: int) -> int:
    """One seed that depends on all the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global random numbers of Python, NumPy and PyTorch inside the block, and restore their states after it.

    timm's augmentations draw from Python's and NumPy's generators, torchvision's from PyTorch's.
    """
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(pytorch)
