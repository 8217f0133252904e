"""The model that a training starts from: loaded, converted or new, with a head for the classes of the data."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import SizeDict
from transformers.modeling_utils import PreTrainedModel

from dart_hf.conversion.vit import dart_from_vit
from dart_hf.data.image_data import ImageData
from dart_hf.data.labels import class_names, match_labels
from dart_hf.hub.loading import load_config, load_dart_config, without_warnings
from dart_hf.modeling.configuration_dart import DartConfig
from dart_hf.modeling.configuration_region import RegionConfig
from dart_hf.modeling.image_processing_dart import DartImageProcessor
from dart_hf.presets import PRESETS, preset_config
from dart_hf.training.settings import ModelArguments

# The published transform resizes to 512 pixels and crops 448.
PUBLISHED_CROP_PCT = 448 / 512
# The model types that `dart_from_vit` reads; the last is timm's models in transformers.
VIT_TYPES = ("vit", "deit", "timm_wrapper")
# The linear layers that give logits.
# Weights of the heads, by their names in our models and in dartified ones.
HEADS = re.compile(r"(dartified\.encoder\.(timm_model\.)?)?((cls_|distillation_)?classifier|head)\.(weight|bias)")
SINGLE_LABEL = "single_label_classification"


def start_model(
    arguments: ModelArguments, data: ImageData, say: Callable[[str], None] = print
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Load, convert or make the model that a training starts from, and its image processor.

    Raises:
        ValueError: Not exactly one of model and preset is given, a setting is out of range, or the model knows other
            classes than the data and keeps its head.
        OSError: The model or the scorer's weights could not be had.
    """
    if (arguments.model is None) == (arguments.preset is None):
        raise ValueError(f"Give either model (what to fine-tune) or preset (from scratch: {', '.join(PRESETS)}).")
    try:
        changes = json.loads(arguments.model_settings or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"model_settings: {arguments.model_settings!r} is no JSON: {error}.") from error
    if not isinstance(changes, dict):
        raise ValueError(f"model_settings must map settings to values, got {arguments.model_settings!r}.")
    for name in ("num_patches", "partition", "image_size", "drop_path_rate"):
        if getattr(arguments, name) is not None:
            changes[name] = getattr(arguments, name)

    if arguments.preset is not None:
        _check_known(changes, PRESETS[arguments.preset][0])
        with _settings_checked():
            config = preset_config(arguments.preset, **changes, **_labels(data))
        # The scorer gets its weights later, or the model is refused.
        with without_warnings():
            model = AutoModelForImageClassification.from_config(config)
        image_processor = DartImageProcessor()
        _set_crop(image_processor, config.image_size, arguments.crop_pct)
    elif _is_plain_vit(arguments.model):
        _check_known(changes, DartConfig)
        scorer = changes.pop("scorer", None)
        grid_size = changes.pop("score_grid_size", None)
        model, image_processor = dart_from_vit(
            arguments.model, "flow", scorer, arguments.scorer_weights, grid_size, report=say
        )
    else:
        _check_known(changes, type(load_dart_config(arguments.model)))
        model, image_processor = load_dart(arguments.model)
    if arguments.model is not None:
        lacks_head = not model.num_labels or model.config.architectures == [type(model.base_model).__name__]
        new_head = arguments.new_head or lacks_head
        model = adapted(model, changes, data, new_head, repr(arguments.model))
    size = (model.config.image_size, model.config.image_size)
    example = torch.empty(1, model.config.num_channels, *size, device="meta")
    model.base_model.tokenizer.check(example, model.config.num_patches)
    if arguments.image_size is not None or arguments.crop_pct is not None:
        _set_crop(image_processor, model.config.image_size, arguments.crop_pct)
    if arguments.scorer_weights is not None and model.scorer.is_dead:
        model.load_pretrained_scorer(None if arguments.scorer_weights == "imagenet" else arguments.scorer_weights)
    if model.config.partition != "uniform" and model.scorer.is_dead:
        raise ValueError(
            f"The scorer {model.config.scorer!r} is frozen and has no weights: give scorer_weights (--scorer-weights), "
            "'imagenet' to download them or a file, or take a scorer that trains from scratch "
            """(--model-settings '{"scorer": "conv"}')."""
        )
    return model, image_processor


