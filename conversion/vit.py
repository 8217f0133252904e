"""Pretrained ViTs and DeiTs of transformers and timm, with a classifier or without -> DART models to fine-tune.

DART with one equal region for each of a ViT's patches is that ViT: the same weights give the same logits. From there,
with a scorer, fine-tuning starts that lets the regions follow the content. An encoder is a classifier of no classes
here, whose logits are the class token's normalised features.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import huggingface_hub
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError, HTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from timm.data import resolve_model_data_config
from timm.data.transforms import str_to_pil_interp
from timm.layers import Attention, Mlp, PatchEmbed, resample_abs_pos_embed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from dart_hf.conversion.original import read_checkpoint
from dart_hf.conversion.tensors import TIMM_VIT_NAMES, NameTable, Tensors, check_tensors, renamed_tensors
from dart_hf.files import atomic_folder, check_output_folder
from dart_hf.hub.loading import load_config
from dart_hf.hub_errors import hub_reason
from dart_hf.modeling.configuration_dart import DartConfig
from dart_hf.modeling.image_processing_dart import DartImageProcessor
from dart_hf.modeling.modeling_dart import DartForImageClassification
from dart_hf.modeling.region_partition import PARTITIONS

logger = logging.get_logger(__name__)

# Largest difference from the source's logits, as a share of the largest logit, or of 1 where that is smaller.
TOLERANCE = 1e-4


def convert_vit(
    source: str | os.PathLike,
    output: str | os.PathLike,
    partition: str = "uniform",
    scorer: str | None = None,
    scorer_weights: str | os.PathLike | None = None,
    score_grid_size: int = 14,
    say: Callable[[str], None] = logger.warning,
) -> Path:
    """Convert a ViT or DeiT into a folder with model, configuration and image processor.

    With `partition="uniform"` and as many tokens as the source has patches, the model computes the source's logits, to
    1e-4 of the largest, or of 1 where all are smaller; nothing is written unless it does. A position table of another
    size than `score_grid_size` is resampled after that, and changes them. Of a source without a classifier the class
    token's normalised features are compared, and the result is a [`DartModel`].

    Args:
        source: A folder or Hub id of a `ViTModel`, `DeiTModel`, `ViTForImageClassification`,
            `DeiTForImageClassification` or `DeiTForImageClassificationWithTeacher` of transformers, or of a plain or
            distilled ViT of timm, such as `timm/deit_tiny_patch16_224.fb_in1k`; `timm/deit_tiny_patch16_224` stands
            for timm's default weights of that name. A folder that exists is a folder.
        output: Folder to write; it must not exist or be empty. It appears complete or not at all.
        partition: `config.partition` of the result: `"uniform"`, `"flow"` or `"grid"`.
        scorer: The scorer's trunk (see [`DartConfig`]); without it that of the preset of about this width.
        scorer_weights: A local file with the trunk's weights, or `"imagenet"`, which the trunk's library downloads.
            Without it a pretrained trunk has none, and "flow" must not be trained before it gets some.
        score_grid_size: Side G of the score grid and of the position table. With 224 pixels and patches of 16 it is 14.
        say: Takes what the user has to know of the result, a sentence at a time.

    Returns:
        `output` as a path.

    Raises:
        ValueError: An argument is out of range; the source is no such model, has something that DART does not have,
            or is damaged or incomplete.
        OSError: The source or the trunk's weights cannot be found or downloaded, or `output` is in use.
    """
    if partition not in PARTITIONS:
        raise ValueError(f"partition must be one of {', '.join(map(repr, PARTITIONS))}, got {partition!r}.")
    if score_grid_size < 1:
        raise ValueError(f"score_grid_size must be at least 1, got {score_grid_size}.")
    output = Path(output)
    check_output_folder(output)
    model, processor = dart_from_vit(source, partition, scorer, scorer_weights, score_grid_size, say)
    with atomic_folder(output) as folder:
        (model if model.num_labels else model.dart).save_pretrained(folder)
        processor.save_pretrained(folder)
    return output


def dart_from_vit(
    source: str | os.PathLike,
    partition: str = "uniform",
    scorer: str | None = None,
    scorer_weights: str | os.PathLike | None = None,
    score_grid_size: int = 14,
    say: Callable[[str], None] = logger.warning,
) -> tuple[DartForImageClassification, DartImageProcessor]:
    """What [`convert_vit`] writes, with its arguments and errors; without labels where the source has no classifier."""
    vit = read_vit(source)
    model = _build_dart(vit, scorer)
    _check_logits(model, vit)
    if score_grid_size != vit.grid_size:
        _resample_positions(model, score_grid_size)
        say(
            f"The position table of {vit.grid_size}×{vit.grid_size} cells was resampled to {score_grid_size}×"
            f"{score_grid_size}, so the logits differ from the source's; a score grid size of {vit.grid_size} keeps it."
        )
    model.config.partition = partition
    if scorer_weights is not None:
        model.load_pretrained_scorer(None if scorer_weights == "imagenet" else scorer_weights)
    if model.scorer.is_dead:
        say(
            f"The scorer {model.config.scorer!r} has no weights yet: call model.load_pretrained_scorer(), or convert "
            "with scorer weights, before training with partition='flow'."
        )
    return model, DartImageProcessor(**vit.preparation)


# The model --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ViT:
    """What DART needs of a ViT.

    Args:
        settings: Of the `DartConfig`, without those of partition and scorer.
        tensors: By the source's names. The position table has one row for the class token and one for each patch.
        names: From our tensor names to the source's.
        preparation: Settings of the `DartImageProcessor` that prepares images as the source's does.
        classify: Pixel values (B, C, H, W) of the source's image size -> logits (B, num_labels); the class token's
            normalised features (B, D) where there are no labels.
    """

    settings: dict[str, Any]
    tensors: Tensors
    names: NameTable
    preparation: dict[str, Any]
    classify: Callable[[torch.Tensor], torch.Tensor]

    @property
    def grid_size(self) -> int:
        """Patches along a side of the image."""
        return self.settings["image_size"] // self.settings["patch_size"]


def _build_dart(vit: ViT, scorer: str | None) -> DartForImageClassification:
    """A DART with a region for each of the ViT's patches, the ViT's weights, and a new scorer."""
    tiny, small = DartConfig.preset("tiny"), DartConfig.preset("small")
    preset = tiny if vit.settings["hidden_size"] <= tiny.hidden_size else small
    config = DartConfig(
        **vit.settings,
        num_patches=vit.grid_size**2,
        partition="uniform",
        scorer=scorer or preset.scorer,
        score_grid_size=vit.grid_size,
    )
    model = DartForImageClassification(config).eval()
    state = model.state_dict()
    renamed = renamed_tensors(vit.tensors, {name: tensor.shape for name, tensor in state.items()}, vit.names)
    scorers_own = {name: tensor for name, tensor in state.items() if name.startswith("dart.tokenizer.scorer.")}
    model.load_state_dict(renamed | scorers_own)
    return model


@torch.inference_mode()
def _check_logits(model: DartForImageClassification, vit: ViT) -> None:
    """Raise a ValueError unless the model gives the ViT's logits for images of noise."""
    side = model.config.image_size
    noise = torch.randn(2, model.config.num_channels, side, side, generator=torch.Generator().manual_seed(0))
    expected = vit.classify(noise)
    deviation = (model(noise).logits - expected).abs().max() / expected.abs().max().clamp(min=1)
    # Written so that NaN is refused.
    if not deviation <= TOLERANCE:
        raise ValueError(
            f"source: DART with its weights gives other {'logits' if model.num_labels else 'features'}, by "
            f"{deviation:.2%} of the largest: it computes something that DART does not."
        )


