"""How each encoder looks in the DART authors' files, against how it looks in ours.

One entry of `ENCODERS` for each: how to recognise its files, how to read its settings off the tensors' shapes, one
table from our tensor names to the original ones, and one step that arranges the tensors as ours are.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from itertools import islice
from typing import Any

import torch

from dart_hf.conversion.tensors import TIMM_VIT_NAMES, NameTable, Tensors, check_tensors
from dart_hf.modeling.configuration_dart_rmt import DartRmtConfig
from dart_hf.modeling.configuration_dart_vim import DartVimConfig
from dart_hf.modeling.configuration_region import TORCHVISION_TRUNKS, RegionConfig
from dart_hf.modeling.modeling_dart import DartForImageClassification
from dart_hf.modeling.modeling_dart_base import RegionPreTrainedModel
from dart_hf.modeling.modeling_dart_rmt import DartRmtForImageClassification, decay_rates, rotation_frequencies
from dart_hf.modeling.modeling_dart_vim import DartVimForImageClassification
from dart_hf.modeling.scorer_trunk import build_trunk

VIT_HEAD_WIDTH = 64
TOKENIZER_SCORER = "patch_embed.spn.spn.spn."
REBUILDER_SCORER = "pre_image.spn.spn.spn."


@dataclass(frozen=True)
class Reading:
    """A setting, and the tensor whose shape tells it."""

    value: Any
    tensor: str


def as_they_are(tensors: Tensors, config: RegionConfig) -> Tensors:
    return tensors


@dataclass(frozen=True)
class Encoder:
    """How an encoder looks in the authors' files.

    Args:
        title: What people call it.
        marker: Pattern of a tensor name that only this encoder has.
        model_class: Our classifier with this encoder.
        settings: Reads the configuration's settings off the shapes.
        names: From our tensor names to the original ones, as for [`renamed_tensors`].
        arranged: The original tensors in the order and the shapes of ours, without those that ours computes from the
            settings. Raises a ValueError if those do not agree with the settings.
    """

    title: str
    marker: str
    model_class: type[RegionPreTrainedModel]
    settings: Callable[[Tensors], dict[str, Reading]]
    names: NameTable
    arranged: Callable[[Tensors, Any], Tensors] = as_they_are

    @property
    def config_class(self) -> type[RegionConfig]:
        return self.model_class.config_class

    @property
    def our_scorer(self) -> str:
        """What the names of our scorer's tensors begin with."""
        return f"{self.model_class.base_model_prefix}.tokenizer.scorer."


def recognise_encoder(tensors: Tensors) -> Encoder:
    """The encoder that tensors of these names belong to.

    Raises:
        ValueError: They belong to none.
    """
    for encoder in ENCODERS.values():
        if any(re.match(encoder.marker, name) for name in tensors):
            return encoder
    names = ", ".join(map(repr, islice(tensors, 3)))
    raise ValueError(f"The checkpoint is no DART model: its {len(tensors)} tensors are called {names} and so on.")


# Settings ---------------------------------------------------------------------------------------------------------


def vit_settings(tensors: Tensors) -> dict[str, Reading]:
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


def vim_settings(tensors: Tensors) -> dict[str, Reading]:
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


def rmt_settings(tensors: Tensors) -> dict[str, Reading]:
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
    """RMT's settings with one entry per stage, of the stage whose tensors' names begin with `stage`."""
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
    """The settings of the region tokenizer, which the encoders of tokens share."""
    positions = _shape(tensors, "pos_embed", 3)[1]
    grid_size = math.isqrt(positions - 1)
    if positions != 1 + grid_size**2:
        raise ValueError(f"Tensor 'pos_embed' has {positions} rows, which is not 1 + G² of a square score grid.")
    return {
        "score_grid_size": Reading(grid_size, "pos_embed"),
        "patch_size": Reading(_shape(tensors, "patch_embed.proj.weight", 4)[3], "patch_embed.proj.weight"),
        **_scorer_settings(tensors, TOKENIZER_SCORER),
    }


def _scorer_settings(tensors: Tensors, scorer: str) -> dict[str, Reading]:
    """The settings of the scorer whose tensors' names begin with `scorer`."""
    out = f"{scorer}mlp.net.2.weight"
    head = "v1" if _shape(tensors, out, 2)[0] == 1 else "v2"
    return {
        "scorer": Reading(_recognise_trunk(tensors, scorer, head), f"{scorer}features.*"),
        "scorer_head": Reading(head, out),
    }


def _classifier_settings(tensors: Tensors) -> dict[str, Reading]:
    return {"num_labels": Reading(_shape(tensors, "head.weight", 2)[0], "head.weight")}


