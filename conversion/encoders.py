"""The encoders as the DART authors' files store them.

`ENCODERS` has one entry for each encoder: how to recognise its files, how to read its settings off the tensors' shapes,
a table from our tensor names to the original ones, and a function that gives the tensors the order and shapes of ours.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from dart_hf.conversion.encoder_settings import (
    REBUILDER_SCORER,
    TOKENIZER_SCORER,
    Reading,
    read_rmt_settings,
    read_vim_settings,
    read_vit_settings,
)
from dart_hf.conversion.tensors import TIMM_VIT_NAMES, NameTable, Tensors, check_tensors
from dart_hf.modeling.configuration_dart_rmt import DartRmtConfig
from dart_hf.modeling.configuration_dart_vim import DartVimConfig
from dart_hf.modeling.configuration_region import RegionConfig
from dart_hf.modeling.modeling_dart import DartForImageClassification
from dart_hf.modeling.modeling_dart_base import RegionPreTrainedModel
from dart_hf.modeling.modeling_dart_rmt import DartRmtForImageClassification, decay_rates, rotation_frequencies
from dart_hf.modeling.modeling_dart_vim import DartVimForImageClassification


def unchanged(tensors: Tensors, config: RegionConfig) -> Tensors:
    return tensors


@dataclass(frozen=True)
class Encoder:
    """An encoder as the authors' files store it.

    Args:
        title: Its name in messages.
        marker: Regular expression of a tensor name that only this encoder has.
        model_class: Our classifier with this encoder.
        read_settings: Reads the configuration's settings off the shapes.
        names: From our tensor names to the original ones, as for [`renamed_tensors`].
        arrange: Gives the original tensors the order and shapes of ours, and leaves out those that our model computes
            from its settings. Raises a ValueError if these differ from what our model computes.
    """

    title: str
    marker: str
    model_class: type[RegionPreTrainedModel]
    read_settings: Callable[[Tensors], dict[str, Reading]]
    names: NameTable
    arrange: Callable[[Tensors, Any], Tensors] = unchanged

    @property
    def config_class(self) -> type[RegionConfig]:
        return self.model_class.config_class

    @property
    def scorer_prefix(self) -> str:
        """The prefix of our scorer's tensor names."""
        return f"{self.model_class.base_model_prefix}.tokenizer.scorer."


def recognise_encoder(tensors: Tensors) -> Encoder:
    """Find the encoder that has tensors of these names.

    Raises:
        ValueError: No encoder has.
    """
    for encoder in ENCODERS.values():
        if any(re.match(encoder.marker, name) for name in tensors):
            return encoder
    names = ", ".join(map(repr, islice(tensors, 3)))
    raise ValueError(f"The checkpoint is not a DART model: its {len(tensors)} tensors are called {names} and so on.")


# Names ------------------------------------------------------------------------------------------------------------


def _scorer_names(ours: str, theirs: str) -> NameTable:
    """The table of the scorer, whose tensor names start with the pattern `ours` here and `theirs` in their files."""
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


def move_class_token_first(tensors: Tensors, config: DartVimConfig) -> Tensors:
    """Move the class token's row of Vim's position table from the middle to the front."""
    table = tensors["pos_embed"]
    middle = table.shape[1] // 2
    before, class_token, after = table.tensor_split([middle, middle + 1], dim=1)
    return {**tensors, "pos_embed": torch.cat([class_token, before, after], dim=1)}


def arrange_rmt(tensors: Tensors, config: DartRmtConfig) -> Tensors:
    return flatten_layer_scales(drop_relative_positions(tensors, config))


def drop_relative_positions(tensors: Tensors, config: DartRmtConfig) -> Tensors:
    """Leave out RMT's rotation frequencies and decay rates after checking that our model computes the same."""
    computed = relative_positions(config)
    stored = {name: tensor for name, tensor in tensors.items() if ".Relpos." in name}
    check_tensors(stored, {name: value.shape for name, value in computed.items()})
    for name, value in computed.items():
        # Decay rates are logarithms of numbers near 1. Stored in a lower precision, those have steps of this size.
        precision = torch.finfo(stored[name].dtype).eps
        if not torch.allclose(stored[name].to(value.dtype), value, rtol=max(precision, 1e-5), atol=precision):
            raise ValueError(
                f"Tensor {name!r} is not what decay_starts={config.decay_starts} and "
                f"decay_ranges={config.decay_ranges} give: the checkpoint was trained with other settings."
            )
    return {name: tensor for name, tensor in tensors.items() if name not in computed}


def relative_positions(config: DartRmtConfig) -> dict[str, torch.Tensor]:
    """Compute every stage's rotation frequencies (E,) and decay rates (heads,), by their original names."""
    computed = {}
    for stage, heads in enumerate(config.num_attention_heads):
        head_dim = config.hidden_sizes[stage] // heads
        decay = decay_rates(config.decay_starts[stage], config.decay_ranges[stage], heads)
        computed |= {
            f"layers.{stage}.Relpos.angle": rotation_frequencies(head_dim),
            f"layers.{stage}.Relpos.decay": decay,
        }
    return computed


def flatten_layer_scales(tensors: Tensors) -> Tensors:
    """Turn RMT's layer scales from shape (1, 1, 1, C) into (C,)."""
    return {name: _flatten(name, tensor) if "gamma_" in name else tensor for name, tensor in tensors.items()}


def _flatten(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.shape[:-1] != (1, 1, 1):
        raise ValueError(f"Tensor {name!r} must have shape (1, 1, 1, channels), got {tuple(tensor.shape)}.")
    return tensor[0, 0, 0]


ENCODERS: dict[str, Encoder] = {
    "vit": Encoder(
        title="DART-DeiT (ViT)",
        marker=r"blocks\.\d+\.",
        model_class=DartForImageClassification,
        read_settings=read_vit_settings,
        names=VIT_NAMES,
    ),
    "vim": Encoder(
        title="DART-Vim (bidirectional Mamba)",
        marker=r"layers\.\d+\.mixer\.",
        model_class=DartVimForImageClassification,
        read_settings=read_vim_settings,
        names=VIM_NAMES,
        arrange=move_class_token_first,
    ),
    "rmt": Encoder(
        title="DART-RMT (retentive network)",
        marker=r"layers\.\d+\.blocks\.\d+\.retention\.",
        model_class=DartRmtForImageClassification,
        read_settings=read_rmt_settings,
        names=RMT_NAMES,
        arrange=arrange_rmt,
    ),
}