def _resample_positions(model: DartForImageClassification, grid_size: int) -> None:
    table = model.dart.tokenizer.position_embeddings.detach()
    model.dart.tokenizer.position_embeddings = nn.Parameter(resample_abs_pos_embed(table, [grid_size, grid_size]))
    model.config.score_grid_size = grid_size


# Sources ----------------------------------------------------------------------------------------------------------


def read_vit(source: str | os.PathLike) -> ViT:
    """Read a source of [`convert_vit`], which says what it may be and what is raised."""
    name = _with_timms_tag(os.fspath(source))
    config = load_config(name)
    if config.model_type == "timm_wrapper":
        return _read_timm(_timm_folder(name), config)
    if config.model_type not in ("vit", "deit"):
        raise ValueError(f"source: {name!r} is a model of type {config.model_type!r}; ViT and DeiT are accepted.")
    return _read_transformers(name, config)


def _with_timms_tag(name: str) -> str:
    """The Hub id of the default weights where timm's name is given without their tag; other names as they are."""
    owner, _, model = name.rpartition("/")
    if owner == "timm" and "." not in model and timm.is_model(model) and not Path(name).exists():
        return f"{name}.{timm.get_pretrained_cfg(model).tag}"
    return name


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Say what of the source could not be had, or is unusable, and why."""
    try:
        yield
    except (OSError, HTTPError) as error:
        raise OSError(f"source: {what} cannot be had: {_first_sentence(error)}.") from error
    except (RuntimeError, TypeError, ValueError, AssertionError, SafetensorError, UnpicklingError) as error:
        raise ValueError(f"source: {what} cannot be used: {_first_sentence(error)}.") from error


def _first_sentence(error: Exception) -> str:
    """The reason without the libraries' advice, which is for their own callers."""
    return hub_reason(error).partition(". ")[0]


