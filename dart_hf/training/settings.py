"""Settings of `dart-hf train`: from flags, YAML and JSON to dataclasses."""

import argparse
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from dart_hf.files import absolute_source
from dart_hf.training.output_folder import SETTINGS_FILE, own_settings
from dart_hf.training.recipe import Recipe

# Settings that name a folder, or something on the Hub.
SOURCES = ("data", "model", "teacher")
# Defaults that suit fine-tuning better than those of TrainingArguments.
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
    # transformers' default depends on its verbosity.
    "disable_tqdm": False,
}


@dataclass
class DataArguments:
    """The images, as for [`load_image_data`]."""

    data: str = field(
        metadata={"help": "Folder of images (CLASS/IMAGE or SPLIT/CLASS/IMAGE), a parquet file, or an id on the Hub."}
    )
    output: str = field(metadata={"help": "Folder for the model and its checkpoints."})
    subset: str | None = field(default=None, metadata={"help": "The subset, if the data set has several."})
    train_split: str = field(
        default="train", metadata={"help": "Split to learn from, or a part of it, such as train[:1000]."}
    )
    evaluation_split: str | None = field(
        default=None,
        metadata={"help": "Split to evaluate on. Default: 'validation', else 'test', else held-out training images."},
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Column of the images. Default: the only column of images."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column of the labels. Default: the only column of labels."}
    )
    class_names: list[str] | None = field(
        default=None, metadata={"help": "Names of the classes, in the order of their numbers."}
    )
    held_out: float = field(
        default=0.1,
        metadata={"help": "Share of the training images to hold out and evaluate on, if there is no split for that."},
    )
    streaming: bool = field(default=False, metadata={"help": "Read the data while training. Needs --max-steps."})


