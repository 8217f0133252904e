"""Read an encoder's settings off the shapes of the tensors in the DART authors' files."""

import math
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import torch

from dart_hf.conversion.tensors import Tensors
from dart_hf.modeling.configuration_region import TORCHVISION_TRUNKS, RegionConfig
from dart_hf.modeling.scorer_trunk import build_trunk

VIT_HEAD_WIDTH = 64
TOKENIZER_SCORER = "patch_embed.spn.spn.spn."
REBUILDER_SCORER = "pre_image.spn.spn.spn."


@dataclass(frozen=True)
class Reading:
    """A setting, and the name of the tensor that it was read off."""

    value: Any
    tensor: str


def read_vit_settings(tensors: Tensors) -> dict[str, Reading]:
    width = _shape(tensors, "cls_token", 3)[2]
    mlp = "blocks.0.mlp.fc1.weight"
    return {
        "hidden_size": Reading(width, "cls_token"),
        "num_attention_heads": Reading(_multiple(width, VIT_HEAD_WIDTH, "cls_token"), "cls_token"),
        "num_hidden_layers": Reading(_count(tensors, r"blocks\.(\d+)\."), "blocks.*"),
        "intermediate_size": Reading(_shape(tensors, mlp, 2)[0], mlp),
        **_tokenizer_settings(tensors),
        **_classifier_settings(tensors),
    }


def read_vim_settings(tensors: Tensors) -> dict[str, Reading]:
    width = _shape(tensors, "cls_token", 3)[2]
    mixer = "layers.0.mixer."
    a_log, conv1d, dt_proj = f"{mixer}A_log", f"{mixer}conv1d.weight", f"{mixer}dt_proj.weight"
    channels, states = _shape(tensors, a_log, 2)
    return {
        "hidden_size": Reading(width, "cls_token"),
        "num_hidden_layers": Reading(_count(tensors, r"layers\.(\d+)\.mixer\."), "layers.*"),
        "expand": Reading(_multiple(channels, width, a_log), a_log),
        "state_size": Reading(states, a_log),
        "conv_kernel": Reading(_shape(tensors, conv1d, 3)[2], conv1d),
        "time_step_rank": Reading(_shape(tensors, dt_proj, 2)[1], dt_proj),
        **_tokenizer_settings(tensors),
        **_classifier_settings(tensors),
    }


def read_rmt_settings(tensors: Tensors) -> dict[str, Reading]:
    stages = [_stage_settings(tensors, f"layers.{i}.") for i in range(_count(tensors, r"layers\.(\d+)\.blocks\."))]
    return {
        **{
            name: Reading([stage[name].value for stage in stages], reading.tensor.replace("layers.0.", "layers.*.", 1))
            for name, reading in stages[0].items()
        },
        "projection_size": Reading(_shape(tensors, "proj.weight", 2)[0], "proj.weight"),
        **_scorer_settings(tensors, REBUILDER_SCORER),
        **_classifier_settings(tensors),
    }


def _stage_settings(tensors: Tensors, stage: str) -> dict[str, Reading]:
    """Read one stage's entries of RMT's settings. The names of its tensors start with `stage`."""
    query, mlp = f"{stage}blocks.0.retention.q_proj.weight", f"{stage}blocks.0.ffn.fc1.weight"
    decay, scales = f"{stage}Relpos.decay", f"{stage}blocks.*.gamma_*"
    width = _shape(tensors, query, 2)[0]
    return {
        "hidden_sizes": Reading(width, query),
        "depths": Reading(_count(tensors, rf"{re.escape(stage)}blocks\.(\d+)\."), f"{stage}blocks.*"),
        "num_attention_heads": Reading(_shape(tensors, decay, 1)[0], decay),
        "mlp_ratios": Reading(_multiple(_shape(tensors, mlp, 2)[0], width, mlp), mlp),
        "layer_scale": Reading(any(fnmatchcase(name, scales) for name in tensors), scales),
    }


def _tokenizer_settings(tensors: Tensors) -> dict[str, Reading]:
    """Read the settings of the region tokenizer, which ViT and Vim share."""
    positions = _shape(tensors, "pos_embed", 3)[1]
    grid_size = math.isqrt(positions - 1)
    if positions != 1 + grid_size**2:
        raise ValueError(f"Tensor 'pos_embed' has {positions} rows; a square score grid has 1 + G².")
    return {
        "score_grid_size": Reading(grid_size, "pos_embed"),
        "patch_size": Reading(_shape(tensors, "patch_embed.proj.weight", 4)[3], "patch_embed.proj.weight"),
        **_scorer_settings(tensors, TOKENIZER_SCORER),
    }


def _scorer_settings(tensors: Tensors, scorer: str) -> dict[str, Reading]:
    """Read the settings of the scorer whose tensor names start with `scorer`."""
    out = f"{scorer}mlp.net.2.weight"
    head = "v1" if _shape(tensors, out, 2)[0] == 1 else "v2"
    return {
        "scorer": Reading(_recognise_trunk(tensors, scorer, head), f"{scorer}features.*"),
        "scorer_head": Reading(head, out),
    }


def _classifier_settings(tensors: Tensors) -> dict[str, Reading]:
    return {"num_labels": Reading(_shape(tensors, "head.weight", 2)[0], "head.weight")}


def _recognise_trunk(tensors: Tensors, scorer: str, scorer_head: str) -> str:
    """Find the torchvision trunk whose names and shapes the scorer's tensors match best; at least half must match."""
    given = {
        re.sub(r"^(features|layers)\.", "", name.removeprefix(scorer)): tensor.shape
        for name, tensor in tensors.items()
        if name.startswith(scorer)
    }
    shares = {}
    for trunk in TORCHVISION_TRUNKS:
        expected = _trunk_shapes(trunk, scorer_head)
        shares[trunk] = sum(given.get(name) == shape for name, shape in expected.items()) / len(expected)
    best = max(shares, key=lambda trunk: shares[trunk])
    if shares[best] < 0.5:
        raise ValueError(f"The tensors '{scorer}*' are none of the trunks {', '.join(TORCHVISION_TRUNKS)}.")
    return best


@cache
def _trunk_shapes(trunk: str, scorer_head: str) -> dict[str, torch.Size]:
    with torch.device("meta"):
        module, _ = build_trunk(RegionConfig(scorer=trunk, scorer_head=scorer_head))
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def _count(tensors: Tensors, pattern: str) -> int:
    """Count the layers by the highest number in names that start with `pattern`."""
    return 1 + max((int(found[1]) for name in tensors if (found := re.match(pattern, name))), default=-1)


def _multiple(size: int, unit: int, name: str) -> int:
    if size % unit:
        raise ValueError(f"Tensor {name!r} is {size} wide, which is not a multiple of {unit}.")
    return size // unit


def _shape(tensors: Tensors, name: str, rank: int) -> torch.Size:
    if name not in tensors:
        raise ValueError(f"The checkpoint has no tensor {name!r}.")
    shape = tensors[name].shape
    if len(shape) != rank or 0 in shape:
        raise ValueError(f"Tensor {name!r} must have {rank} dimensions and not be empty, got shape {tuple(shape)}.")
    return shape
