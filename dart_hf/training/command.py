"""`dart-hf train`: settings from flags, YAML and JSON -> a fine-tuned model in a folder."""

import argparse
import importlib.metadata
import importlib.resources
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import yaml
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.hf_argparser import string_to_bool
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import SizeDict
from transformers.modeling_utils import PreTrainedModel
from transformers.trainer_utils import IntervalStrategy

from dart_hf import DartConfig, DartImageProcessor
from dart_hf.conversion.vit import dart_from_vit
from dart_hf.data.batches import without_worker_traceback
from dart_hf.data.image_data import ImageData, load_image_data
from dart_hf.data.labels import class_names, match_labels
from dart_hf.files import absolute_source, atomic_write, move_model_files
from dart_hf.hub.loading import load_config, load_dart_config, without_warnings
from dart_hf.modeling.configuration_region import RegionConfig
from dart_hf.presets import PRESETS, preset_config
from dart_hf.training.checkpoints import (
    MARKER,
    latest_complete_checkpoint,
    remove_incomplete_checkpoints,
    resume_training,
)
from dart_hf.training.recipe import LossBar, Recipe, classification_trainer

COMMAND = "dart-hf train"
SETTINGS_FILE = "train_settings.json"
FACTS_FILE = "training.json"
EVALUATION_FILE = "evaluation.json"
# The published transform resizes to 512 pixels and crops 448.
PUBLISHED_CROP_PCT = 448 / 512
METRICS = ("eval_accuracy", "eval_top5_accuracy", "eval_loss")
# Settings that name a folder, or something on the Hub.
SOURCES = ("data", "model", "teacher")
# What `dart_from_vit` reads, by transformers' names; the last is timm's models in transformers.
VIT_TYPES = ("vit", "deit", "timm_wrapper")
# The linear layers that give logits.
HEADS = ("classifier", "distillation_classifier")
PACKAGES = ("dart-hf", "torch", "transformers", "datasets", "timm")
# Where fine-tuning is better served than by what TrainingArguments says of itself.
TRAINING_DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 10.0,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "weight_decay": 0.05,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_steps": 10,
    "report_to": ["none"],
    "remove_unused_columns": False,
    "dataloader_num_workers": 4 if torch.cuda.is_available() else 0,
    "dataloader_pin_memory": torch.cuda.is_available(),
    # Whatever transformers' verbosity.
    "disable_tqdm": False,
}


@dataclass
class DataArguments:
    """Which images; see [`load_image_data`]."""

    data: str = field(metadata={"help": "Folder of images (CLASS/IMAGE or SPLIT/CLASS/IMAGE), parquet, or a Hub id."})
    output: str = field(metadata={"help": "Folder for the model and the checkpoints on the way."})
    subset: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_split: str = field(default="train", metadata={"help": "Also a part of one, such as train[:1000]."})
    evaluation_split: str | None = field(
        default=None, metadata={"help": "Without it 'validation' or 'test', or some of the training images."}
    )
    image_column: str | None = None
    label_column: str | None = None
    class_names: list[str] | None = field(default=None, metadata={"help": "Where the data set does not know them."})
    held_out: float = field(
        default=0.1,
        metadata={"help": "Share of the training images to evaluate with where there is no split for that."},
    )
    streaming: bool = field(default=False, metadata={"help": "Read while training; needs --max-steps."})
    skip_unreadable: bool = field(default=False, metadata={"help": "Skip and count images that cannot be read."})


@dataclass
class ModelArguments:
    """Which model to start from."""

    model: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of a DART model or a ViT or DeiT, or timm/NAME for a ViT or DeiT of timm's."
        },
    )
    preset: Literal["tiny", "small", "base", "vim-tiny", "vim-small", "rmt-small", "rmt-L6"] | None = field(
        default=None, metadata={"help": "A new model instead."}
    )
    model_settings: str | None = field(
        default=None, metadata={"help": 'Other settings of the configuration, as JSON: \'{"scorer": "conv"}\'.'}
    )
    num_patches: int | None = field(default=None, metadata={"help": "Token budget; the model's own without it."})
    partition: Literal["flow", "grid", "uniform"] | None = field(
        default=None, metadata={"help": "The model's own without it, 'flow' for a ViT."}
    )
    image_size: int | None = field(default=None, metadata={"help": "Side in pixels; the model's own without it."})
    crop_pct: float | None = field(
        default=None, metadata={"help": "Share of the resized short side that the crop keeps; 0.875 for a new size."}
    )
    drop_path_rate: float | None = field(default=None, metadata={"help": "Stochastic depth (DeiT: 0.1)."})
    new_head: bool = field(default=False, metadata={"help": "Replace the head of a model that knows other classes."})
    scorer_weights: str | None = field(
        default=None,
        metadata={"help": "For a scorer that has none: 'imagenet' to download them, or a file of the trunk's."},
    )


