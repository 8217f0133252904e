"""Images without labels: from a folder or a list to batches for a student and its teacher."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
from torch.utils.data import Subset
from transformers import BaseImageProcessor

from dart_hf.data.collator import ImageClassificationCollator
from dart_hf.data.folders import folder_contents
from dart_hf.data.image_data import load_image_data
from dart_hf.data.seeded_rows import AUGMENTATION_SEED, combined_seed
from dart_hf.data.sources import BUILDERS, SAVED_DATA_SET

# More would make the comparison before and after slow, and not much more exact.
MOST_HELD_OUT = 500

Rows = Sequence[Mapping[str, Any]] | datasets.Dataset


def unlabelled_images(source: str | os.PathLike, subset: str | None = None) -> datasets.Dataset:
    """All images below a folder, whatever the names of the folders in it, or those of another source.

    Args:
        source: A folder of images; or what [`load_image_data`] reads, of which the split "train" is taken.
        subset: The subset, if the data set has several.

    Returns:
        A data set with the column `image`, undecoded.

    Raises:
        OSError: The source does not exist or cannot be downloaded.
        ValueError: It has no images.
    """
    root = Path(source)
    if root.is_dir() and not any((root / name).is_file() for name in SAVED_DATA_SET):
        contents = folder_contents(root)
        if contents.images:
            paths = [os.path.abspath(root / path) for path in contents.images]
            return datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image(decode=False))
        if not contents.other_files.keys() & BUILDERS.keys():
            raise ValueError(f"data: the folder {os.fspath(source)!r} has no images; any image files in it will do.")
    return load_image_data(source, subset=subset, needs_labels=False).train.select_columns("image")


def image_rows(images: str | os.PathLike | Sequence[Any] | datasets.Dataset) -> Rows:
    """The rows of a data set; a folder, or a list of images and paths, becomes rows with the column `image`."""
    if isinstance(images, (str, os.PathLike)):
        return unlabelled_images(images)
    if isinstance(images, datasets.Dataset):
        # Undecoded, so that an image that cannot be read is found and skipped later.
        is_image = isinstance(images.features.get("image"), datasets.Image)
        return images.cast_column("image", datasets.Image(decode=False)) if is_image else images
    return [image if isinstance(image, Mapping) else {"image": _undecoded(image)} for image in images]


def _undecoded(image: Any) -> Any:
    return {"path": os.fspath(image), "bytes": None} if isinstance(image, (str, os.PathLike)) else image


def split_rows(rows: Rows, held_out: float, seed: int = 0) -> tuple[Subset, Subset]:
    """Rows to learn from, and the share `held_out` of them to compare with, at least one and at most 500.

    Raises:
        ValueError: The share is not between 0 and 1, or there are fewer than two rows.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be above 0 and below 1, got {held_out}.")
    if len(rows) < 2:
        raise ValueError(f"data: at least two images are needed, one of them to compare with, got {len(rows)}.")
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    count = min(max(round(held_out * len(rows)), 1), len(rows) - 1, MOST_HELD_OUT)
    return Subset(rows, sorted(order[count:])), Subset(rows, sorted(order[:count]))


class FeatureCollator(ImageClassificationCollator):
    """Turns rows with an image into `pixel_values` and `teacher_pixel_values`, and draws a token budget.

    Both show the same part of the image. Images that cannot be read are left out with a warning; a training batch
    without any other has a black image.

    Args:
        image_processor, teacher_processor: Prepare the images for the student and for the teacher.
        budgets: `num_patches` of a training batch is one of them, chosen by the seeds of its rows.
    """

    def __init__(
        self, image_processor: BaseImageProcessor, teacher_processor: BaseImageProcessor, budgets: Sequence[int]
    ) -> None:
        super().__init__(image_processor, num_labels=0, label_column=None, skip_unreadable=True)
        self.teacher_processor = teacher_processor
        self.budgets = list(budgets)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        images = [image for row in rows if (image := self._image(row)) is not None]
        images = images or [PIL.Image.new("RGB", (32, 32))]
        batch: dict[str, Any] = {
            "pixel_values": self._prepared(self.image_processor, images),
            "teacher_pixel_values": self._prepared(self.teacher_processor, images),
        }
        seeds = [row[AUGMENTATION_SEED] for row in rows if AUGMENTATION_SEED in row]
        if seeds:
            batch["num_patches"] = self.budgets[combined_seed(*seeds) % len(self.budgets)]
        return batch

    def readable(self, rows: Rows) -> list[int]:
        """The numbers of the rows whose image can be read."""
        return [number for number in range(len(rows)) if self._image(rows[number]) is not None]

    @staticmethod
    def _prepared(image_processor: BaseImageProcessor, images: list[Any]) -> torch.Tensor:
        return image_processor(images, return_tensors="pt")["pixel_values"]
