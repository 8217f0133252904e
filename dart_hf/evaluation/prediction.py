"""Classify image files with a model."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor


@dataclass(frozen=True)
class Answer:
    """A class name, and the probability that the model gives it."""

    label: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What a model says of an image file: its answers, the likeliest first."""

    image: str
    answers: list[Answer]


def predict(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    images: Sequence[str | os.PathLike],
    num_patches: int | None = None,
    top_k: int = 5,
    batch_size: int = 16,
    progress: bool = False,
) -> list[Prediction]:
    """Classify image files.

    Args:
        model, processor: As [`load_model`] gives them.
        num_patches: Token budget; the model's own without it.
        top_k: How many labels for each image, at most all that the model knows.
        batch_size: Images at a time. A model with `score_normalization="batch"` gets them one at a time, because its
            answers would depend on which images come together.
        progress: Whether to show a progress bar on a terminal.

    Raises:
        ValueError: An argument is out of range, or an image is no image.
        OSError: A file is missing or unreadable.
    """
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}.")
    if model.config.score_normalization == "batch":
        batch_size = 1
    names = model.config.id2label
    many_labels = model.config.problem_type == "multi_label_classification"
    predictions = []
    with tqdm(total=len(images), unit="image", disable=None if progress else True) as bar:
        for batch in _batches(images, batch_size):
            pixel_values = processor(batch, return_tensors="pt").pixel_values.to(model.device)
            with torch.inference_mode():
                logits = model(pixel_values, num_patches=num_patches).logits.float()
            probabilities = logits.sigmoid() if many_labels else logits.softmax(dim=-1)
            top = probabilities.topk(min(top_k, logits.shape[-1]))
            for image, values, indices in zip(batch, top.values.tolist(), top.indices.tolist(), strict=True):
                answers = [Answer(names[index], value) for index, value in zip(indices, values, strict=True)]
                predictions.append(Prediction(os.fspath(image), answers))
            bar.update(len(batch))
    return predictions


def _batches(images: Sequence[str | os.PathLike], size: int) -> Iterator[list[str | os.PathLike]]:
    for start in range(0, len(images), size):
        yield list(images[start : start + size])
