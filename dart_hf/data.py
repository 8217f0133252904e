"""Where data enters: rows of a labelled image data set -> batches for a model."""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from transformers import BaseImageProcessor


class ImageClassificationCollator:
    """Turns rows with an image and a label into `pixel_values` (B, C, H, W) and `labels` (B,).

    Give it to `Trainer` as `data_collator`, with `remove_unused_columns=False` so that the images reach it.

    Args:
        image_processor: Prepares the images, all of a batch at once.
        num_labels: How many classes the model tells apart; labels must be 0 to `num_labels - 1`.
        image_column: The column of the images.
        label_column: The column of the labels.

    Raises:
        ValueError: A row lacks a column, or its label is not an integer in range. Checked here because a model on an
            accelerator would have to wait for the device, or crash in its loss.
    """

    def __init__(
        self,
        image_processor: BaseImageProcessor,
        num_labels: int,
        image_column: str = "image",
        label_column: str = "label",
    ) -> None:
        self.image_processor = image_processor
        self.num_labels = num_labels
        self.image_column = image_column
        self.label_column = label_column

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        labels = [self._label(row) for row in rows]
        images = [self._column(row, self.image_column) for row in rows]
        pixel_values = self.image_processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixel_values, "labels": torch.tensor(labels)}

    def _label(self, row: Mapping[str, Any]) -> int:
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
