"""The DART authors' checkpoints -> folders that `from_pretrained` reads.

A published file is a pickle: a dict with `model`, often `model_ema`, the optimiser's state, and `args`, an
argparse.Namespace. It is read without executing anything in it. The tensors say what the network is; only the token
budget is in no tensor, so the variant (see `VARIANTS`) has to be known from elsewhere and to agree with the tensors.

Each encoder has one entry in `ENCODERS`: how to recognise its files, how to read its settings off the tensors' shapes,
and one table from our tensor names to the original ones.
"""

import argparse
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath, PureWindowsPath
from pickle import UnpicklingError
from typing import Any

import huggingface_hub
import numpy as np
import torch
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import ImageNetInfo

from dart_hf.conversion.tensors import TIMM_VIT_NAMES, NameTable, Tensors, renamed_tensors
from dart_hf.folders import check_unused, complete_folder
from dart_hf.hub_errors import hub_reason
from dart_hf.modeling.configuration_dart import TORCHVISION_TRUNKS, DartConfig
from dart_hf.modeling.image_processing_dart import DartImageProcessor
from dart_hf.modeling.modeling_dart import DartForImageClassification
from dart_hf.modeling.region_scorer import ScoreStatistics
from dart_hf.modeling.scorer_trunk import build_trunk

HUB_REPOSITORY = "yinkx3/DART"
HEAD_WIDTH = 64
SCORER = "patch_embed.spn.spn.spn."
OUR_SCORER = "dart.tokenizer.scorer."


@dataclass(frozen=True)
class Variant:
    """A published checkpoint.

    Args:
        encoder: Key of `ENCODERS`.
        args_model: What the authors' training script calls it.
        preset: Name of the `DartConfig` preset that it is made from.
        settings: Where it differs from the preset.
    """

    encoder: str
    args_model: str
    preset: str = ""
    settings: Mapping[str, Any] | None = None

    def config(self, **overrides: Any) -> DartConfig:
        """The published configuration; `overrides` replace single settings. Only for encoders that are supported."""
        return DartConfig.preset(self.preset, **{**(self.settings or {}), **overrides})


VARIANTS: dict[str, Variant] = {
    "darvit-tiny": Variant("vit", "darvit_tiny", "tiny", {"num_patches": 196}),
    "darvit-tiny-v2": Variant("vit", "darvit_tiny_v2", "tiny", {"num_patches": 196, "scorer_head": "v2"}),
    "darvit-tiny-ft121p": Variant("vit", "darvit_tiny_121p", "tiny", {"num_patches": 121}),
    "darvit-sm": Variant("vit", "darvit_sm", "small", {"num_patches": 196}),
    "darvit-sm-ft144p": Variant("vit", "darvit_sm_144p", "small", {"num_patches": 144}),
    "darvit-sm-ft288p": Variant("vit", "darvit_sm_288p", "small", {"num_patches": 288}),
    "darvit-sm-ft392p": Variant("vit", "darvit_sm_392p", "small", {"num_patches": 392}),
    "darvim-tiny": Variant("vim", "darvim_tiny"),
    "darvim-tiny-ft2seq": Variant("vim", "darvim_tiny_2seq"),
    "darvim-sm": Variant("vim", "darvim_sm"),
    "darvim-sm-ft2seq": Variant("vim", "darvim_sm_2seq"),
    "darmt-L6": Variant("rmt", "DARMT_L6"),
}


def convert_checkpoint(
    checkpoint: str | Path, output: str | Path, variant: str | None = None, ema: bool = False
) -> Path:
    """Convert a checkpoint of the DART authors into a folder with model, configuration and image processor.

    Args:
        checkpoint: A file (`.pth` pickle or `.safetensors`; a training checkpoint or a bare state dict), or a Hub
            repository such as `yinkx3/DART`, from which `<variant>.pth` is downloaded. A path that exists is a path.
        output: Folder to write; it must not exist or be empty. It appears complete or not at all.
        variant: One of `VARIANTS`. Without it the pickle's `args.model` decides, else the file's name.
        ema: Take the averaged weights (`model_ema`) instead of `model`.

    Returns:
        `output` as a path.

    Raises:
        ValueError: The file is no such checkpoint, needs code to be read, is of an unknown variant or not of the one
            given, or a tensor is missing, unexpected or wrongly shaped.
        OSError: The file cannot be found or downloaded, or `output` is in use.
    """
    if variant is not None:
        _check_variant(variant, "variant")
    output = Path(output)
    check_unused(output)

    path = _locate(checkpoint, variant)
    tensors, args_model = read_checkpoint(path, ema)
    config, state = convert_state_dict(tensors, variant or _infer_variant(path, args_model))
    model = DartForImageClassification(config)
    model.load_state_dict(state)
    with complete_folder(output) as folder:
        model.save_pretrained(folder)
        DartImageProcessor().save_pretrained(folder)
    return output


