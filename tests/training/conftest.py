"""Folders of images and models that the tests of `dart-hf train` share. Not to be written to."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers.train_command import CONFIG, SIDE, SMALL

from dart_hf import DartConfig, DartForImageClassification, DartImageProcessor
from dart_hf.data.digits_on_photos import digits_on_photos


@pytest.fixture(scope="session")
def few(tmp_path_factory) -> Path:
    """A folder with four pictures of each of three digits, and no splits."""
    root = tmp_path_factory.mktemp("few")
    numbers = Counter()
    for row in digits_on_photos("train", 1, SIDE, (28, 32)).select(range(100)):
        label = str(row["label"])
        if label in "012" and numbers[label] < 4:
            (root / label).mkdir(exist_ok=True)
            row["image"].save(root / label / f"{numbers[label]}.png")
            numbers[label] += 1
    return root


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(CONFIG))
    return path


@pytest.fixture(scope="session")
def digits_model(tmp_path_factory) -> Path:
    """A model that knows the digits 2, 1, 0, in this order, with the published normalisation."""
    folder = tmp_path_factory.mktemp("start")
    config = DartConfig(**SMALL, image_size=SIDE, num_patches=16, score_normalization="batch",
                        id2label={0: "2", 1: "1", 2: "0"}, label2id={"2": 0, "1": 1, "0": 2})  # fmt: skip
    torch.manual_seed(0)
    DartForImageClassification(config).save_pretrained(folder)
    DartImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE).save_pretrained(folder)
    return folder
