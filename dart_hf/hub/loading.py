"""Load a model from a folder or the Hub."""

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
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


def located(source: str) -> str:
    """The full path of what exists here, so that it is found again and not mistaken for a name on the Hub."""
    return str(Path(source).resolve()) if Path(source).exists() else source


def weights_digest(folder: Path) -> str:
    """SHA-256 of the weights in a model's folder: of its `model*.safetensors` files, one after the other by name.

    Raises:
        FileNotFoundError: It has none.
    """
    paths = sorted(folder.glob("model*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"The folder {folder} holds no weights: it has no model.safetensors.")
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()
