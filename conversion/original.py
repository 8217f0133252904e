"""Convert the DART authors' checkpoints into folders that `from_pretrained` reads.

The tensors tell every setting of the network except the token budget. So the variant (see `VARIANTS`) must be known
from elsewhere, and its other settings must agree with the tensors. `encoders.py` has the tensor names of each encoder.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import HTTPError
from timm.data import ImageNetInfo

from dart_hf.conversion.checkpoint_file import read_checkpoint
from dart_hf.conversion.encoder_settings import Reading
from dart_hf.conversion.encoders import ENCODERS, Encoder, recognise_encoder
from dart_hf.conversion.tensors import Tensors, renamed_tensors
from dart_hf.files import atomic_folder, check_output_folder
from dart_hf.hub.loading import without_warnings
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
        args_model: Its name in the authors' training script.
        preset: Name of the configuration's preset.
        settings: The settings that differ from the preset.
    """

    encoder_name: str
    args_model: str
    preset: str
    settings: Mapping[str, Any]

    @property
    def encoder(self) -> Encoder:
        return ENCODERS[self.encoder_name]

    def config(self, **overrides: Any) -> RegionConfig:
        """Make the published configuration, with `overrides` for single settings."""
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
            repository such as `yinkx3/DART`, from which `<variant>.pth` is downloaded. An existing file wins over a
            repository of the same name.
        output: New or empty folder to write. It appears complete or not at all.
        variant: One of `VARIANTS`. The default is the one that the pickle's `args.model` or else the file's name says.
        ema: Convert the averaged weights (`model_ema`) instead of `model`.

    Returns:
        `output` as a path.

    Raises:
        ValueError: The file is not such a checkpoint, would have to execute code, is of an unknown variant or another
            one than given, or a tensor is missing, unexpected or wrongly shaped.
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
    with without_warnings():  # of a scorer that has no weights yet
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
        variant: One of `VARIANTS`. It gives the token budget; its other settings must agree with the tensors.

    Returns:
        The configuration, and the complete state dict of its classifier.

    Raises:
        ValueError: The encoder is unknown, the variant contradicts the tensors, or a tensor is missing, unexpected or
            wrongly shaped. The message names the tensor as the file does.
    """
    _check_variant(variant)
    encoder = recognise_encoder(original)
    _check_encoder(encoder, variant)
    readings = encoder.read_settings(original)
    _check_settings(readings, variant)
    settings = {name: reading.value for name, reading in readings.items()}
    config = VARIANTS[variant].config(**settings, score_normalization="batch", **_labels(settings["num_labels"]))

    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in encoder.model_class(config).state_dict().items()}
    state = renamed_tensors(encoder.arrange(original, config), shapes, encoder.names)
    # The authors' models have no statistics for "running" normalisation, and no flag for a trunk with weights.
    for name, value in ScoreStatistics().state_dict().items():
        state[f"{encoder.scorer_prefix}statistics.{name}"] = value
    state[f"{encoder.scorer_prefix}trunk_loaded"] = torch.tensor(True)
    return config, state


# --- which checkpoint -------------------------------------------------------------------------------------------------


def _locate(checkpoint: str | Path, variant: str | None) -> Path:
    """Return the checkpoint's local path; download it if `checkpoint` is a Hub repository."""
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
            f"variant: say which checkpoint of the Hub repository {checkpoint} to convert: {_variant_list()}."
        )
    try:
        return Path(huggingface_hub.hf_hub_download(str(checkpoint), f"{variant}.pth"))
    except (OSError, ValueError, HTTPError) as error:
        raise OSError(
            f"checkpoint: there is no file {str(checkpoint)!r}, and {variant}.pth could not be downloaded from the Hub "
            f"repository of that name: {hub_reason(error)}."
        ) from error


def _infer_variant(path: Path, args_model: str | None) -> str:
    """Return the variant that the pickle's `args.model` or else the file's name says; raise a ValueError if neither."""
    if args_model is not None:
        named = {entry.args_model: name for name, entry in VARIANTS.items()}
        if args_model not in named:
            raise ValueError(
                f"variant: {path} was trained as {args_model!r}, which is not a published model; choose one: "
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


# --- variant against tensors ------------------------------------------------------------------------------------------


def _check_encoder(encoder: Encoder, variant: str) -> None:
    if encoder is not VARIANTS[variant].encoder:
        raise ValueError(
            f"The checkpoint is not {variant!r}, a {VARIANTS[variant].encoder.title} model: its tensors are those of "
            f"a {encoder.title} model."
        )


def _check_settings(readings: Mapping[str, Reading], variant: str) -> None:
    """Raise a ValueError if variant and tensors differ in more than the number of labels, which fine-tuning changes."""
    published = VARIANTS[variant].config()
    differences = [
        f"{name}={reading.value!r} (tensor {reading.tensor!r}) instead of {getattr(published, name)!r}"
        for name, reading in readings.items()
        if name != "num_labels" and reading.value != getattr(published, name)
    ]
    if differences:
        raise ValueError(f"The checkpoint is not {variant!r}: it has {', '.join(differences)}.")


def _labels(num_labels: int) -> dict[str, Any]:
    """Return ImageNet-1k's class names for a model of a thousand classes; other names are unknown."""
    info = ImageNetInfo("imagenet-1k")
    if num_labels != info.num_classes():
        return {}
    short = info.label_descriptions()
    # Two classes are called "crane": the bird and the machine. Their definitions differ.
    names = [
        label if short.count(label) == 1 else info.index_to_description(index, detailed=True)
        for index, label in enumerate(short)
    ]
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
