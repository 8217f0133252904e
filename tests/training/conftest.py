"""Folders of images and models that the tests of `dart-hf train` share. Not to be written to."""

import json
from pathlib import Path

import pytest
import torch
from helpers.tiny_training import write_photos
from helpers.train_command import CONFIG, SIDE, SMALL

from dart_hf import DartConfig, DartForImageClassification, DartImageProcessor


@pytest.fixture(scope="session")
def few(tmp_path_factory) -> Path:
    """A folder with four pictures of each of three classes, and no splits."""
    return write_photos(tmp_path_factory.mktemp("few"), 12, 0) / "train"


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(CONFIG))
    return path


@pytest.fixture(scope="session")
def digits_model(tmp_path_factory) -> Path:
    """A model that knows the digits 2, 1, 0, in this order, with the published normalisation."""
    folder = tmp_path_factory.mktemp("start")
    names = {"id2label": {0: "2", 1: "1", 2: "0"}, "label2id": {"2": 0, "1": 1, "0": 2}}
    config = DartConfig(**SMALL, image_size=SIDE, num_patches=16, score_normalization="batch", **names)
    torch.manual_seed(0)
    DartForImageClassification(config).save_pretrained(folder)
    DartImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE).save_pretrained(folder)
    return folder