@dataclass
class RunArguments:
    """How the run begins."""

    config: str | None = field(
        default=None, metadata={"help": "YAML or JSON file of settings, or 'deit', DeiT's recipe; flags overrule it."}
    )
    resume: bool = field(
        default=False, metadata={"help": "Go on from the last complete checkpoint in the output folder, as before."}
    )
    reference_batch_size: int | None = field(
        default=None,
        metadata={"help": "The learning rate is meant for this many images a step, and scaled in proportion to them."},
    )


# What a checkpoint has, and what its head stands for.
FIXED_SETTINGS = (*(field.name for field in fields(ModelArguments)), "class_names", "label_column")
OWN_ARGUMENTS = (DataArguments, ModelArguments, Recipe, RunArguments)


@dataclass
class TrainingSettings:
    """All settings of a run; `given` has those that are not the defaults."""

    data: DataArguments
    model: ModelArguments
    recipe: Recipe
    run: RunArguments
    trainer: TrainingArguments
    given: dict[str, Any]


# Settings ---------------------------------------------------------------------------------------------------------


class _Parser(HfArgumentParser):
    """A parser that knows options by their full names alone, and raises ValueError."""

    def __init__(self, *types: type, **settings: Any) -> None:
        super().__init__(types, prog="dart-hf train", add_help=False, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message[:1].upper()}{message[1:]}; see 'dart-hf train --help'.")


class _Help(argparse.HelpFormatter):
    """One spelling of each option, and the defaults that do something."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=100)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        value = "" if action.nargs == "?" else f" {self._format_args(action, action.dest.upper())}"
        return action.option_strings[-1] + value

    def _get_help_string(self, action: argparse.Action) -> str:
        default = "" if action.default in (None, False) else f" [{action.default}]"
        return f"{action.help or ''}{default}"


def _listed(settings: Mapping[str, Any]) -> str:
    shown = {
        name: value for name, value in settings.items() if not name.startswith(("dataloader", "disable", "remove"))
    }
    return ", ".join(f"{name} {value[0] if isinstance(value, list) else value}" for name, value in shown.items())


def training_help() -> str:
    """What `dart-hf train --help` prints: our own settings; transformers documents `TrainingArguments`."""
    return _Parser(
        *OWN_ARGUMENTS,
        formatter_class=_Help,
        usage="dart-hf train --data FOLDER_OR_ID --output FOLDER [--model FOLDER_OR_ID | --preset NAME] [OPTIONS]",
        description="Fine-tune a DART, ViT or DeiT model on images, or train a DART from scratch. Every field of "
        "transformers.TrainingArguments is an option too: --num-train-epochs, --learning-rate, --bf16 and so on. "
        f"Where our defaults differ from theirs: {_listed(TRAINING_DEFAULTS)}.",
        epilog="Example: dart-hf train --data photos --output flowers --model dart-tiny --new-head",
    ).format_help()


def parse_settings(arguments: Sequence[str]) -> TrainingSettings:
    """Read the flags of `dart-hf train`. They overrule the configuration file, and that the settings of a resumed run.

    Raises:
        ValueError: A setting is unknown, missing, of the wrong kind, or cannot change in the middle of a training.
        OSError: The configuration file, or what is to be resumed, does not exist.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    early.add_argument("--output")
    early.add_argument("--resume", nargs="?", const=True, default=False, type=string_to_bool)
    known, _ = early.parse_known_args(arguments)
    config = _read_config(known.config) if known.config else {}
    if not {"resume", "config", "output_dir", "resume_from_checkpoint"}.isdisjoint(config):
        raise ValueError(f"config: {known.config} may have all settings but resume, config and the trainer's folders.")
    output = known.output or config.get("output")
    earlier = _earlier_settings(Path(output)) if known.resume and output else {}

    parser = _Parser(*OWN_ARGUMENTS, TrainingArguments)
    parser.set_defaults(**TRAINING_DEFAULTS, output_dir=output)
    defaults = vars(parser.parse_args(["--data", "", "--output", ""]))
    # What comes later overrules what came before.
    arguments = [*_as_flags(earlier), *_as_flags(config), *arguments]
    values = vars(parser.parse_args(arguments))
    if (values["output_dir"], values["resume_from_checkpoint"]) != (output, None):
        raise ValueError("Use output for output_dir, and resume for resume_from_checkpoint.")
    given = {
        name: absolute_source(value) if name in SOURCES else value
        for name, value in values.items()
        if value != defaults[name] and name not in ("output", "output_dir", "resume", "config")
    }
    changed = [name for name in FIXED_SETTINGS if earlier and given.get(name) != earlier.get(name)]
    if changed:
        raise ValueError(f"resume: {changed[0]} cannot change in the middle of a training.")
    return TrainingSettings(*parser.parse_args_into_dataclasses(arguments, look_for_args_file=False), given=given)


