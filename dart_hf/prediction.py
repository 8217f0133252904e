"""Load a model from a folder or the Hub, classify image files with it, and draw where it looks."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.image_processing_utils import BaseImageProcessor

from dart_hf.hub_errors import hub_reason
from dart_hf.modeling.configuration_dart import RegionConfig
from dart_hf.pictures import checked_picture_path, draw_regions, save_figure


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


def checked_source(source: str | os.PathLike) -> str:
    """The name of a model's folder or its id on the Hub, as `from_pretrained` takes it.

    Raises:
        OSError: It is a file, a folder without a model, or a path of which there is no folder.
    """
    name = os.fspath(source)
    folder = Path(name)
    if folder.is_file():
        raise NotADirectoryError(f"{name!r} is a file; give the model's folder, or the id of a model on the Hub.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"The folder {name!r} holds no model: it has no config.json.")
    if not folder.is_dir() and (folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"There is no folder {name!r}.")
    return name


def load_config(source: str | os.PathLike) -> PreTrainedConfig:
    """Load any model's configuration from a folder or the Hub.

    Raises:
        OSError: There is no such folder or model.
    """
    name = checked_source(source)
    with _explained(name):
        return AutoConfig.from_pretrained(name)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """What the libraries raise when the Hub does not give a model, as an OSError that says why."""
    try:
        yield
    except (OSError, HTTPError) as error:
        if Path(name).is_dir():
            raise
        raise OSError(
            f"There is no folder {name!r}, and no such model could be had from the Hub: {hub_reason(error)}."
        ) from error


def load_dart_config(source: str | os.PathLike) -> RegionConfig:
    """Load a DART model's configuration from a folder or the Hub.

    Raises:
        OSError: There is no such folder or model.
        ValueError: It is no DART model.
    """
    config = load_config(source)
    if not isinstance(config, RegionConfig):
        raise ValueError(f"{os.fspath(source)!r} is a model of type {config.model_type!r}, not a DART model.")
    return config


def load_model(source: str | os.PathLike, needs_classifier: bool = True) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Load a DART model for evaluation, and its image processor, onto the accelerator if there is one.

    Args:
        source: Folder written by `save_pretrained` or `dart-hf convert`, or a model's id on the Hub.
        needs_classifier: Whether to refuse a model without one.

    Raises:
        OSError: There is no such folder or model, or a file of it is missing or unreadable.
        ValueError: It is no DART model, has no classifier, or its weights and its configuration differ.
    """
    name = os.fspath(source)
    config = load_dart_config(name)
    architecture = (config.architectures or ["an unknown class"])[0]
    classifies = architecture.endswith("ForImageClassification")
    if needs_classifier and not classifies:
        raise ValueError(f"{name!r} has no classifier: it is {architecture}.")
    _check_files(Path(name))
    auto_model = AutoModelForImageClassification if classifies else AutoModel
    try:
        with _explained(name):
            processor = AutoImageProcessor.from_pretrained(name)
            model, loading = auto_model.from_pretrained(name, output_loading_info=True)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"The weights of {name!r} are damaged or do not fit its config.json.") from error
    for problem in ("missing", "unexpected"):
        keys = sorted(loading[f"{problem}_keys"])
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(
                f"The weights of {name!r} do not fit its config.json: {problem} {', '.join(keys[:3])}{more}."
            )
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.to(device).eval(), processor


def _check_files(folder: Path) -> None:
    """Raise an OSError if this is a folder that lacks what a model is loaded from."""
    if not folder.is_dir():
        return
    for program in ("model.onnx", "model.pt2"):
        if (folder / program).exists() and not any(folder.glob("*.safetensors")):
            raise OSError(f"The folder '{folder}' holds an exported program, {program}, not a model of PyTorch.")
    if not (folder / "preprocessor_config.json").exists():
        raise OSError(
            f"The folder '{folder}' has no preprocessor_config.json: save an image processor there, such as "
            f"DartImageProcessor().save_pretrained('{folder}')."
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Without what the models warn of: known already, or true of random weights only."""
    logger = logging.getLogger("dart_hf")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


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


def visualize(
    image: str | os.PathLike,
    source: str | os.PathLike,
    output: str | os.PathLike,
    num_patches: int | None = None,
    with_scores: bool = False,
) -> Path:
    """Draw the regions of a model's tokens over an image file.

    Args:
        image: The file.
        source: The model, as for [`load_model`]. It needs no classifier.
        output: Picture to write, in the format that its name ends in.
        num_patches: Token budget; the model's own without it.
        with_scores: Whether to draw the density beside the image.

    Returns:
        `output` as a path.

    Raises:
        ValueError: An argument is out of range, the image is no image, or the format is unknown.
        OSError: A file is missing or unreadable.
    """
    output = checked_picture_path(output)
    model, processor = load_model(source, needs_classifier=False)
    pixel_values = processor(image, return_tensors="pt").pixel_values
    with torch.inference_mode():
        outputs = model(pixel_values.to(model.device), num_patches=num_patches, output_regions=True)
    figure = draw_regions(
        pixel_values,
        outputs.regions,
        titles=[Path(image).name],
        with_scores=with_scores,
        image_mean=processor.image_mean,
        image_std=processor.image_std,
    )
    return save_figure(figure, output)