def convert_state_dict(original: Tensors, variant: str) -> tuple[DartConfig, dict[str, torch.Tensor]]:
    """Convert the tensors of a published checkpoint.

    Args:
        original: Tensors by the authors' names.
        variant: One of `VARIANTS`; says what no tensor tells, and is checked against what they do tell.

    Returns:
        The configuration, and the complete state dict of a `DartForImageClassification` made from it.

    Raises:
        ValueError: The encoder is unknown or not supported, the variant contradicts the tensors, or a tensor is
            missing, unexpected or wrongly shaped; the message has its original name.
    """
    _check_variant(variant, "variant")
    encoder = _recognise(original)
    if encoder.settings is None:
        raise _not_supported(f"The checkpoint is a {encoder.title} model", encoder)
    readings = encoder.settings(original)
    _check_against_variant(readings, variant)
    settings = {name: reading.value for name, reading in readings.items()}
    config = VARIANTS[variant].config(**settings, score_normalization="batch", **_labels(settings["num_labels"]))

    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in DartForImageClassification(config).state_dict().items()}
    state = renamed_tensors(original, shapes, encoder.names)
    # What the authors' models do not have: statistics of the "running" normalisation, and the mark of a live trunk.
    state |= {f"{OUR_SCORER}statistics.{name}": value for name, value in ScoreStatistics().state_dict().items()}
    state[f"{OUR_SCORER}trunk_loaded"] = torch.tensor(True)
    return config, state


# Which checkpoint -------------------------------------------------------------------------------------------------


def _locate(checkpoint: str | Path, variant: str | None) -> Path:
    """The checkpoint as a local file, downloaded if it names a Hub repository."""
    path = Path(checkpoint)
    if path.is_file():
        return path
    if path.is_dir():
        raise IsADirectoryError(f"checkpoint: {path} is a folder; give the file in it.")
    looks_like_file = path.suffix in (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
    if looks_like_file or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(checkpoint)):
        raise FileNotFoundError(
            f"checkpoint: there is no file {str(checkpoint)!r}; give a file, or a Hub repository such as "
            f"{HUB_REPOSITORY!r}."
        )
    if variant is None:
        raise ValueError(
            f"variant: say which checkpoint of the Hub repository {checkpoint} to take: {_variant_list()}."
        )
    try:
        return Path(huggingface_hub.hf_hub_download(str(checkpoint), f"{variant}.pth"))
    except (OSError, ValueError, HTTPError) as error:
        raise OSError(
            f"checkpoint: there is no file {str(checkpoint)!r}, and {variant}.pth could not be downloaded from the Hub "
            f"repository of that name: {hub_reason(error)}."
        ) from error


def _infer_variant(path: Path, args_model: str | None) -> str:
    """The variant that the pickle's `args.model` or else the file's name states. Never a guess: unknown names stop."""
    if args_model is not None:
        named = {entry.args_model: name for name, entry in VARIANTS.items()}
        if args_model not in named:
            raise ValueError(
                f"variant: {path} was trained as {args_model!r}, which is no published model; say which one it is: "
                f"{_variant_list()}."
            )
        variant = named[args_model]
    elif path.stem in VARIANTS:
        variant = path.stem
    else:
        raise ValueError(
            f"variant: neither the content nor the name of {path} says which model it is, and no tensor holds the "
            f"number of patches; say which one it is: {_variant_list()}."
        )
    _check_variant(variant, str(path))
    return variant


def _check_variant(variant: str, argument: str) -> None:
    if variant not in VARIANTS:
        raise ValueError(f"{argument}: {variant!r} is unknown; accepted are {_variant_list()}.")
    encoder = ENCODERS[VARIANTS[variant].encoder]
    if encoder.settings is None:
        raise _not_supported(f"{argument}: {variant!r} is a {encoder.title} model", encoder)


def _variant_list() -> str:
    return ", ".join(name for name, entry in VARIANTS.items() if ENCODERS[entry.encoder].settings is not None)


def _not_supported(subject: str, encoder: "Encoder") -> ValueError:
    return ValueError(f"{subject}, which is not yet supported; {_variant_list()} are.")


# Reading files ----------------------------------------------------------------------------------------------------