def _as_flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings of a file as a command line has them, so that they are read and checked as such."""
    flags = []
    for name, value in settings.items():
        if isinstance(value, dict):
            value = json.dumps(value)
        if value is False and name.endswith("_strategy"):
            value = "no"  # YAML takes no for a truth value.
        if value is not None:
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def _read_config(name: str) -> dict[str, Any]:
    """A file of settings, or one that comes with the package."""
    path = Path(name)
    recipe = importlib.resources.files("dart_hf.training") / "recipes" / f"{name}.yaml"
    if path.is_file():
        text = path.read_text()
    elif path.name == name and recipe.is_file():
        text = recipe.read_text()
    else:
        raise FileNotFoundError(f"config: there is no file {name!r}; give one, or 'deit'.")
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"config: {name} is neither YAML nor JSON: {str(error).splitlines()[0]}.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"config: {name} must map names of settings to values.")
    return settings


def _earlier_settings(output: Path) -> dict[str, Any]:
    settings = _own_settings(output)
    if settings is None:
        raise FileNotFoundError(
            f"resume: the folder {str(output)!r} holds no training to go on with (no {SETTINGS_FILE})."
        )
    return settings


def _own_settings(output: Path) -> dict[str, Any] | None:
    """The settings that a run of this command left in its output folder; None without such a run."""
    try:
        return json.loads((output / SETTINGS_FILE).read_text())[COMMAND]
    except (OSError, ValueError, LookupError, TypeError):
        return None


# The run ----------------------------------------------------------------------------------------------------------


def run_training(settings: TrainingSettings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Fine-tune a model, evaluate it, and write it to the output folder.

    The folder then has the model, its code and its image processor, `training.json` with the facts of the training, and
    checkpoints. A run that was killed goes on with `resume`, to the same weights on a CPU as if nothing had happened.

    Returns:
        What `training.json` holds.

    Raises:
        ValueError: A setting is out of range, or model, data and teacher do not fit together.
        OSError: Something to read does not exist, cannot be had or cannot be read; or the output folder is in use.
    """
    arguments, output = settings.trainer, Path(settings.data.output)
    is_main = arguments.process_index == 0
    tell = say if is_main else lambda line: None
    _check_arguments(settings)
    if is_main:
        _check_output(output, settings.run.resume)
    with arguments.main_process_first():
        checkpoint = latest_complete_checkpoint(output) if settings.run.resume else None
        data = _load_data(settings.data)
    set_seed(arguments.seed)
    if data.evaluation is None:
        arguments.eval_strategy, arguments.load_best_model_at_end = IntervalStrategy.NO, False
    if settings.run.resume:
        tell(f"Going on from {checkpoint}." if checkpoint else "There is no complete checkpoint: from the beginning.")
    if checkpoint is not None:
        model, image_processor = _load_dart(checkpoint)
    else:
        model, image_processor = start_model(settings.model, data, tell)
    if settings.run.reference_batch_size:
        per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        arguments.learning_rate *= per_step / settings.run.reference_batch_size

    bar = LossBar()
    try:
        trainer = classification_trainer(
            model,
            image_processor,
            data.train,
            data.evaluation,
            arguments,
            settings.recipe,
            skip_unreadable=settings.data.skip_unreadable,
            progress=None if arguments.disable_tqdm else bar,
        )
    except RuntimeError as error:
        # What transformers raises where report_to names a package that is missing.
        raise ValueError(str(error).strip().partition("\n")[0]) from error
    if is_main:
        if _own_settings(output) is not None:
            remove_incomplete_checkpoints(output)
        _write_settings(output, settings.given)
    tell(_summary(model, data))
    with without_worker_traceback(), closing(bar):
        resume_training(trainer, checkpoint)
        metrics = trainer.evaluate() if data.evaluation is not None else {}
    facts = _facts(settings, data, trainer, metrics)
    _save(trainer, output, facts)
    if "eval_accuracy" in metrics:
        tell(f"Accuracy: {metrics['eval_accuracy']:.1%}")
    if facts["skipped_images"]:
        tell(f"Images that could not be read were skipped {facts['skipped_images']} times.")
    tell(f"Wrote {output}")
    return facts


