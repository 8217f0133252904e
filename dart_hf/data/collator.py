"""Rows -> batches for a model.

Rows hold undecoded images, so that a damaged one is met, named and, by choice, skipped here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import datasets
import PIL.Image
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import BaseImageProcessor
from transformers.utils import logging

from dart_hf.data.augmentation import AUGMENTATION_SEED, combined_seed, seeded

logger = logging.get_logger(__name__)

# The label of an image that could not be read: PyTorch's cross entropy and the metrics leave it out.
IGNORED_LABEL = -100
# What a damaged image file makes PIL raise.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, PIL.Image.DecompressionBombError)
NUM_COUNTERS = 64


class ImageClassificationCollator:
    """Turns rows with an image and a label into `pixel_values` (B, C, H, W) and `labels`.

    Give it to `Trainer` as `data_collator`, with `remove_unused_columns=False` so that the images reach it. Rows of
    [`SeededRows`] and [`SeededStream`] are augmented, others are prepared for evaluation.

    Args:
        image_processor: Prepares the images, all of a batch at once.
        num_labels: How many classes the model tells apart; labels must be 0 to `num_labels - 1`.
        image_column: The column of the images, decoded or not.
        label_column: The column of the labels; None for batches without labels.
        transform: Augments a training image: PIL image -> (C, H, W). Without it training images are prepared like
            others.
        mix: Mixes a training batch: `pixel_values`, `labels` (B,) -> `pixel_values`, targets (B, num_labels).
        skip_unreadable: What to do with an image that cannot be read: leave it out of a training batch, and label it
            -100, which losses and metrics ignore, in any other and where it is alone; or raise. `num_skipped` counts
            them.

    Returns (as a callable):
        `pixel_values`; `labels` (B,) of int64, or (B, num_labels) of float32 where they are mixed.

    Raises:
        ValueError: A row lacks a column, or its label is not an integer in range. Checked here because a model on an
            accelerator would have to wait for the device, or crash in its loss.
        OSError: An image cannot be read, and none is to be skipped.
    """

    def __init__(
        self,
        image_processor: BaseImageProcessor,
        num_labels: int,
        image_column: str = "image",
        label_column: str | None = "label",
        transform: Callable[[PIL.Image.Image], torch.Tensor] | None = None,
        mix: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
        skip_unreadable: bool = False,
    ) -> None:
        self.image_processor = image_processor
        self.num_labels = num_labels
        self.image_column = image_column
        self.label_column = label_column
        self.transform = transform
        self.mix = mix
        self.skip_unreadable = skip_unreadable
        # One counter for each worker process, in memory that they share.
        self._skipped = torch.zeros(NUM_COUNTERS, dtype=torch.int64).share_memory_()

    @property
    def num_skipped(self) -> int:
        """How many unreadable images were skipped so far, counted each time."""
        return int(self._skipped.sum())

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        labels = [self._label(row) for row in rows]
        images = [self._image(row) for row in rows]
        seeds = [row.get(AUGMENTATION_SEED) for row in rows]
        if None in seeds:
            return self._evaluation_batch(images, labels)
        readable = [image is not None for image in images]
        if not any(readable):
            # Of the same form, and without weight in the loss.
            batch = self._evaluation_batch(images, labels)
            if self.mix is not None:
                batch["labels"] = torch.full((len(labels), self.num_labels), float(IGNORED_LABEL))
            return batch
        images, labels, seeds = (
            [entry for entry, keep in zip(entries, readable, strict=True) if keep]
            for entries in (images, labels, seeds)
        )
        return self._training_batch(images, labels, seeds)

    def _evaluation_batch(self, images: list[Any], labels: list[int]) -> dict[str, torch.Tensor]:
        labels = [IGNORED_LABEL if image is None else label for image, label in zip(images, labels, strict=True)]
        images = [PIL.Image.new("RGB", (32, 32)) if image is None else image for image in images]
        batch = {"pixel_values": self.image_processor(images, return_tensors="pt")["pixel_values"]}
        return batch if self.label_column is None else {**batch, "labels": torch.tensor(labels)}

    def _training_batch(self, images: list[Any], labels: list[int], seeds: list[int]) -> dict[str, torch.Tensor]:
        batch = self._evaluation_batch(images, labels) if self.transform is None else self._augmented(images, seeds)
        targets = torch.tensor(labels)
        if self.mix is not None:
            with seeded(combined_seed(*seeds)):
                batch["pixel_values"], targets = self.mix(batch["pixel_values"], targets)
        pixel_values = batch["pixel_values"].contiguous(memory_format=torch.channels_last)
        return {"pixel_values": pixel_values, "labels": targets}

    def _augmented(self, images: list[Any], seeds: list[int]) -> dict[str, torch.Tensor]:
        augmented = []
        for image, seed in zip(images, seeds, strict=True):
            with seeded(seed):
                augmented.append(self.transform(image))
        return {"pixel_values": torch.stack(augmented)}

    def _image(self, row: Mapping[str, Any]) -> Any:
        """The image decoded, or None if it cannot be and is to be skipped."""
        image = self._column(row, self.image_column)
        if not isinstance(image, Mapping):
            return image
        try:
            return datasets.Image().decode_example(image)
        except DECODING_ERRORS as error:
            name = repr(image["path"]) if image.get("path") else "that has no file name"
            message = f"The image {name} cannot be read: {_first_line(error)}"
            if not self.skip_unreadable:
                raise OSError(f"{message}; skip_unreadable=True (--skip-unreadable) leaves it out.") from error
        logger.warning(f"{message}; it is skipped.")
        worker = torch.utils.data.get_worker_info()
        self._skipped[0 if worker is None else 1 + worker.id % (NUM_COUNTERS - 1)] += 1
        return None

    def _label(self, row: Mapping[str, Any]) -> int:
        if self.label_column is None:
            return IGNORED_LABEL
        label = self._column(row, self.label_column)
        if isinstance(label, bool) or not isinstance(label, Integral):
            raise ValueError(f"A label must be an integer, got {label!r} in column {self.label_column!r}.")
        if not 0 <= label < self.num_labels:
            raise ValueError(
                f"Label {label} in column {self.label_column!r} is out of range: the model has {self.num_labels} "
                f"classes, so labels go from 0 to {self.num_labels - 1}."
            )
        return int(label)

    @staticmethod
    def _column(row: Mapping[str, Any], name: str) -> Any:
        if name not in row:
            raise ValueError(f"A row has no column {name!r}; it has {', '.join(map(repr, row))}.")
        return row[name]


@contextmanager
def without_worker_traceback() -> Iterator[None]:
    """Raise what a `DataLoader`'s worker process raised as if it had happened here, in its own one sentence."""
    try:
        yield
    except (ValueError, OSError) as error:
        message = str(error)
        if not message.startswith("Caught ") or " in DataLoader worker process " not in message:
            raise
        raise type(error)(message.strip().splitlines()[-1].partition(": ")[2]) from error


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
        collate: Rows -> a batch.
        batch_size: Rows at a time; the last batch can be smaller.
        workers: Processes that make batches besides this one.
        progress: Whether to show a progress bar on a terminal.

    Raises:
        ValueError, OSError: What `collate` raises, from a worker too in its own words.
    """
    loader = DataLoader(data, batch_size=batch_size, collate_fn=collate, num_workers=workers)
    with (
        without_worker_traceback(),
        tqdm(total=len(data), unit="image", leave=False, disable=None if progress else True) as bar,
    ):
        for batch in loader:
            yield batch
            bar.update(len(batch["pixel_values"]))


def evenly_spread(data: datasets.Dataset, limit: int | None) -> datasets.Dataset:
    """At most `limit` rows, evenly spread: data sets often have one class after the other."""
    if limit is None or limit >= len(data):
        return data
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}.")
    return data.select([number * len(data) // limit for number in range(limit)])


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
