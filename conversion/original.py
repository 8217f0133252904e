"""The DART authors' checkpoints -> folders that `from_pretrained` reads.

A published file is a pickle: a dict with `model`, often `model_ema`, the optimiser's state, and `args`, an
argparse.Namespace. It is read without executing anything in it. The tensors say what the network is; only the token
budget is in no tensor, so the variant (see `VARIANTS`) has to be known from elsewhere and to agree with the tensors.

How the tensors of each encoder are called, and what their shapes tell, is in `encoders.py`.
"""

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
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

from dart_hf.conversion.encoders import ENCODERS, Encoder, Reading, recognise_encoder
from dart_hf.conversion.tensors import Tensors, renamed_tensors
from dart_hf.files import atomic_folder, check_output_folder
from dart_hf.hub_errors import hub_reason
from dart_hf.modeling.configuration_region import RegionConfig
from dart_hf.modeling.image_processing_dart import DartImageProcessor
from dart_hf.modeling.score_statistics import ScoreStatistics

HUB_REPOSITORY = "yinkx3/DART"


@dataclass(frozen=True)
class Variant:
    """A published checkpoint.

    Args:
        encoder_name: Key of `ENCODERS`.
        args_model: What the authors' training script calls it.
        preset: Name of the configuration's preset that it is made from.
        settings: Where it differs from the preset.
    """

    encoder_name: str
    args_model: str
    preset: str
    settings: Mapping[str, Any]

    @property
    def encoder(self) -> Encoder:
        return ENCODERS[self.encoder_name]

    def config(self, **overrides: Any) -> RegionConfig:
        """The published configuration; `overrides` replace single settings."""
        return self.encoder.config_class.preset(self.preset, **{**self.settings, **overrides})


VARIANTS: dict[str, Variant] = {
    "darvit-tiny": Variant("vit", "darvit_tiny", "tiny", {"num_patches": 196}),
    "darvit-tiny-v2": Variant("vit", "darvit_tiny_v2", "tiny", {"num_patches": 196, "scorer_head": "v2"}),
    "darvit-tiny-ft121p": Variant("vit", "darvit_tiny_121p", "tiny", {"num_patches": 121}),
    "darvit-sm": Variant("vit", "darvit_sm", "small", {"num_patches": 196}),
    "darvit-sm-ft144p": Variant("vit", "darvit_sm_144p", "small", {"num_patches": 144}),
    "darvit-sm-ft288p": Variant("vit", "darvit_sm_288p", "small", {"num_patches": 288}),
    "darvit-sm-ft392p": Variant("vit", "darvit_sm_392p", "small", {"num_patches": 392}),
    "darvim-tiny": Variant("vim", "darvim_tiny", "tiny", {"num_patches": 196}),
    "darvim-tiny-ft2seq": Variant("vim", "darvim_tiny_2seq", "tiny", {"num_patches": 392}),
    "darvim-sm": Variant("vim", "darvim_sm", "small", {"num_patches": 196}),
    "darvim-sm-ft2seq": Variant("vim", "darvim_sm_2seq", "small", {"num_patches": 392}),
    "darmt-L6": Variant("rmt", "DARMT_L6", "L6", {"num_patches": 196, "first_strip_edge": 2}),
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
        _check_variant(variant)
    output = Path(output)
    check_output_folder(output)

    path = _locate(checkpoint, variant)
    tensors, args_model = read_checkpoint(path, ema)
    variant = variant or _infer_variant(path, args_model)
    config, state = convert_state_dict(tensors, variant)
    model = VARIANTS[variant].encoder.model_class(config)
    model.load_state_dict(state)
    with atomic_folder(output) as folder:
        model.save_pretrained(folder)
        DartImageProcessor().save_pretrained(folder)
    return output


def convert_state_dict(original: Tensors, variant: str) -> tuple[RegionConfig, dict[str, torch.Tensor]]:
    """Convert the tensors of a published checkpoint.

    Args:
        original: Tensors by the authors' names.
        variant: One of `VARIANTS`; says what no tensor tells, and is checked against what they do tell.

    Returns:
        The configuration, and the complete state dict of the encoder's classifier made from it.

    Raises:
        ValueError: The encoder is unknown, the variant contradicts the tensors, or a tensor is missing, unexpected or
            wrongly shaped; the message has its original name.
    """
    _check_variant(variant)
    encoder = recognise_encoder(original)
    _check_encoder(encoder, variant)
    readings = encoder.settings(original)
    _check_settings(readings, variant)
    settings = {name: reading.value for name, reading in readings.items()}
    config = VARIANTS[variant].config(**settings, score_normalization="batch", **_labels(settings["num_labels"]))

    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in encoder.model_class(config).state_dict().items()}
    state = renamed_tensors(encoder.arranged(original, config), shapes, encoder.names)
    # What the authors' models do not have: statistics of the "running" normalisation, and the mark of a live trunk.
    state |= {f"{encoder.our_scorer}statistics.{name}": value for name, value in ScoreStatistics().state_dict().items()}
    state[f"{encoder.our_scorer}trunk_loaded"] = torch.tensor(True)
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
        return named[args_model]
    if path.stem in VARIANTS:
        return path.stem
    raise ValueError(
        f"variant: neither the content nor the name of {path} says which model it is, and no tensor holds the number "
        f"of patches; say which one it is: {_variant_list()}."
    )


def _check_variant(variant: str) -> None:
    if variant not in VARIANTS:
        raise ValueError(f"variant: {variant!r} is unknown; accepted are {_variant_list()}.")


def _variant_list() -> str:
    return ", ".join(VARIANTS)


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


# Variant against tensors ------------------------------------------------------------------------------------------


def _check_encoder(encoder: Encoder, variant: str) -> None:
    if encoder is not VARIANTS[variant].encoder:
        raise ValueError(
            f"The checkpoint is not {variant!r}, a {VARIANTS[variant].encoder.title} model: its tensors are those of "
            f"a {encoder.title} model."
        )


def _check_settings(readings: Mapping[str, Reading], variant: str) -> None:
    """The variant and the tensors have to agree in everything but the number of labels, which fine-tuning changes."""
    published = VARIANTS[variant].config()
    differences = [
        f"{name}={reading.value!r} (tensor {reading.tensor!r}) instead of {getattr(published, name)!r}"
        for name, reading in readings.items()
        if name != "num_labels" and reading.value != getattr(published, name)
    ]
    if differences:
        raise ValueError(f"The checkpoint is not {variant!r}: it has {', '.join(differences)}.")


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
