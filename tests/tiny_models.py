"""A classifier of which a test asks no more than that its answers differ from image to image."""

from collections.abc import Sequence
from typing import Any

import torch

from dart_hf import DartConfig, DartForImageClassification


def tiny_classifier(labels: Sequence[str] = ("LABEL_0", "LABEL_1"), **settings: Any) -> DartForImageClassification:
    """As conversion leaves a model: with the published rule for scores, and without running statistics."""
    torch.manual_seed(0)
    config = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 32,
        "patch_size": 4,
        "num_patches": 9,
        "score_grid_size": 4,
        "scorer": "conv",
        "score_normalization": "batch",
        "initializer_range": 0.5,
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }
    return DartForImageClassification(DartConfig(**{**config, **settings})).eval()
