"""Folders of images and models that the tests of `dart-hf train` share. Not to be written to."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.train_command import CONFIG, SIDE, SMALL

from dart_hf import DartConfig, DartForImageClassification, DartImageProcessor
from dart_hf.data.digits_on_photos import digits_on_photos


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """A folder of pictures with a digit each: train/DIGIT (160 altogether) and test/DIGIT (40)."""
    root = tmp_path_factory.mktemp("digits")
    for split, count in (("train", 160), ("test", 40)):
        for number, row in enumerate(digits_on_photos(split, 1, SIDE, (28, 32)).select(range(count))):
            folder = root / split / str(row["label"])
            folder.mkdir(parents=True, exist_ok=True)
            row["image"].save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def few(digits, tmp_path_factory) -> Path:
    """A smaller folder: four pictures of each of three digits, no split."""
    root = tmp_path_factory.mktemp("few")
    for name in "012":
        (root / name).mkdir()
        for path in sorted((digits / "train" / name).iterdir())[:4]:
            shutil.copy(path, root / name)
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