def _check_arguments(settings: TrainingSettings) -> None:
    arguments, reference = settings.trainer, settings.run.reference_batch_size
    if settings.data.streaming and arguments.max_steps < 1:
        raise ValueError("streaming: a stream has no length; say how many steps to train with max_steps.")
    if arguments.max_steps == 0 or arguments.num_train_epochs <= 0:
        raise ValueError(
            f"There is nothing to train with max_steps={arguments.max_steps}, num_train_epochs="
            f"{arguments.num_train_epochs:g}."
        )
    if arguments.gradient_accumulation_steps < 1:
        raise ValueError(
            f"gradient_accumulation_steps must be at least 1, got {arguments.gradient_accumulation_steps}."
        )
    if reference is not None and reference < 1:
        raise ValueError(f"reference_batch_size must be at least 1, got {reference}.")
    if arguments.remove_unused_columns:
        raise ValueError("remove_unused_columns=True would take the images away; leave it out.")


def _check_output(output: Path, resume: bool) -> None:
    """Refuse a folder in which a training would lose something."""
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"output: {output} is a file; give a folder.")
    begun = _own_settings(output) is not None
    checkpoints = list(output.glob("checkpoint-*"))
    marked = [path for path in checkpoints if (path / MARKER).exists()]
    finished = (output / "config.json").exists()
    if resume:
        if not begun:
            raise FileNotFoundError(f"resume: the folder {str(output)!r} holds no training of this command.")
        if latest_complete_checkpoint(output) is None and (marked or finished):
            raise ValueError(
                f"resume: the training in {str(output)!r} has no complete checkpoint to go on from; begin it in a new "
                "folder."
            )
    elif output.exists() and any(output.iterdir()) and (not begun or marked or finished):
        hint = ", or resume=True (--resume) to go on" if begun else ""
        raise FileExistsError(f"output: the folder {output} is not empty; give a new one{hint}.")


def _write_settings(output: Path, given: Mapping[str, Any]) -> None:
    """Leave in the output folder what a resumed run begins with."""
    output.mkdir(parents=True, exist_ok=True)
    with atomic_write(output / SETTINGS_FILE) as unfinished:
        unfinished.write_text(json.dumps({COMMAND: given}, indent=2) + "\n")


def _load_data(arguments: DataArguments) -> ImageData:
    return load_image_data(
        arguments.data,
        subset=arguments.subset,
        train_split=arguments.train_split,
        evaluation_split=arguments.evaluation_split,
        image_column=arguments.image_column,
        label_column=arguments.label_column,
        class_names=arguments.class_names,
        held_out=arguments.held_out,
        streaming=arguments.streaming,
    )


def start_model(
    arguments: ModelArguments, data: ImageData, say: Callable[[str], None] = print
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """The model that a training starts from, and its image processor.

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
        # The scorer's weights come after this, or are refused if there are none.
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
        model, image_processor = _load_dart(arguments.model)
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
    """Raise a ValueError that names settings that this configuration does not have, or that the data decides on."""
    known = config().to_dict().keys() - {"model_type", "architectures", "id2label", "label2id"}
    if unknown := sorted(changes.keys() - known):
        names = ", ".join(map(repr, unknown))
        raise ValueError(f"model_settings: {config.__name__} has no setting {names} to change.")


@contextmanager
def _settings_checked() -> Iterator[None]:
    """A setting of the wrong kind as a ValueError in one sentence."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"model_settings: {error}") from error


def _is_plain_vit(source: str) -> bool:
    """Whether this is a ViT or DeiT with a fixed grid, of timm's or transformers'."""
    if source.startswith("timm/") and not Path(source).is_dir():
        return True
    return load_config(source).model_type in VIT_TYPES


def _load_dart(source: str | os.PathLike) -> tuple[PreTrainedModel, BaseImageProcessor]:
    load_dart_config(source)
    model = AutoModelForImageClassification.from_pretrained(source)
    return model, AutoImageProcessor.from_pretrained(source)


def adapted(
    model: PreTrainedModel, changes: Mapping[str, Any], data: ImageData, new_head: bool = False, name: str = "the model"
) -> PreTrainedModel:
    """The same weights in a model with other settings, and a head for the data's classes in their order.

    Args:
        model: The classifier.
        changes: Settings of its configuration.
        data: Its classes must be the model's, in any order, unless the head is new; see [`match_labels`].
        new_head: Whether to initialise the head anew.
        name: What errors call the model.

    Raises:
        ValueError: The classes are others; or the weights do not fit the settings.
    """
    order = None if new_head else _order_of_classes(model, data, name)
    with _settings_checked():
        config = type(model.config).from_dict({**model.config.to_dict(), **changes, **_labels(data)})
    with without_warnings():
        result = type(model)(config)
    initial, state = result.state_dict(), model.state_dict()
    for key in initial:
        if key.startswith(HEADS):
            state[key] = initial[key] if order is None else state[key][order]
    try:
        result.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"model_settings: {dict(changes)} does not fit the weights of {name}: {reason}") from error
    return result


