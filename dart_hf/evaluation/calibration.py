"""Calibrate a model's scores: take their running statistics from images, without training.

This turns the score normalisation of a converted checkpoint from "batch" to "running".
"""

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import BaseImageProcessor, PreTrainedModel

from dart_hf.data.batches import evenly_spread, image_batches
from dart_hf.data.collator import IGNORED_LABEL, ImageClassificationCollator
from dart_hf.data.image_data import load_image_data
from dart_hf.files import atomic_folder, check_output_folder
from dart_hf.hub.loading import load_model
from dart_hf.modeling.score_statistics import batch_moments


@dataclass
class Calibration:
    """Statistics of the scores of some images, before they are standardised.

    Args:
        mean, variance: Over the cells of all images; the variance is the unbiased one.
        num_images, num_cells: Number of images and cells that were used.
        num_unusable: Number of images that were left out because their scores are constant, infinite or NaN.
        num_unreadable: Number of images that could not be read and were skipped.
    """

    mean: float = 0.0
    variance: float = 0.0
    num_images: int = 0
    num_cells: int = 0
    num_unusable: int = 0
    num_unreadable: int = 0

    def add(self, logits: torch.Tensor, usable: torch.Tensor) -> None:
        """Add a batch.

        The moments of the parts give exactly the moments of the whole (Chan, Golub and LeVeque 1979).

        Args:
            logits: (B, G, G) in float64.
            usable: (B,) whether an image is used.
        """
        images = usable.sum().item()
        self.num_unusable += len(usable) - images
        if not images:
            return
        usable = usable[:, None, None]
        mean, variance, _ = (moment.item() for moment in batch_moments(logits.where(usable, 0), usable))
        cells, before = images * logits[0].numel(), self.num_cells
        shift = mean - self.mean
        squares = self.variance * max(before - 1, 0) + variance * max(cells - 1, 0)
        squares += shift**2 * before * cells / (before + cells)
        self.num_images += images
        self.num_cells += cells
        self.mean += shift * cells / self.num_cells
        self.variance = squares / max(self.num_cells - 1, 1)


def calibrate_scores(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    images: datasets.Dataset,
    batch_size: int = 32,
    skip_unreadable: bool = False,
    workers: int = 0,
    progress: bool = False,
) -> Calibration:
    """Set a model's running score statistics to those of some images, and let the model use them.

    Mean and variance are those of one batch of all the images, for any `batch_size`. The model's
    `config.score_normalization` becomes `"running"`.

    Args:
        model: A DART model with any score normalisation; it is put in evaluation mode.
        image_processor: Prepares the images.
        images: Column `image`; others are not read.
        batch_size: Images in a batch.
        skip_unreadable: Leave out images that cannot be read, instead of raising.
        workers: Number of processes that read images besides this one.
        progress: Show a progress bar on a terminal.

    Raises:
        ValueError: The model does not use its scores, its scorer has no weights, or no image has usable scores.
        OSError: An image cannot be read.
    """
    if not len(images):
        raise ValueError("There is nothing to calibrate with: the data has no images.")
    if model.config.partition == "uniform":
        raise ValueError("A model with partition='uniform' does not use its scores: there is nothing to calibrate.")
    model.require_scorer_weights()
    model.eval()
    collate = ImageClassificationCollator(image_processor, num_labels=1, skip_unreadable=skip_unreadable)
    calibration, num_batches = Calibration(), 0
    for batch in image_batches(images, functools.partial(_collate_unlabelled, collate), batch_size, workers, progress):
        readable = batch["labels"] != IGNORED_LABEL
        calibration.num_unreadable += int((~readable).sum())
        if readable.any():
            calibration.add(*raw_scores(model, batch["pixel_values"][readable].to(model.device)))
            num_batches += 1
    if not calibration.num_images:
        raise ValueError(f"None of the {len(images)} images gives scores to calibrate with.")

    statistics = model.scorer.statistics
    statistics.running_mean.fill_(calibration.mean)
    statistics.running_var.fill_(calibration.variance)
    statistics.num_batches_tracked.fill_(num_batches)
    model.config.score_normalization = "running"
    return calibration


@torch.inference_mode()
def raw_scores(model: PreTrainedModel, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores of images (B, C, H, W) before they are standardised.

    Returns:
        Logits (B, G, G) in float64 on the CPU, and which images are usable (B,): their logits are neither constant,
        infinite nor NaN.
    """
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    hook = model.scorer.statistics.register_forward_hook(lambda _, given, result: seen.append((given[0], result)))
    before, model.config.score_normalization = model.config.score_normalization, "image"
    try:
        model.score(pixel_values)
    finally:
        model.config.score_normalization = before
        hook.remove()
    ((logits, standardized),) = seen
    # Unusable scores are standardised to zeros. Usable ones have at least two cells that differ from the mean.
    return logits.cpu().double(), standardized.cpu().flatten(1).any(dim=1)


def _collate_unlabelled(
    collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, torch.Tensor]], rows: Sequence[Mapping[str, Any]]
) -> dict[str, torch.Tensor]:
    """A batch of images without labels: the collator marks those that cannot be read, the others get the label 0."""
    return collate([{"image": row["image"], "label": 0} for row in rows])


def calibrate_model(
    source: str | os.PathLike,
    data: str | os.PathLike,
    output: str | os.PathLike,
    subset: str | None = None,
    split: str = "train",
    limit: int | None = None,
    batch_size: int = 32,
    skip_unreadable: bool = False,
    workers: int = 0,
    progress: bool = False,
) -> Calibration:
    """Load a model, calibrate its scores on a data set, and save it with its `training.json`, but without the metrics.

    Args:
        source: The model, as for [`load_model`]. It needs no classifier.
        data, subset: The images, as for [`load_image_data`]. They need no labels.
        output: Folder to write. It must be new or empty, and appears complete or not at all.
        split: Split of the data. The images that the model learned from give the statistics of its training.
        limit: Use at most this many images, evenly spread over the data set.
        batch_size, skip_unreadable, workers, progress: As for [`calibrate_scores`].

    Raises:
        ValueError: An argument is out of range, the data has no such split or no images, or see [`calibrate_scores`].
        OSError: Model, data or an image cannot be read, or `output` is in use.
    """
    output = Path(output)
    check_output_folder(output)
    model, image_processor = load_model(source, needs_classifier=False)
    images = load_image_data(data, subset, train_split=split, needs_labels=False).train
    images = evenly_spread(images, limit)
    calibration = calibrate_scores(model, image_processor, images, batch_size, skip_unreadable, workers, progress)
    record = Path(source) / "training.json"
    with atomic_folder(output) as folder:
        model.save_pretrained(folder)
        image_processor.save_pretrained(folder)
        if record.is_file():
            # The metrics were measured with the old statistics.
            facts = {name: fact for name, fact in json.loads(record.read_text()).items() if name != "metrics"}
            (folder / record.name).write_text(json.dumps(facts, indent=2) + "\n")
    return calibration