# What a training checkpoint holds besides tensors and plain containers. Paths are read as pure ones, so that a file
# written on one system is readable on another.
_ALLOWED_GLOBALS: list[Any] = [
    argparse.Namespace,
    *(
        (PurePosixPath, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "PurePosixPath")
    ),
    *(
        (PureWindowsPath, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for name in ("WindowsPath", "PureWindowsPath")
    ),
    *((np.float64(0).__reduce__()[0], f"numpy.{module}.multiarray.scalar") for module in ("core", "_core")),
    np.dtype,
    *(type(np.dtype(name)) for name in ("bool", "int32", "int64", "float16", "float32", "float64")),
]


def read_checkpoint(path: Path, ema: bool = False) -> tuple[dict[str, torch.Tensor], str | None]:
    """Read the weights of a checkpoint file, and what it says about itself.

    Args:
        path: `.safetensors`, or else a PyTorch pickle, which is read without executing anything in it.
        ema: Take `model_ema` instead of `model`.

    Returns:
        Tensors by their original names, and the training script's `args.model`, None where there is none.

    Raises:
        ValueError: The file is neither, is damaged, needs code to be read, or holds no such weights.
    """
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"checkpoint: {path} holds a {type(content).__name__}, not a dict of tensors.")
    key = "model_ema" if ema else "model"
    if ema and content.get(key) is None:
        raise ValueError(f"ema: {path} has no averaged weights (no 'model_ema').")
    weights = content[key] if isinstance(content.get(key), Mapping) else content
    other = next((name for name, value in weights.items() if not isinstance(value, torch.Tensor)), None)
    if other is not None or not weights:
        found = f"{other!r} is a {type(weights[other]).__name__}" if weights else "it is empty"
        raise ValueError(f"checkpoint: {path} holds neither a 'model' nor a bare dict of tensors: {found}.")
    args = content.get("args")
    args_model = args.get("model") if isinstance(args, Mapping) else getattr(args, "model", None)
    return dict(weights), args_model if isinstance(args_model, str) else None


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"checkpoint: {path} is not a safetensors file, or is incomplete: {error}.") from error