def _common_settings(
    config: PreTrainedConfig, image_size: int | Sequence[int], patch_size: int | Sequence[int]
) -> dict[str, Any]:
    """The labels, and the sides of image and patch, which have to be square and fit each other."""
    sides = {}
    for name, size in (("image_size", image_size), ("patch_size", patch_size)):
        height, width = (size, size) if isinstance(size, int) else size
        if height != width:
            raise ValueError(f"source: its {name} is {height}×{width}; only squares are supported.")
        sides[name] = height
    if sides["image_size"] % sides["patch_size"]:
        raise ValueError(
            f"source: its image_size {sides['image_size']} is no multiple of its patch_size {sides['patch_size']}: its "
            "patches leave a border out, and DART's regions do not."
        )
    label2id = {label: index for index, label in config.id2label.items()}
    return {**sides, "id2label": config.id2label, "label2id": label2id, "problem_type": config.problem_type}


def _fold_position(tensors: dict[str, torch.Tensor], token: str, positions: str) -> None:
    """Move the second row of a position table into the token that it is always added to."""
    table = tensors[positions]
    tensors[token] = tensors[token] + table[:, 1:2]
    tensors[positions] = torch.cat([table[:, :1], table[:, 2:]], dim=1)


# Sources: transformers --------------------------------------------------------------------------------------------


TRANSFORMERS_SETTINGS = (
    "num_channels",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "qkv_bias",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "layer_norm_eps",
)

TRANSFORMERS_VIT_NAMES: NameTable = (
    (r"dart\.cls_token", "embeddings.cls_token"),
    (r"dart\.distillation_token", "embeddings.distillation_token"),
    (r"dart\.tokenizer\.position_embeddings", "embeddings.position_embeddings"),
    (r"dart\.tokenizer\.projection\.", "embeddings.patch_embeddings.projection."),
    (r"dart\.layers\.", "layers."),
    (r"dart\.layernorm\.", "layernorm."),
    (r"classifier\.", "classifier."),
    (r"distillation_classifier\.", "distillation_classifier."),
)

# What older transformers (5.8 is one) call the parts of a layer, and the distilled model its first classifier.
TRANSFORMERS_ALIASES = {
    "encoder.layer.": "layers.",
    "attention.attention.query.": "attention.q_proj.",
    "attention.attention.key.": "attention.k_proj.",
    "attention.attention.value.": "attention.v_proj.",
    "attention.output.dense.": "attention.o_proj.",
    "intermediate.dense.": "mlp.fc1.",
    "output.dense.": "mlp.fc2.",
    "cls_classifier.": "classifier.",
}

PREPARATION = (
    "do_resize",
    "size",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)


