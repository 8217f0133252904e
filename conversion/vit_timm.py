"""Read a plain or distilled ViT of timm."""

import math
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from timm.data import resolve_model_data_config
from timm.data.transforms import str_to_pil_interp
from timm.layers import Attention, Mlp, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from transformers import PreTrainedConfig

from dart_hf.conversion.checkpoint_file import read_checkpoint
from dart_hf.conversion.tensors import TIMM_VIT_NAMES, check_tensors
from dart_hf.conversion.vit_source import ViT, common_settings, fold_position, source_errors

# Parts of timm's ViTs that DART does not have. Each row relies on the rows above it.
UNSUPPORTED: tuple[tuple[str, Callable[[VisionTransformer], bool]], ...] = (
    ("a stem other than one convolution over patches", lambda vit: type(vit.patch_embed) is not PatchEmbed),
    ("normalised patches", lambda vit: _is_active(vit.patch_embed.norm)),
    ("no class token", lambda vit: vit.cls_token is None),
    ("register tokens", lambda vit: vit.reg_token is not None),
    ("no position table", lambda vit: vit.pos_embed is None),
    ("a position table without the class token", lambda vit: vit.no_embed_class),
    ("a classifier that reads more than the class token (global_pool)", lambda vit: vit.global_pool != "token"),
    ("a normalisation before its blocks (pre-norm)", lambda vit: _is_active(vit.norm_pre)),
    ("no LayerNorm after its blocks", lambda vit: not isinstance(vit.norm, nn.LayerNorm)),
)
UNSUPPORTED_IN_BLOCKS: tuple[tuple[str, Callable[[Block], bool]], ...] = (
    ("blocks of another design", lambda block: type(block) is not Block),
    ("attention of another design", lambda block: type(block.attn) is not Attention),
    ("normalised queries and keys (qk-norm)", lambda block: _is_active(block.attn.q_norm)),
    ("layer scale", lambda block: _is_active(block.ls1) or _is_active(block.ls2)),
    ("an MLP of another design, such as SwiGLU", lambda block: type(block.mlp) is not Mlp),
    (
        "normalisations inside attention and MLP",
        lambda block: _is_active(block.attn.norm) or _is_active(block.mlp.norm),
    ),
    ("linear layers without bias (proj_bias)", lambda block: block.attn.proj.bias is None),
)

TIMM_WEIGHTS = ("model.safetensors", "pytorch_model.bin")

# Class of an activation -> its name in transformers.
ACTIVATIONS = {
    "GELU": "gelu",
    "GELUTanh": "gelu_pytorch_tanh",
    "QuickGELU": "quick_gelu",
    "ReLU": "relu",
    "SiLU": "silu",
}


def _is_active(module: nn.Module) -> bool:
    return not isinstance(module, nn.Identity)


def _timm_folder(name: str) -> Path:
    """Return the folder with a timm model's config.json and weights; download them if `name` is a Hub id."""
    if Path(name).is_dir():
        return Path(name)
    with source_errors(f"the model {name!r}"):
        config = huggingface_hub.hf_hub_download(name, "config.json")
        try:
            huggingface_hub.hf_hub_download(name, TIMM_WEIGHTS[0])
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            huggingface_hub.hf_hub_download(name, TIMM_WEIGHTS[1])
    return Path(config).parent


def read_timm_vit(name: str, config: PreTrainedConfig) -> ViT:
    """Read a ViT of timm; [`convert_vit`] says which ones, and what is raised."""
    folder = _timm_folder(name)
    title = f"timm's {config.architecture!r}"
    with source_errors(title):
        vit = timm.create_model(f"local-dir:{folder}", pretrained=False).eval()
    _check_features(vit, title)

    weights = next((file for file in (folder / name for name in TIMM_WEIGHTS) if file.is_file()), None)
    if weights is None:
        raise FileNotFoundError(f"source: the folder {str(folder)!r} has none of {', '.join(TIMM_WEIGHTS)}.")
    tensors = {name: tensor.float() for name, tensor in read_checkpoint(weights)[0].items()}
    check_tensors(tensors, {name: tensor.shape for name, tensor in vit.state_dict().items()})
    vit.load_state_dict(tensors)
    is_distilled = isinstance(vit, VisionTransformerDistilled)
    if is_distilled:
        fold_position(tensors, "dist_token", "pos_embed")
    block = vit.blocks[0]
    common = common_settings(config, vit.patch_embed.img_size, vit.patch_embed.patch_size)
    num_channels = vit.patch_embed.proj.in_channels
    return ViT(
        settings={
            **common,
            "num_channels": num_channels,
            "hidden_size": vit.embed_dim,
            "num_hidden_layers": len(vit.blocks),
            "num_attention_heads": block.attn.num_heads,
            "intermediate_size": block.mlp.fc1.out_features,
            "hidden_act": _activation_name(block.mlp.act),
            "qkv_bias": block.attn.qkv.bias is not None,
            "layer_norm_eps": vit.norm.eps,
            "distillation_token": is_distilled,
            "distillation_head": "head_dist.weight" in tensors,
        },
        tensors=tensors,
        names=TIMM_VIT_NAMES,
        preparation=timm_preparation(vit, num_channels, common["image_size"]),
        # Without heads, timm's distilled ViT averages its two tokens.
        classify=vit if vit.num_classes else lambda pixel_values: vit.forward_features(pixel_values)[:, 0],
    )


def _check_features(vit: VisionTransformer, title: str) -> None:
    if type(vit) not in (VisionTransformer, VisionTransformerDistilled):
        raise ValueError(f"source: {title} is a {type(vit).__name__}; only plain and distilled ViTs are accepted.")
    rows = ((feature, has_it(vit)) for feature, has_it in UNSUPPORTED)
    block_rows = ((feature, any(map(has_it, vit.blocks))) for feature, has_it in UNSUPPORTED_IN_BLOCKS)
    for feature, is_present in chain(rows, block_rows):
        if is_present:
            raise ValueError(f"source: {title} has {feature}, which DART cannot represent.")


def _activation_name(activation: nn.Module) -> str:
    name = type(activation).__name__
    if getattr(activation, "approximate", "none") == "tanh":
        name = "GELUTanh"
    if name not in ACTIVATIONS:
        raise ValueError(f"source: its activation is {name}; {', '.join(ACTIVATIONS)} are supported.")
    return ACTIVATIONS[name]


def timm_preparation(vit: VisionTransformer, num_channels: int, side: int) -> dict[str, Any]:
    """Return the settings of timm's evaluation transform, which resizes to more than the crop."""
    data = resolve_model_data_config(vit)
    scaled = math.floor(side / data["crop_pct"])
    sizes = {"center": {"shortest_edge": scaled}, "squash": {"height": scaled, "width": scaled}}
    if data["crop_mode"] not in sizes:
        raise ValueError(
            f"source: its crop_mode is {data['crop_mode']!r}; DartImageProcessor does {', '.join(map(repr, sizes))}."
        )
    return {
        "size": sizes[data["crop_mode"]],
        "crop_size": {"height": side, "width": side},
        "resample": str_to_pil_interp(data["interpolation"]),
        "image_mean": data["mean"],
        "image_std": data["std"],
        "do_convert_rgb": num_channels == 3,
    }


def add_default_tag(name: str) -> str:
    """Add the tag of timm's default weights to a Hub id of timm without one; return other names unchanged."""
    owner, _, model = name.rpartition("/")
    if owner == "timm" and "." not in model and timm.is_model(model) and not Path(name).exists():
        return f"{name}.{timm.get_pretrained_cfg(model).tag}"
    return name
