"""Collator: rows of a data set -> a batch for a model.

The rows hold undecoded images, so that an unreadable one is found, named and, if the user wants that, skipped here.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import datasets
import PIL.Image
import torch
from transformers import BaseImageProcessor
from transformers.utils import logging

from dart_hf.data.seeded_rows import AUGMENTATION_SEED, combined_seed, seeded
from dart_hf.modeling.image_processing_dart import READING_ERRORS, upright_rgb

logger = logging.get_logger(__name__)

# The label of an image that could not be read: PyTorch's cross entropy and the metrics leave it out.
IGNORED_LABEL = -100
NUM_COUNTERS = 64
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")


class ImageClassificationCollator:
    """Turns rows with an image and a label into `pixel_values` (B, C, H, W) and `labels`.

    Give it to `Trainer` as `data_collator`, with `remove_unused_columns=False` so that the images reach it. It augments
    the rows of [`SeededRows`] and [`SeededStream`], and prepares all others as for evaluation.

    Args:
        image_processor: Prepares the images of a batch together.
        num_labels: Number of classes of the model; labels must be 0 to `num_labels - 1`. In a regression, number of
            values for an image.
        image_column: The column of the images, decoded or not.
        label_column: The column of the labels; None for batches without labels.
        transform: Augments a training image: PIL image -> (C, H, W). Without it, training images are prepared as for
            evaluation.
        mix: Mixes a training batch: `pixel_values`, `labels` (B,) -> `pixel_values`, targets (B, num_labels).
        skip_unreadable: Skip an image that cannot be read instead of raising an error. A training batch is
            then smaller. In an evaluation batch, and in a training batch without any readable image, the image stays
            with a label that says so, see below. `num_skipped` counts the skipped images.
        problem_type: "single_label_classification" (a label is an integer), "multi_label_classification" (a list of
            integers) or "regression" (a number or a list of numbers), as in transformers' configurations.

    Returns (as a callable):
        `pixel_values` and `labels`. The labels are, by problem type: (B,) of int64, or (B, num_labels) of float32 if
        they are mixed; (B, num_labels) of float32, 0 or 1; (B,) or (B, num_labels) of float32. The labels of an image
        that could not be read are -100, in a regression NaN; [`is_labelled`] finds the others.

    Raises:
        ValueError: A row has no such column, its label is no label of the problem type or out of range, or `mix` is
            given for another problem type than the first. The labels are checked here, because a model on an
            accelerator would have to wait for the device, or crash in its loss.
        OSError: An image cannot be read and `skip_unreadable` is false.
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
        problem_type: str = "single_label_classification",
    ) -> None:
        if problem_type not in PROBLEM_TYPES:
            raise ValueError(f"problem_type must be one of {', '.join(PROBLEM_TYPES)}, got {problem_type!r}.")
        if mix is not None and problem_type != "single_label_classification":
            raise ValueError(
                f"mixup, cutmix and label smoothing need one class for each image; the labels are for {problem_type}."
            )
        self.image_processor = image_processor
        self.num_labels = num_labels
        self.image_column = image_column
        self.label_column = label_column
        self.transform = transform
        self.mix = mix
        self.skip_unreadable = skip_unreadable
        self.problem_type = problem_type
        # One counter for each worker process, in shared memory.
        self._skipped = torch.zeros(NUM_COUNTERS, dtype=torch.int64).share_memory_()

    @property
    def num_skipped(self) -> int:
        """The number of unreadable images skipped so far. An image counts each time."""
        return int(self._skipped.sum())

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        labels = [self._label(row) for row in rows]
        images = [self._image(row) for row in rows]
        seeds = [row.get(AUGMENTATION_SEED) for row in rows]
        if None in seeds:
            return self._evaluation_batch(images, labels)
        readable = [image is not None for image in images]
        if not any(readable):
            # A batch of the same shape that has no weight in the loss.
            batch = self._evaluation_batch(images, labels)
            if self.mix is not None:
                batch["labels"] = torch.full((len(labels), self.num_labels), float(IGNORED_LABEL))
            return batch
        images, labels, seeds = (
            [entry for entry, keep in zip(entries, readable, strict=True) if keep]
            for entries in (images, labels, seeds)
        )
        return self._training_batch(images, labels, seeds)

    def _evaluation_batch(self, images: list[Any], labels: list[Any]) -> dict[str, torch.Tensor]:
        unreadable = [row for row, image in enumerate(images) if image is None]
        images = [PIL.Image.new("RGB", (32, 32)) if image is None else image for image in images]
        batch = {"pixel_values": self.image_processor(images, return_tensors="pt")["pixel_values"]}
        if self.label_column is not None:
            batch["labels"] = self._targets(labels)
            batch["labels"][unreadable] = math.nan if self.problem_type == "regression" else IGNORED_LABEL
        return batch

    def _training_batch(self, images: list[Any], labels: list[Any], seeds: list[int]) -> dict[str, torch.Tensor]:
        batch = self._evaluation_batch(images, labels) if self.transform is None else self._augmented(images, seeds)
        targets = self._targets(labels)
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

    def _targets(self, labels: list[Any]) -> torch.Tensor:
        """Labels as [`_label`] gives them -> the tensor for the loss."""
        if self.problem_type == "single_label_classification":
            return torch.tensor(labels)
        if self.problem_type == "regression":
            return torch.tensor(labels, dtype=torch.float32)
        targets = torch.zeros(len(labels), self.num_labels)
        for row, classes in enumerate(labels):
            targets[row, classes] = 1
        return targets

    def _image(self, row: Mapping[str, Any]) -> Any:
        """The image, a PIL image in RGB or an array; None if it cannot be read and is to be skipped."""
        image = self._column(row, self.image_column)
        if image is not None and not isinstance(image, (Mapping, PIL.Image.Image)):
            return image
        undecoded = isinstance(image, Mapping)
        name = image.get("path") if undecoded else getattr(image, "filename", None)
        try:
            if image is None:
                raise ValueError(f"its row has nothing in column {self.image_column!r}")
            return upright_rgb(datasets.Image().decode_example(image) if undecoded else image)
        except READING_ERRORS as error:
            message = f"The image {repr(name) if name else 'that has no file name'} cannot be read: {_reason(error)}"
            if not self.skip_unreadable:
                raise OSError(f"{message}; skip_unreadable=True (--skip-unreadable) leaves it out.") from error
        logger.warning(f"{message}; it is skipped.")
        worker = torch.utils.data.get_worker_info()
        self._skipped[0 if worker is None else 1 + worker.id % (NUM_COUNTERS - 1)] += 1
        return None

    def _label(self, row: Mapping[str, Any]) -> Any:
        """A class, a list of classes, a number or a list of numbers, by problem type."""
        if self.label_column is None:
            return IGNORED_LABEL
        label = self._column(row, self.label_column)
        if self.problem_type == "single_label_classification":
            return self._class(label)
        if self.problem_type == "multi_label_classification":
            if not isinstance(label, (list, tuple)):
                raise ValueError(f"A label must be a list of classes, got {label!r} in column {self.label_column!r}.")
            return [self._class(each) for each in label]
        values = label if isinstance(label, (list, tuple)) else [label]
        if len(values) != self.num_labels or not all(isinstance(each, Real) and math.isfinite(each) for each in values):
            expected = "one finite number" if self.num_labels == 1 else f"{self.num_labels} finite numbers"
            raise ValueError(f"A label must be {expected}, got {label!r} in column {self.label_column!r}.")
        return label

    def _class(self, label: Any) -> int:
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


def is_labelled(labels: torch.Tensor) -> torch.Tensor:
    """A mask (B,) of the images that have a label: [`ImageClassificationCollator`] could read them.

    Args:
        labels: (B,) or (B, K), as the collator makes them for any problem type.
    """
    rows = labels.reshape(len(labels), -1)
    if labels.is_floating_point() and labels.ndim == 1:
        return ~labels.isnan()
    return ~((rows == IGNORED_LABEL).all(dim=1) | rows.isnan().any(dim=1))


def _reason(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].removesuffix(".") or type(error).__name__