def _read_transformers(name: str, config: PreTrainedConfig) -> ViT:
    classifier = _load_transformers(name, config)
    common = _common_settings(config, config.image_size, config.patch_size)
    tensors = {}
    for key, tensor in classifier.state_dict().items():
        key = key.removeprefix(f"{classifier.base_model_prefix}.")
        for alias, today in TRANSFORMERS_ALIASES.items():
            key = key.replace(alias, today)
        tensors[key] = tensor
    has_token = "embeddings.distillation_token" in tensors
    if has_token:
        _fold_position(tensors, "embeddings.distillation_token", "embeddings.position_embeddings")
    return ViT(
        settings={
            **{setting: getattr(config, setting) for setting in TRANSFORMERS_SETTINGS},
            **common,
            "distillation_token": has_token,
            "distillation_head": "distillation_classifier.weight" in tensors,
        },
        tensors=tensors,
        names=TRANSFORMERS_VIT_NAMES,
        preparation=_transformers_preparation(name, config.num_channels, common["image_size"]),
        classify=lambda pixel_values: classifier(pixel_values).logits,
    )


def _load_transformers(name: str, config: PreTrainedConfig) -> PreTrainedModel:
    """The classifier in float32 and in evaluation mode, every weight of it from the checkpoint.

    An encoder becomes one without labels, in `config` too.
    """
    architecture = (config.architectures or ["an unknown class"])[0]
    if architecture in ("ViTModel", "DeiTModel"):
        config.num_labels = 0
    elif "ForImageClassification" not in architecture:
        raise ValueError(f"source: {name!r} is {architecture}; bare encoders and image classifiers are accepted.")
    with _explained(f"the model {name!r}"):
        classifier, loading = AutoModelForImageClassification.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    misfits = {
        "missing": loading["missing_keys"],
        # What transformers' encoders compute from the class token besides, and its classifiers do not.
        "unexpected": [key for key in loading["unexpected_keys"] if "pooler." not in key],
        "wrong shape": [key for key, *_ in loading["mismatched_keys"]],
    }
    for kind, keys in misfits.items():
        if keys:
            raise ValueError(
                f"source: the weights of {name!r} do not fit its config.json: {kind} {', '.join(sorted(keys)[:3])}."
            )
    return classifier.eval()


def _transformers_preparation(name: str, num_channels: int, side: int) -> dict[str, Any]:
    with _explained(f"the image processor of {name!r}"):
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    given = {setting: value for setting, value in processor.to_dict().items() if value is not None}
    known = (*PREPARATION, "do_center_crop", "do_convert_rgb")
    unknown = [setting for setting in given if setting.startswith("do_") and given[setting] and setting not in known]
    if unknown:
        raise ValueError(f"source: its image processor has {', '.join(unknown)}, which DartImageProcessor does not.")
    # Training reads the size of images off the crop. Where the source does not crop, they have that size already.
    crops = given.get("do_center_crop", False)
    return {
        **{setting: given[setting] for setting in PREPARATION if setting in given},
        "crop_size": given["crop_size"] if crops else {"height": side, "width": side},
        "do_convert_rgb": num_channels == 3,
    }


# Sources: timm ----------------------------------------------------------------------------------------------------


# What timm's ViTs may have and DART does not, each row for those that passed the rows above it.
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

# Class of an activation -> transformers' name for it.
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
    """The folder with a timm model's config.json and weights, downloaded if `name` is a Hub id."""
    if Path(name).is_dir():
        return Path(name)
    with _explained(f"the model {name!r}"):
        config = huggingface_hub.hf_hub_download(name, "config.json")
        try:
            huggingface_hub.hf_hub_download(name, TIMM_WEIGHTS[0])
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            huggingface_hub.hf_hub_download(name, TIMM_WEIGHTS[1])
    return Path(config).parent


def _read_timm(folder: Path, config: PreTrainedConfig) -> ViT:
    title = f"timm's {config.architecture!r}"
    with _explained(title):
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
        _fold_position(tensors, "dist_token", "pos_embed")
    block = vit.blocks[0]
    common = _common_settings(config, vit.patch_embed.img_size, vit.patch_embed.patch_size)
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
        preparation=_timm_preparation(vit, num_channels, common["image_size"]),
        # Without heads a distilled one would average its two tokens.
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


def _timm_preparation(vit: VisionTransformer, num_channels: int, side: int) -> dict[str, Any]:
    """What timm's evaluation transform does: it resizes to more than the crop."""
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