def _recognise_trunk(tensors: Tensors, scorer: str, scorer_head: str) -> str:
    """The torchvision trunk that most of the scorer's tensors fit, in name and shape; at least half of it has to."""
    given = {
        re.sub(r"^(features|layers)\.", "", name.removeprefix(scorer)): tensor.shape
        for name, tensor in tensors.items()
        if name.startswith(scorer)
    }
    fits = {}
    for trunk in TORCHVISION_TRUNKS:
        expected = _trunk_shapes(trunk, scorer_head)
        fits[trunk] = sum(given.get(name) == shape for name, shape in expected.items()) / len(expected)
    best = max(fits, key=lambda trunk: fits[trunk])
    if fits[best] < 0.5:
        raise ValueError(f"The tensors '{scorer}*' are none of the trunks {', '.join(TORCHVISION_TRUNKS)}.")
    return best


@cache
def _trunk_shapes(trunk: str, scorer_head: str) -> dict[str, torch.Size]:
    with torch.device("meta"):
        module, _ = build_trunk(RegionConfig(scorer=trunk, scorer_head=scorer_head))
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def _count(tensors: Tensors, pattern: str) -> int:
    """How many layers there are, by the highest number in names that begin with `pattern`."""
    return 1 + max((int(found[1]) for name in tensors if (found := re.match(pattern, name))), default=-1)


def _multiple(size: int, unit: int, name: str) -> int:
    if size % unit:
        raise ValueError(f"Tensor {name!r} is {size} wide, which is no multiple of {unit}.")
    return size // unit


def _shape(tensors: Tensors, name: str, rank: int) -> torch.Size:
    if name not in tensors:
        raise ValueError(f"The checkpoint has no tensor {name!r}.")
    shape = tensors[name].shape
    if len(shape) != rank or 0 in shape:
        raise ValueError(f"Tensor {name!r} must have {rank} dimensions and not be empty, got shape {tuple(shape)}.")
    return shape


# Names ------------------------------------------------------------------------------------------------------------


def _scorer_names(ours: str, theirs: str) -> NameTable:
    """Of the scorer, whose tensors' names begin with the pattern `ours` here and with `theirs` there."""
    return (
        (rf"{ours}trunk\.", f"{theirs}features."),
        (rf"{ours}head\.fc1\.", f"{theirs}mlp.net.0."),
        (rf"{ours}head\.fc2\.", f"{theirs}mlp.net.2."),
    )


VIT_NAMES: NameTable = (*TIMM_VIT_NAMES, *_scorer_names(r"dart\.tokenizer\.scorer\.", TOKENIZER_SCORER))

VIM_NAMES: NameTable = (
    (r"dart_vim\.cls_token", "cls_token"),
    (r"dart_vim\.tokenizer\.position_embeddings", "pos_embed"),
    (r"dart_vim\.tokenizer\.projection\.", "patch_embed.proj."),
    *_scorer_names(r"dart_vim\.tokenizer\.scorer\.", TOKENIZER_SCORER),
    (r"dart_vim\.layers\.(\d+)\.norm\.", r"layers.\1.norm."),
    (r"dart_vim\.layers\.(\d+)\.mixer\.(in_proj|out_proj)\.", r"layers.\1.mixer.\2."),
    (r"dart_vim\.layers\.(\d+)\.mixer\.forward_scan\.", r"layers.\1.mixer."),
    (r"dart_vim\.layers\.(\d+)\.mixer\.backward_scan\.(conv1d|x_proj|dt_proj)\.", r"layers.\1.mixer.\2_b."),
    (r"dart_vim\.layers\.(\d+)\.mixer\.backward_scan\.A_log", r"layers.\1.mixer.A_b_log"),
    (r"dart_vim\.layers\.(\d+)\.mixer\.backward_scan\.D", r"layers.\1.mixer.D_b"),
    (r"dart_vim\.norm\.", "norm_f."),
    (r"classifier\.", "head."),
)

RMT_NAMES: NameTable = (
    *_scorer_names(r"dart_rmt\.tokenizer\.scorer\.", REBUILDER_SCORER),
    # Their stem is one sequence of convolution, norm, activation.
    (r"dart_rmt\.stem\.convolutions\.0\.conv\.", "patch_embed.proj.0."),
    (r"dart_rmt\.stem\.convolutions\.0\.norm\.", "patch_embed.proj.1."),
    (r"dart_rmt\.stem\.convolutions\.1\.conv\.", "patch_embed.proj.3."),
    (r"dart_rmt\.stem\.convolutions\.1\.norm\.", "patch_embed.proj.4."),
    (r"dart_rmt\.stem\.convolutions\.2\.conv\.", "patch_embed.proj.6."),
    (r"dart_rmt\.stem\.convolutions\.2\.norm\.", "patch_embed.proj.7."),
    (r"dart_rmt\.stem\.convolutions\.3\.conv\.", "patch_embed.proj.9."),
    (r"dart_rmt\.stem\.convolutions\.3\.norm\.", "patch_embed.proj.10."),
    (r"dart_rmt\.stages\.(\d+)\.layers\.(\d+)\.position_conv\.", r"layers.\1.blocks.\2.pos.conv."),
    (r"dart_rmt\.stages\.(\d+)\.layers\.(\d+)\.layernorm_before\.", r"layers.\1.blocks.\2.retention_layer_norm."),
    (r"dart_rmt\.stages\.(\d+)\.layers\.(\d+)\.retention\.([qkv]_proj)\.", r"layers.\1.blocks.\2.retention.\3."),
    (r"dart_rmt\.stages\.(\d+)\.layers\.(\d+)\.retention\.local_conv\.", r"layers.\1.blocks.\2.retention.lepe.conv."),
    (r"dart_rmt\.stages\.(\d+)\.layers\.(\d+)\.retention\.o_proj\.", r"layers.\1.blocks.\2.retention.out_proj."),
    (r"dart_rmt\.stages\.(\d+)\.layers\.(\d+)\.layernorm_after\.", r"layers.\1.blocks.\2.final_layer_norm."),
    (r"dart_rmt\.stages\.(\d+)\.layers\.(\d+)\.mlp\.(fc1|fc2)\.", r"layers.\1.blocks.\2.ffn.\3."),
    (r"dart_rmt\.stages\.(\d+)\.layers\.(\d+)\.mlp\.conv\.", r"layers.\1.blocks.\2.ffn.dwconv.conv."),
    (r"dart_rmt\.stages\.(\d+)\.layers\.(\d+)\.layer_scale(\d)", r"layers.\1.blocks.\2.gamma_\3"),
    (r"dart_rmt\.stages\.(\d+)\.downsample\.conv\.", r"layers.\1.downsample.reduction."),
    (r"dart_rmt\.stages\.(\d+)\.downsample\.norm\.", r"layers.\1.downsample.norm."),
    (r"dart_rmt\.pooler\.projection\.", "proj."),
    (r"dart_rmt\.pooler\.norm\.", "norm."),
    (r"classifier\.", "head."),
)


