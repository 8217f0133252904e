"""A working folder with images, data sets and models, and a function that runs a command in it."""

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import datasets
import pytest
from helpers.tiny_models import tiny_classifier
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage import data
from transformers.utils import logging
from typer.testing import CliRunner, Result

from dart_hf import DartForImageClassification, DartImageProcessor, DartModel
from dart_hf.cli.main import app

LABELS = ["cup", "cat", "rocket"]


@pytest.fixture(scope="module")
def model() -> DartForImageClassification:
    return tiny_classifier(LABELS, image_size=64)


@pytest.fixture(scope="module")
def processor() -> DartImageProcessor:
    return DartImageProcessor(size=64, crop_size=64)


@pytest.fixture(scope="module")
def made_folder(tmp_path_factory: pytest.TempPathFactory, model, processor) -> Path:
    """Images, data sets of them, the model `model`, and unusable ones. Tests write elsewhere."""
    folder = tmp_path_factory.mktemp("folder")
    Image.fromarray(data.coffee()).save(folder / "cup.png")
    Image.fromarray(data.chelsea()).save(folder / "cat.png")
    (folder / "half.png").write_bytes((folder / "cup.png").read_bytes()[:5000])
    (folder / "text.png").write_text("not an image")
    for split, label, number in product(("train", "test"), ("Cat", "cup"), range(2)):
        (folder / "photos" / split / label).mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / f"{label.lower()}.png", folder / "photos" / split / label / f"{number}.png")
    for name in ("damaged", "other"):
        shutil.copytree(folder / "photos", folder / name)
    shutil.copy(folder / "half.png", folder / "damaged" / "test" / "cup" / "5.png")
    (folder / "other" / "test" / "dog").mkdir()
    shutil.copy(folder / "cup.png", folder / "other" / "test" / "dog" / "0.png")
    for name in ("model", "incomplete", "too-large", "unprepared", "program"):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    weights = load_file(folder / "model" / "model.safetensors")
    bias = weights.pop("classifier.bias")
    save_file(weights, folder / "incomplete" / "model.safetensors")
    save_file({**weights, "classifier.bias": bias, "extra": bias.clone()}, folder / "too-large" / "model.safetensors")
    (folder / "unprepared" / "preprocessor_config.json").unlink()
    (folder / "program" / "model.safetensors").rename(folder / "program" / "model.onnx")
    (folder / "empty").mkdir()
    (folder / "vit").mkdir()
    (folder / "vit" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    DartModel(model.config).save_pretrained(folder / "encoder")
    processor.save_pretrained(folder / "encoder")
    return folder


@pytest.fixture
def folder(made_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`made_folder` as the working folder."""
    monkeypatch.chdir(made_folder)
    return made_folder


@pytest.fixture
def run() -> Iterator[Callable[..., Result]]:
    """A function that runs `dart-hf` with arguments. Afterwards messages and progress bars are as before."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    runner = CliRunner()
    yield lambda *given: runner.invoke(app, [*map(str, given)], prog_name="dart-hf", catch_exceptions=False)
    logging.set_verbosity(verbosity)
    (logging.enable_progress_bar if bar else logging.disable_progress_bar)()
    datasets.enable_progress_bars()
