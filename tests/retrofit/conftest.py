"""A tiny ViT, its dartified copy, and images without labels."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import random_weights
from helpers.tiny_training import tiny_pictures
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from dart_hf import DartImageProcessor, dartify
from dart_hf.modeling.modeling_dart_base import RegionPreTrainedModel

SIDE = 32
SETTINGS = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": SIDE,
    "patch_size": 8,
}


@pytest.fixture
def original() -> ViTModel:
    return random_weights(ViTModel(ViTConfig(**SETTINGS)))


@pytest.fixture
def classifier() -> ViTForImageClassification:
    return random_weights(ViTForImageClassification(ViTConfig(**SETTINGS, num_labels=3)))


@pytest.fixture
def make_student() -> Callable[..., RegionPreTrainedModel]:
    """A function that dartifies a model, the same way each time."""

    def make(model, **settings) -> RegionPreTrainedModel:
        torch.manual_seed(0)
        return dartify(model, **{"num_patches": 9, "scorer": "detail", **settings})

    return make


@pytest.fixture(scope="session")
def processor() -> DartImageProcessor:
    return DartImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 20 images, some of them in folders."""
    root = tmp_path_factory.mktemp("photos")
    for number, row in enumerate(tiny_pictures(20)):
        path = root.joinpath(*["train", "deep"][: number % 3]) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        row["image"].resize((40, 48)).save(path)
    return root