@dataclass
class ModelArguments:
    """The model to start from."""

    model: str | None = field(
        default=None,
        metadata={
            "help": "Model to start from: folder or Hub id of a DART, ViT or DeiT, or timm/NAME for one of timm."
        },
    )
    preset: Literal["tiny", "small", "base", "vim-tiny", "vim-small", "rmt-small", "rmt-L6"] | None = field(
        default=None, metadata={"help": "Train a new model of this size instead."}
    )
    model_settings: str | None = field(
        default=None, metadata={"help": 'Other settings of the configuration, as JSON: \'{"scorer": "conv"}\'.'}
    )
    num_patches: int | None = field(default=None, metadata={"help": "Token budget. Default: the model's own."})
    partition: Literal["flow", "grid", "uniform"] | None = field(
        default=None, metadata={"help": "Partition. Default: the model's own, or 'flow' for a ViT."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the images in pixels. Default: the model's own."}
    )
    crop_pct: float | None = field(
        default=None,
        metadata={"help": "Side of the crop divided by the resized short side. Default for a new size: 0.875."},
    )
    drop_path_rate: float | None = field(
        default=None, metadata={"help": "Stochastic depth of the last layer (DeiT: 0.1)."}
    )
    new_head: bool = field(default=False, metadata={"help": "Replace the head, for other classes than the model's."})
    scorer_weights: str | None = field(
        default=None,
        metadata={"help": "Weights for a scorer that has none: 'imagenet' to download them, or a file."},
    )


@dataclass
class RunArguments:
    """The start of the run."""

    config: str | None = field(
        default=None,
        metadata={"help": "YAML or JSON file of settings, or 'deit' for DeiT's recipe. Options overrule it."},
    )
    resume: bool = field(
        default=False,
        metadata={
            "help": "Go on from the last complete checkpoint in the output folder, with the settings of that run."
        },
    )
    reference_batch_size: int | None = field(
        default=None,
        metadata={"help": "Scale the learning rate by the number of images in a step, divided by this number."},
    )


# A resumed run cannot change these: a checkpoint has the model, and its head has the classes.
FIXED_SETTINGS = (*(field.name for field in fields(ModelArguments)), "class_names", "label_column")
OWN_ARGUMENTS = (DataArguments, ModelArguments, Recipe, RunArguments)


@dataclass
class TrainingSettings:
    """All settings of a run. `given` has those that differ from the defaults."""

    data: DataArguments
    model: ModelArguments
    recipe: Recipe
    run: RunArguments
    trainer: TrainingArguments
    given: dict[str, Any]


class _Parser(HfArgumentParser):
    """A parser that takes only the full names of options, and raises ValueError."""

    def __init__(self, *types: type, **settings: Any) -> None:
        super().__init__(types, prog="dart-hf train", add_help=False, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message[:1].upper()}{message[1:]}; see 'dart-hf train --help'.")


class _Help(argparse.HelpFormatter):
    """Shows one spelling of each option, and only defaults that do something."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=100)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        value = "" if action.nargs == "?" else f" {self._format_args(action, action.dest.upper())}"
        return action.option_strings[-1] + value

    def _get_help_string(self, action: argparse.Action) -> str:
        default = "" if action.default in (None, False) else f" [{action.default}]"
        return f"{action.help or ''}{default}"


def _defaults_text(settings: Mapping[str, Any]) -> str:
    shown = {
        name: value for name, value in settings.items() if not name.startswith(("dataloader", "disable", "remove"))
    }
    return ", ".join(f"{name} {value[0] if isinstance(value, list) else value}" for name, value in shown.items())


def training_help() -> str:
    """The text of `dart-hf train --help`: our own settings. transformers documents `TrainingArguments`."""
    return _Parser(
        *OWN_ARGUMENTS,
        formatter_class=_Help,
        usage="dart-hf train --data FOLDER_OR_ID --output FOLDER [--model FOLDER_OR_ID | --preset NAME] [OPTIONS]",
        description="Fine-tune a DART, ViT or DeiT model on images, or train a DART from scratch. Every field of "
        "transformers.TrainingArguments is an option too: --num-train-epochs, --learning-rate, --bf16 and so on. "
        f"Where our defaults differ from theirs: {_defaults_text(TRAINING_DEFAULTS)}.",
        epilog="Example: dart-hf train --data photos --output flowers --model dart-tiny --new-head",
    ).format_help()


def parse_settings(arguments: Sequence[str]) -> TrainingSettings:
    """Read the flags of `dart-hf train`.

    Flags overrule the configuration file, and the configuration file overrules the settings of a resumed run.

    Raises:
        ValueError: A setting is unknown, missing, of the wrong kind, or cannot change in the middle of a training.
        OSError: The configuration file or the run to resume does not exist.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    early.add_argument("--output")
    early.add_argument("--resume", nargs="?", const=True, default=False, type=string_to_bool)
    known, _ = early.parse_known_args(arguments)
    config = _read_config(known.config) if known.config else {}
    if not {"resume", "config", "output_dir", "resume_from_checkpoint"}.isdisjoint(config):
        raise ValueError(f"config: {known.config} must not set resume, config, output_dir or resume_from_checkpoint.")
    output = known.output or config.get("output")
    earlier = _earlier_settings(Path(output)) if known.resume and output else {}

    parser = _Parser(*OWN_ARGUMENTS, TrainingArguments)
    parser.set_defaults(**TRAINING_DEFAULTS, output_dir=output)
    defaults = vars(parser.parse_args(["--data", "", "--output", ""]))
    # Later options overrule earlier ones.
    arguments = [*_as_flags(earlier), *_as_flags(config), *arguments]
    values = vars(parser.parse_args(arguments))
    if (values["output_dir"], values["resume_from_checkpoint"]) != (output, None):
        raise ValueError("Use --output instead of --output-dir, and --resume instead of --resume-from-checkpoint.")
    given = {
        name: absolute_source(value) if name in SOURCES else value
        for name, value in values.items()
        if value != defaults[name] and name not in ("output", "output_dir", "resume", "config")
    }
    changed = [name for name in FIXED_SETTINGS if earlier and given.get(name) != earlier.get(name)]
    if changed:
        raise ValueError(f"resume: {changed[0]} cannot change during a training.")
    return TrainingSettings(*parser.parse_args_into_dataclasses(arguments, look_for_args_file=False), given=given)


def _as_flags(settings: Mapping[str, Any]) -> list[str]:
    """The settings of a file as options of a command line, so that they are read and checked in the same way."""
    flags = []
    for name, value in settings.items():
        if isinstance(value, dict):
            value = json.dumps(value)
        if value is False and name.endswith("_strategy"):
            value = "no"  # YAML reads no as false.
        if value is not None:
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def _read_config(name: str) -> dict[str, Any]:
    """Read a file of settings, or a recipe that comes with the package."""
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
    settings = own_settings(output)
    if settings is None:
        raise FileNotFoundError(
            f"resume: the folder {str(output)!r} holds no training to resume: it has no {SETTINGS_FILE}."
        )
    return settings
