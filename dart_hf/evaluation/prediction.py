"""Predict the labels of image files."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
import torch
from tqdm import tqdm
from transformers import BaseImageProcessor, PreTrainedModel

from dart_hf.data.folders import folder_contents
from dart_hf.evaluation.classification import problem_type_of
from dart_hf.evaluation.metrics import LABEL_THRESHOLD
from dart_hf.modeling.image_processing_dart import read_image

# How many classes are named for an image unless the caller asks for another number.
DEFAULT_TOP_K = 5


@dataclass(frozen=True)
class Answer:
    """The name of a class, and the probability that the model gives it."""

    label: str
    probability: float


@dataclass(frozen=True)
class Estimate:
    """The name of a number in a regression, and its value."""

    label: str
    value: float


@dataclass(frozen=True)
class Prediction:
    """The answers of a model for an image file.

    Args:
        image: The file.
        answers: Classes, the likeliest first; for a regression the numbers. Empty if the file cannot be read, or if no
            label of a multi-label model is likely.
        error: Why the file cannot be read, or None.
    """

    image: str
    answers: list[Answer] | list[Estimate]
    error: str | None = None

    def lines(self) -> Iterator[str]:
        """The prediction as lines of text."""
        yield self.image
        for answer in self.answers:
            number = f"{answer.probability:8.1%}" if isinstance(answer, Answer) else f"{answer.value:10.5g}"
            yield f"{number}  {answer.label}"
        if self.error is None and not self.answers:
            yield f"no label above {LABEL_THRESHOLD:.0%}"


def predict(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    images: Sequence[str | os.PathLike],
    num_patches: int | None = None,
    top_k: int | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> list[Prediction]:
    """Predict the labels of image files. A file that cannot be read has an error in place of answers.

    Args:
        model, processor: As [`load_model`] returns them.
        images: The files; [`image_files`] finds those in folders.
        num_patches: Token budget; by default the model's own.
        top_k: How many classes to name for each image, at most all. By default the five likeliest; for a multi-label
            model all with a probability above 0.5. Not for a regression, which always returns all numbers.
        batch_size: Images in a batch. A model with `score_normalization="batch"` gets single images, because its
            answers would depend on the other images of a batch.
        progress: Show a progress bar on a terminal.

    Returns:
        A prediction for each file, in the order of `images`.

    Raises:
        ValueError: An argument is out of range.
    """
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}.")
    if model.config.score_normalization == "batch":
        batch_size = 1
    names, task = model.config.id2label, problem_type_of(model)
    predictions = []
    with tqdm(total=len(images), unit="image", disable=None if progress else True) as bar:
        for paths in _batches(images, batch_size):
            read = [_read(path) for path in paths]
            readable = [image for image in read if not isinstance(image, str)]
            rows = iter(())
            if readable:
                pixel_values = processor(readable, return_tensors="pt").pixel_values.to(model.device)
                with torch.inference_mode():
                    rows = iter(model(pixel_values, num_patches=num_patches).logits.float().cpu())
            for path, image in zip(map(os.fspath, paths), read, strict=True):
                if isinstance(image, str):
                    predictions.append(Prediction(path, [], image))
                else:
                    predictions.append(Prediction(path, _answers(next(rows), names, task, top_k)))
            bar.update(len(paths))
    return predictions


def image_files(paths: Iterable[str | os.PathLike]) -> list[Path]:
    """The image files that paths name: files as they are, and for a folder all images below it.

    Raises:
        FileNotFoundError: A path does not exist.
        ValueError: A folder has no images.
    """
    files = []
    for path in map(Path, paths):
        if path.is_file():
            files.append(path)
            continue
        if not path.is_dir():
            raise FileNotFoundError(f"There is no image file or folder {str(path)!r}.")
        found = [path / image for image in folder_contents(path).images]
        if not found:
            raise ValueError(f"The folder {str(path)!r} has no images.")
        files += found
    return files


def _batches(images: Sequence[str | os.PathLike], size: int) -> Iterator[Sequence[str | os.PathLike]]:
    for start in range(0, len(images), size):
        yield images[start : start + size]


def _read(path: str | os.PathLike) -> PIL.Image.Image | str:
    """The image, or why it cannot be read."""
    try:
        return read_image(path)
    except (OSError, ValueError) as error:
        return str(error)


def _answers(
    logits: torch.Tensor, names: dict[int, str], task: str, top_k: int | None
) -> list[Answer] | list[Estimate]:
    """Logits (num_labels,) -> answers."""
    if task == "regression":
        return [Estimate(names[index], value) for index, value in enumerate(logits.tolist())]
    several = task == "multi_label_classification"
    probabilities = logits.sigmoid() if several else logits.softmax(dim=0)
    count = len(logits) if several else DEFAULT_TOP_K
    values, indices = probabilities.topk(min(count if top_k is None else top_k, len(logits)))
    answers = [Answer(names[index], value) for index, value in zip(indices.tolist(), values.tolist(), strict=True)]
    if several and top_k is None:
        answers = [answer for answer in answers if answer.probability > LABEL_THRESHOLD]
    return answers
