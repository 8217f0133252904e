"""Load a DART model, or any model's configuration, from a folder or the Hub."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
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
from dart_hf.modeling.configuration_region import RegionConfig


def load_config(source: str | os.PathLike) -> PreTrainedConfig:
    """Load any model's configuration from a folder or the Hub.

    Raises:
        OSError: There is no such folder or model.
    """
    name = os.fspath(source)
    _check_source(name)
    with _hub_errors_explained(name):
        return AutoConfig.from_pretrained(name)


def load_dart_config(source: str | os.PathLike) -> RegionConfig:
    """Load a DART model's configuration from a folder or the Hub.

    Raises:
        OSError: There is no such folder or model.
        ValueError: The model is not a DART model.
    """
    config = load_config(source)
    if not isinstance(config, RegionConfig):
        raise ValueError(f"{os.fspath(source)!r} is a model of type {config.model_type!r}, not a DART model.")
    return config


def load_model(source: str | os.PathLike, needs_classifier: bool = True) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Load a DART model for evaluation and its image processor, onto the accelerator if there is one.

    Args:
        source: Folder written by `save_pretrained` or `dart-hf convert`, or a model's id on the Hub.
        needs_classifier: Refuse a model without a classifier.

    Raises:
        OSError: There is no such folder or model, or one of its files is missing or unreadable.
        ValueError: The model is not a DART model, has no classifier, or its weights do not fit its configuration.
    """
    name = os.fspath(source)
    config = load_dart_config(name)
    architecture = (config.architectures or ["an unknown class"])[0]
    is_classifier = architecture.endswith("ForImageClassification")
    if needs_classifier and not is_classifier:
        raise ValueError(f"{name!r} has no classifier: it is {architecture}.")
    _check_files(Path(name))
    auto_model = AutoModelForImageClassification if is_classifier else AutoModel
    try:
        with _hub_errors_explained(name):
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


def local_folder(source: str | os.PathLike) -> Path:
    """The folder of a DART model; one on the Hub is downloaded as a whole.

    Raises:
        OSError: There is no such folder or model, or the download fails.
        ValueError: The model is not a DART model.
    """
    if Path(source).is_dir():
        return Path(source)
    load_dart_config(source)
    with _hub_errors_explained(os.fspath(source)):
        return Path(snapshot_download(os.fspath(source)))


@contextmanager
def without_warnings() -> Iterator[None]:
    """Hide the models' warnings: for models with random weights, and for those that have given them before."""
    logger = logging.getLogger("dart_hf")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _check_source(name: str) -> None:
    """Raise an OSError if `name` is a file, a folder without a model, or the path of a folder that does not exist."""
    folder = Path(name)
    if folder.is_file():
        raise NotADirectoryError(f"{name!r} is a file; give the model's folder, or the id of a model on the Hub.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"The folder {name!r} holds no model: it has no config.json.")
    if not folder.is_dir() and (folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"There is no folder {name!r}.")


def _check_files(folder: Path) -> None:
    """Raise an OSError if `folder` exists and lacks a file that a model is loaded from."""
    if not folder.is_dir():
        return
    for program in ("model.onnx", "model.pt2"):
        if (folder / program).exists() and not any(folder.glob("*.safetensors")):
            raise OSError(f"The folder '{folder}' holds an exported program, {program}, not a PyTorch model.")
    if not any((folder / name).exists() for name in ("preprocessor_config.json", "processor_config.json")):
        raise OSError(
            f"The folder '{folder}' has no preprocessor_config.json: save the image processor of the model there, such "
            f"as DartImageProcessor().save_pretrained('{folder}')."
        )


@contextmanager
def _hub_errors_explained(name: str) -> Iterator[None]:
    """Turn the errors of a download into an OSError that says why it failed."""
    try:
        yield
    except (OSError, HTTPError) as error:
        if Path(name).is_dir():
            raise
        raise OSError(
            f"There is no folder {name!r}, and the Hub did not give a model of that name: {hub_reason(error)}."
        ) from error