def _check_known(changes: Mapping[str, Any], config: type[RegionConfig]) -> None:
    """Raise a ValueError for settings that this configuration does not have, or that depend on the data."""
    known = config().to_dict().keys() - {"model_type", "architectures", "id2label", "label2id", "problem_type"}
    if unknown := sorted(changes.keys() - known):
        names = ", ".join(map(repr, unknown))
        raise ValueError(f"model_settings: {config.__name__} has no setting {names} to change.")


@contextmanager
def _settings_checked() -> Iterator[None]:
    """Name `model_settings` in the errors of a configuration."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"model_settings: {error}") from error


def _is_plain_vit(source: str) -> bool:
    """Tell if a source is a ViT or DeiT of timm or transformers, with a fixed grid."""
    if source.startswith("timm/") and not Path(source).is_dir():
        return True
    return load_config(source).model_type in VIT_TYPES


def load_dart(source: str | os.PathLike) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Load a DART model and its image processor for training."""
    load_dart_config(source)
    model = AutoModelForImageClassification.from_pretrained(source)
    return model, AutoImageProcessor.from_pretrained(source)


def adapted(
    model: PreTrainedModel, changes: Mapping[str, Any], data: ImageData, new_head: bool = False, name: str = "the model"
) -> PreTrainedModel:
    """A model with the same weights, other settings, and a head for the data's classes in their order.

    Args:
        model: The classifier.
        changes: New settings of its configuration.
        data: Its classes must be the model's, in any order, unless the head is new; see [`match_labels`].
        new_head: Initialise the head again.
        name: The name of the model in errors.

    Raises:
        ValueError: The data has other classes or another task, or the weights do not fit the settings.
    """
    order = None if new_head else _order_of_classes(model, data, name)
    with _settings_checked():
        config = type(model.config).from_dict({**model.config.to_dict(), **changes, **_labels(data)})
    with without_warnings():
        result = type(model)(config)
    initial, state = result.state_dict(), model.state_dict()
    for key in initial:
        if HEADS.fullmatch(key):
            state[key] = initial[key] if order is None else state[key][order]
    try:
        result.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"model_settings: {dict(changes)} does not fit the weights of {name}: {reason}") from error
    return result


def _order_of_classes(model: PreTrainedModel, data: ImageData, name: str) -> list[int]:
    """For each class of the data, the row of the model's head that answers it."""
    known = class_names(model)
    try:
        if (task := _problem_type(model.config)) != data.problem_type:
            raise ValueError(f"they are for {data.problem_type}, and the model's for {task}.")
        if len(known) != len(data.label_names):
            raise ValueError(f"{len(data.label_names)} classes in place of {len(known)}.")
        return match_labels(data.label_names, known)
    except ValueError as error:
        raise ValueError(
            f"The labels of the data do not match those of {name}: {str(error).rstrip('.')}; replace its head with "
            "new_head=True (--new-head)."
        ) from error


def _problem_type(config: RegionConfig) -> str:
    """The task of a model; transformers takes one label without a task for a regression."""
    return config.problem_type or ("regression" if config.num_labels == 1 else SINGLE_LABEL)


def _labels(data: ImageData) -> dict[str, Any]:
    """The settings of a configuration that depend on the data, so that nothing of an earlier task stays."""
    names = data.label_names
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
        "problem_type": None if data.problem_type == SINGLE_LABEL else data.problem_type,
    }


def _set_crop(image_processor: BaseImageProcessor, image_size: int, crop_pct: float | None) -> None:
    """Let the processor resize the short side, then crop the central square of `image_size` pixels."""
    crop_pct = PUBLISHED_CROP_PCT if crop_pct is None else crop_pct
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct must be above 0 and at most 1, got {crop_pct}.")
    image_processor.size = SizeDict(shortest_edge=round(image_size / crop_pct))
    image_processor.crop_size = SizeDict(height=image_size, width=image_size)
