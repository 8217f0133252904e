"""Classifiers that are small and give different answers for different images."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification

from dart_hf.modeling.modeling_dart_base import RegionPreTrainedModel

# Model type -> settings of a tiny encoder.
ENCODERS: dict[str, dict[str, Any]] = {
    "dart": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
    "dart_vim": {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 4},
    "dart_rmt": {
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
        "num_attention_heads": [2, 2],
        "mlp_ratios": [2, 2],
        "decay_starts": [2, 2],
        "decay_ranges": [4, 6],
        "chunkwise": [True, False],
        "layer_scale": [False, True],
        "layer_scale_init_value": 0.5,
        "projection_size": 32,
    },
    "dartified": {
        "encoder_class": "Dinov2ForImageClassification",
        "encoder_config": {
            "model_type": "dinov2",
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "mlp_ratio": 1,
            "image_size": 32,
            "patch_size": 4,
            "initializer_range": 0.5,
        },
    },
}


def tiny_classifier(
    labels: Sequence[str] = ("LABEL_0", "LABEL_1"), model_type: str = "dart", **settings: Any
) -> RegionPreTrainedModel:
    """A classifier with the published score normalisation, as conversion makes it: no running statistics yet."""
    torch.manual_seed(0)
    shared = {
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
    config = AutoConfig.for_model(model_type, **{**shared, **ENCODERS[model_type], **settings})
    return AutoModelForImageClassification.from_config(config).eval()


def random_weights(model: nn.Module) -> nn.Module:
    """Draw every parameter, position tables too, large enough to matter for the outputs."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        deviation = 2 * parameter[0].numel() ** -0.5 if parameter.ndim in (2, 4) else 0.5
        parameter.data = deviation * torch.randn(parameter.shape, generator=generator)
    return model.eval()
