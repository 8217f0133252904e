"""Batches of a data set in its order, made by worker processes where asked for."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm


def image_batches(
    data: datasets.Dataset,
    collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, torch.Tensor]],
    batch_size: int = 32,
    workers: int = 0,
    progress: bool = False,
) -> Iterator[dict[str, torch.Tensor]]:
    """The batches of a data set in its order.

    Args:
        data: The rows.
        collate: Makes a batch of rows.
        batch_size: Rows in a batch; the last batch can be smaller.
        workers: Number of worker processes.
        progress: Show a progress bar on a terminal.

    Raises:
        ValueError, OSError: The errors of `collate`, in one sentence even if a worker process raised them.
    """
    loader = DataLoader(data, batch_size=batch_size, collate_fn=collate, num_workers=workers)
    with (
        without_worker_traceback(),
        tqdm(total=len(data), unit="image", leave=False, disable=None if progress else True) as bar,
    ):
        for batch in loader:
            yield batch
            bar.update(len(batch["pixel_values"]))


@contextmanager
def without_worker_traceback() -> Iterator[None]:
    """Turn an error of a `DataLoader`'s worker process, whose message is a traceback, into its own one sentence."""
    try:
        yield
    except (ValueError, OSError) as error:
        message = str(error)
        if not message.startswith("Caught ") or " in DataLoader worker process " not in message:
            raise
        raise type(error)(message.strip().splitlines()[-1].partition(": ")[2]) from error


def evenly_spread(data: datasets.Dataset, limit: int | None) -> datasets.Dataset:
    """At most `limit` rows, evenly spread, because many data sets are sorted by class.

    Raises:
        ValueError: `limit` is below 1.
    """
    if limit is None or limit >= len(data):
        return data
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}.")
    return data.select([number * len(data) // limit for number in range(limit)])