# Arrangement ------------------------------------------------------------------------------------------------------


def class_token_first(tensors: Tensors, config: DartVimConfig) -> Tensors:
    """Vim's tensors with the class token's row of the position table moved from the middle to the front."""
    table = tensors["pos_embed"]
    middle = table.shape[1] // 2
    before, class_token, after = table.tensor_split([middle, middle + 1], dim=1)
    return {**tensors, "pos_embed": torch.cat([class_token, before, after], dim=1)}


def rmt_arranged(tensors: Tensors, config: DartRmtConfig) -> Tensors:
    return scales_as_vectors(without_relative_positions(tensors, config))


def without_relative_positions(tensors: Tensors, config: DartRmtConfig) -> Tensors:
    """RMT's tensors but for its frequencies and decay rates, if they are those that our model computes."""
    computed = relative_positions(config)
    stored = {name: tensor for name, tensor in tensors.items() if ".Relpos." in name}
    check_tensors(stored, {name: value.shape for name, value in computed.items()})
    for name, value in computed.items():
        # Decay rates are logarithms of numbers near 1, where a precision has steps of this size.
        precision = torch.finfo(stored[name].dtype).eps
        if not torch.allclose(stored[name].to(value.dtype), value, rtol=max(precision, 1e-5), atol=precision):
            raise ValueError(
                f"Tensor {name!r} is not what decay_starts={config.decay_starts} and "
                f"decay_ranges={config.decay_ranges} give: the checkpoint was trained with other settings."
            )
    return {name: tensor for name, tensor in tensors.items() if name not in computed}


def relative_positions(config: DartRmtConfig) -> dict[str, torch.Tensor]:
    """By their original names: every stage's frequencies of rotation (E,) and decay rates (heads,)."""
    computed = {}
    for stage, heads in enumerate(config.num_attention_heads):
        head_dim = config.hidden_sizes[stage] // heads
        decay = decay_rates(config.decay_starts[stage], config.decay_ranges[stage], heads)
        computed |= {
            f"layers.{stage}.Relpos.angle": rotation_frequencies(head_dim),
            f"layers.{stage}.Relpos.decay": decay,
        }
    return computed


def scales_as_vectors(tensors: Tensors) -> Tensors:
    """RMT's tensors with layer scales of shape (C,), which are (1, 1, 1, C) in the authors' files."""
    return {name: _vector(name, tensor) if "gamma_" in name else tensor for name, tensor in tensors.items()}


def _vector(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.shape[:-1] != (1, 1, 1):
        raise ValueError(f"Tensor {name!r} must have shape (1, 1, 1, channels), got {tuple(tensor.shape)}.")
    return tensor[0, 0, 0]


ENCODERS: dict[str, Encoder] = {
    "vit": Encoder(
        title="DART-DeiT (ViT)",
        marker=r"blocks\.\d+\.",
        model_class=DartForImageClassification,
        settings=vit_settings,
        names=VIT_NAMES,
    ),
    "vim": Encoder(
        title="DART-Vim (bidirectional Mamba)",
        marker=r"layers\.\d+\.mixer\.",
        model_class=DartVimForImageClassification,
        settings=vim_settings,
        names=VIM_NAMES,
        arranged=class_token_first,
    ),
    "rmt": Encoder(
        title="DART-RMT (retentive network)",
        marker=r"layers\.\d+\.blocks\.\d+\.retention\.",
        model_class=DartRmtForImageClassification,
        settings=rmt_settings,
        names=RMT_NAMES,
        arranged=rmt_arranged,
    ),
}