def _read_pickle(path: Path) -> Any:
    # Leaving the context takes its globals off the process's list, so those that the user has put there stay out of it.
    present = torch.serialization.get_safe_globals()
    allowed = [entry for entry in _ALLOWED_GLOBALS if entry not in present]
    # Opened first: what fails after that is the content's fault.
    with path.open("rb") as file:
        try:
            with torch.serialization.safe_globals(allowed):
                return torch.load(file, map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            found = re.search(r"GLOBAL (\S+)", str(error))
            if found is None:
                reason = "is no PyTorch checkpoint, or none that can be read without executing code"
            else:
                reason = f"asks to run {found[1]!r} while it is read; that is refused, and nothing of it was executed"
            raise ValueError(f"checkpoint: {path} {reason}.") from error
        except MemoryError:
            raise
        except Exception as error:
            # Damage shows up as whatever the unpickler trips over: RuntimeError, OSError, EOFError, KeyError...
            raise ValueError(f"checkpoint: {path} is not a PyTorch checkpoint, or is incomplete.") from error


# Encoders ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """A setting, and the tensor whose shape tells it."""

    value: Any
    tensor: str


@dataclass(frozen=True)
class Encoder:
    """How an encoder looks in the authors' files.

    Args:
        title: What people call it.
        marker: Pattern of a tensor name that only this encoder has.
        settings: Reads the configuration's settings off the shapes. None: not supported.
        names: From our tensor names to the original ones, as for [`renamed_tensors`].
    """

    title: str
    marker: str
    settings: Callable[[Tensors], dict[str, Reading]] | None = None
    names: NameTable = ()


def _vit_settings(tensors: Tensors) -> dict[str, Reading]:
    width = _shape(tensors, "cls_token", 3)[2]
    if width % HEAD_WIDTH:
        raise ValueError(f"Tensor 'cls_token' is {width} wide, which is no multiple of a head's {HEAD_WIDTH}.")
    blocks = [int(found[1]) for name in tensors if (found := re.match(r"blocks\.(\d+)\.", name))]
    mlp = "blocks.0.mlp.fc1.weight"
    return {
        "hidden_size": Reading(width, "cls_token"),
        "num_attention_heads": Reading(width // HEAD_WIDTH, "cls_token"),
        "num_hidden_layers": Reading(1 + max(blocks), f"blocks.{max(blocks)}.*"),
        "intermediate_size": Reading(_shape(tensors, mlp, 2)[0], mlp),
        "num_labels": Reading(_shape(tensors, "head.weight", 2)[0], "head.weight"),
        **_tokenizer_settings(tensors),
    }


def _tokenizer_settings(tensors: Tensors) -> dict[str, Reading]:
    """The settings of the region tokenizer, which the encoders share."""
    positions = _shape(tensors, "pos_embed", 3)[1]
    grid_size = math.isqrt(max(positions - 1, 0))
    if positions != 1 + grid_size**2:
        raise ValueError(f"Tensor 'pos_embed' has {positions} rows, which is not 1 + G² of a square score grid.")
    out = f"{SCORER}mlp.net.2.weight"
    head = "v1" if _shape(tensors, out, 2)[0] == 1 else "v2"
    return {
        "score_grid_size": Reading(grid_size, "pos_embed"),
        "patch_size": Reading(_shape(tensors, "patch_embed.proj.weight", 4)[3], "patch_embed.proj.weight"),
        "scorer": Reading(_recognise_trunk(tensors, head), f"{SCORER}features.*"),
        "scorer_head": Reading(head, out),
    }


ENCODERS: dict[str, Encoder] = {
    "vit": Encoder(
        title="DART-DeiT (ViT)",
        marker=r"blocks\.\d+\.",
        settings=_vit_settings,
        names=(
            *TIMM_VIT_NAMES,
            (r"dart\.tokenizer\.scorer\.trunk\.", f"{SCORER}features."),
            (r"dart\.tokenizer\.scorer\.head\.fc1\.", f"{SCORER}mlp.net.0."),
            (r"dart\.tokenizer\.scorer\.head\.fc2\.", f"{SCORER}mlp.net.2."),
        ),
    ),
    "vim": Encoder(title="DART-Vim (bidirectional Mamba)", marker=r"layers\.\d+\.mixer\."),
    "rmt": Encoder(title="DART-RMT (retentive network)", marker=r"layers\.\d+\.blocks\.\d+\.retention\."),
}


def _recognise(tensors: Tensors) -> Encoder:
    for encoder in ENCODERS.values():
        if any(re.match(encoder.marker, name) for name in tensors):
            return encoder
    names = ", ".join(map(repr, islice(tensors, 3)))
    raise ValueError(f"The checkpoint is no DART model: its {len(tensors)} tensors are called {names} and so on.")


def _recognise_trunk(tensors: Tensors, scorer_head: str) -> str:
    """The torchvision trunk that most of the scorer's tensors fit, in name and shape; at least half of it has to."""
    given = {
        re.sub(r"^(features|layers)\.", "", name.removeprefix(SCORER)): tensor.shape
        for name, tensor in tensors.items()
        if name.startswith(SCORER)
    }
    fits = {}
    for trunk in TORCHVISION_TRUNKS:
        with torch.device("meta"):
            expected = build_trunk(DartConfig(scorer=trunk, scorer_head=scorer_head))[0].state_dict()
        fits[trunk] = sum(given.get(name) == tensor.shape for name, tensor in expected.items()) / len(expected)
    best = max(fits, key=lambda trunk: fits[trunk])
    if fits[best] < 0.5:
        raise ValueError(f"The tensors '{SCORER}*' are none of the trunks {', '.join(TORCHVISION_TRUNKS)}.")
    return best


def _check_against_variant(readings: Mapping[str, Reading], variant: str) -> None:
    """The variant and the tensors have to agree in everything but the number of labels, which fine-tuning changes."""
    published = VARIANTS[variant].config()
    differences = [
        f"{name}={reading.value!r} (tensor {reading.tensor!r}) instead of {getattr(published, name)!r}"
        for name, reading in readings.items()
        if name != "num_labels" and reading.value != getattr(published, name)
    ]
    if differences:
        raise ValueError(f"The checkpoint is not {variant!r}: it has {', '.join(differences)}.")


def _shape(tensors: Tensors, name: str, rank: int) -> torch.Size:
    if name not in tensors:
        raise ValueError(f"The checkpoint has no tensor {name!r}.")
    shape = tensors[name].shape
    if len(shape) != rank:
        raise ValueError(f"Tensor {name!r} must have {rank} dimensions, got shape {tuple(shape)}.")
    return shape


# Writing ----------------------------------------------------------------------------------------------------------


def _labels(num_labels: int) -> dict[str, Any]:
    """ImageNet-1k's class names for a model of a thousand classes; another one's are unknown."""
    info = ImageNetInfo("imagenet-1k")
    if num_labels != info.num_classes():
        return {}
    short = info.label_descriptions()
    # Two classes are called "crane", the bird and the machine; their definitions tell them apart.
    names = [
        label if short.count(label) == 1 else info.index_to_description(index, detailed=True)
        for index, label in enumerate(short)
    ]
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