def _order_of_classes(model: PreTrainedModel, data: ImageData, name: str) -> list[int]:
    """Which row of a model's head is for each of the data's classes."""
    known = class_names(model)
    try:
        if len(known) != len(data.label_names):
            raise ValueError(f"{len(data.label_names)} classes in place of {len(known)}.")
        return match_labels(data.label_names, known)
    except ValueError as error:
        raise ValueError(
            f"The labels of the data do not match those of {name}: {str(error).rstrip('.')}; replace its head with "
            "new_head=True (--new-head)."
        ) from error


def _labels(data: ImageData) -> dict[str, Any]:
    names = data.label_names
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def _set_crop(image_processor: BaseImageProcessor, image_size: int, crop_pct: float | None) -> None:
    """Resize the short side, then crop the central square of `image_size` pixels."""
    crop_pct = PUBLISHED_CROP_PCT if crop_pct is None else crop_pct
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct must be above 0 and at most 1, got {crop_pct}.")
    image_processor.size = SizeDict(shortest_edge=round(image_size / crop_pct))
    image_processor.crop_size = SizeDict(height=image_size, width=image_size)


def _summary(model: PreTrainedModel, data: ImageData) -> str:
    held_out = " (held out of them)" if data.evaluation_split is None else ""
    learned, tested = (
        f"{len(split):,} images" if hasattr(split, "__len__") else "a stream of images"
        for split in (data.train, data.evaluation or [])
    )
    also = f", {tested} to evaluate{held_out}" if data.evaluation is not None else ""
    return (
        f"{len(data.label_names)} classes: {learned} to learn from{also}; "
        f"{model.num_parameters() / 1e6:.1f} million weights, {model.config.num_patches} tokens an image."
    )


def _facts(
    settings: TrainingSettings, data: ImageData, trainer: Trainer, metrics: Mapping[str, float]
) -> dict[str, Any]:
    skipped = torch.tensor(trainer.data_collator.num_skipped, device=trainer.args.device)
    return {
        "data": {
            "source": absolute_source(settings.data.data),
            "subset": settings.data.subset,
            "train_split": settings.data.train_split,
            "evaluation_split": data.evaluation_split,
            "num_train_images": len(data.train) if hasattr(data.train, "__len__") else None,
            "num_evaluation_images": len(data.evaluation) if hasattr(data.evaluation, "__len__") else None,
        },
        "started_from": absolute_source(settings.model.model)
        if settings.model.model
        else f"preset {settings.model.preset}",
        "settings": settings.given,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "metrics": {name: metrics[name] for name in METRICS if name in metrics},
        "skipped_images": int(trainer.accelerator.reduce(skipped)),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
    }


def _save(trainer: Trainer, output: Path, facts: Mapping[str, Any]) -> None:
    """Replace the output folder's model. Every process takes part, because the weights may be spread over them."""
    unfinished = output / ".unfinished"
    if trainer.is_world_process_zero():
        shutil.rmtree(unfinished, ignore_errors=True)
    trainer.save_model(str(unfinished))
    if trainer.is_world_process_zero():
        # Pickled settings, which nobody needs.
        (unfinished / "training_args.bin").unlink(missing_ok=True)
        (unfinished / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n")
        # Of the weights that are replaced.
        (output / EVALUATION_FILE).unlink(missing_ok=True)
        move_model_files(unfinished, output)
