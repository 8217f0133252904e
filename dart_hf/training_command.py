"""`dart-hf train`: settings from flags, YAML and JSON -> a fine-tuned model in a folder."""

import argparse
import importlib.metadata
import importlib.resources
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import yaml
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import SizeDict
from transformers.modeling_utils import PreTrainedModel

from dart_hf import DartConfig, DartForImageClassification, DartImageProcessor
from dart_hf.checkpoints import (
    latest_complete_checkpoint,
    remove_incomplete_checkpoints,
    resume_training,
    written_whole,
)
from dart_hf.conversion.vit import convert_vit
from dart_hf.data import ImageData, load_image_data, without_worker_traceback
from dart_hf.folders import move_model
from dart_hf.prediction import load_config, load_dart_config
from dart_hf.training import LossBar, Recipe, classification_trainer

SETTINGS_FILE = "settings.json"
FACTS_FILE = "training.json"
# The published transform resizes to 512 pixels and crops 448.
PUBLISHED_CROP_PCT = 448 / 512
METRICS = ("eval_accuracy", "eval_top5_accuracy", "eval_loss")
# What `convert_vit` reads, by transformers' names; the last is timm's models in transformers.
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
    preset: Literal["tiny", "small", "base"] | None = field(default=None, metadata={"help": "A new model instead."})
    model_settings: str | None = field(
        default=None, metadata={"help": 'Other settings of DartConfig, as JSON: \'{"scorer": "conv"}\'.'}
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


def training_help() -> str:
    """What `dart-hf train --help` prints: our own settings; transformers documents `TrainingArguments`."""
    return _Parser(
        *OWN_ARGUMENTS,
        formatter_class=_Help,
        usage="dart-hf train --data FOLDER_OR_ID --output FOLDER [--model FOLDER_OR_ID | --preset NAME] [OPTIONS]",
        description="Fine-tune a DART, ViT or DeiT model on images, or train a DART from scratch. Every field of "
        "transformers.TrainingArguments is an option too: --num-train-epochs, --learning-rate, --bf16 and so on.",
        epilog="Example: dart-hf train --data photos --output flowers --model dart-tiny --new-head",
    ).format_help()


def parse_settings(arguments: Sequence[str]) -> TrainingSettings:
    """Read the flags of `dart-hf train`. They overrule the configuration file, and that the settings of a resumed run.

    Raises:
        ValueError: A setting is unknown, missing or of the wrong kind.
        OSError: The configuration file, or what is to be resumed, does not exist.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    early.add_argument("--output", default="")
    early.add_argument("--resume", action="store_true")
    known, _ = early.parse_known_args(arguments)

    parser = _Parser(*OWN_ARGUMENTS, TrainingArguments)
    _set_defaults(parser, {**TRAINING_DEFAULTS, "output_dir": known.output}, "the defaults")
    defaults = vars(parser.parse_args(["--data", "", "--output", ""]))
    if known.resume:
        _set_defaults(parser, _earlier_settings(Path(known.output)), f"{known.output}/{SETTINGS_FILE}")
    if known.config:
        _set_defaults(parser, _read_config(known.config), known.config)
    values = vars(parser.parse_args(arguments))
    given = {
        name: value
        for name, value in values.items()
        if value != defaults[name] and name not in ("output", "output_dir", "resume", "config")
    }
    return TrainingSettings(*parser.parse_args_into_dataclasses(arguments, look_for_args_file=False), given=given)


def _set_defaults(parser: _Parser, settings: Mapping[str, Any], source: str) -> None:
    actions = {action.dest: action for action in parser._actions}
    for name, value in settings.items():
        name = name.replace("-", "_")
        if name not in actions:
            raise ValueError(f"config: {source} has the unknown setting {name!r}; see 'dart-hf train --help'.")
        action = actions[name]
        action.required = False
        # YAML reads 5e-4 as text, and a mapping is what our option for one takes as JSON.
        if isinstance(value, str) and action.type is not None:
            value = action.type(value)
        parser.set_defaults(**{name: json.dumps(value) if isinstance(value, dict) else value})


def _read_config(name: str) -> dict[str, Any]:
    """A file of settings, or one that comes with the package."""
    path = Path(name)
    recipe = importlib.resources.files("dart_hf") / "recipes" / f"{name}.yaml"
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
    if not (output / SETTINGS_FILE).is_file():
        raise FileNotFoundError(
            f"resume: the folder {str(output)!r} holds no training to go on with (no {SETTINGS_FILE})."
        )
    return json.loads((output / SETTINGS_FILE).read_text())


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
    if settings.data.streaming and arguments.max_steps < 1:
        raise ValueError("streaming: a stream has no length; say how many steps to train with max_steps.")
    checkpoint = None
    if is_main:
        _check_output(output, settings.run.resume)
    with arguments.main_process_first():
        checkpoint = latest_complete_checkpoint(output) if settings.run.resume else None
        data = _load_data(settings.data)
    set_seed(arguments.seed)
    if checkpoint is not None:
        tell(f"Going on from {checkpoint}.")
        model, image_processor = _load_dart(checkpoint, {}, data, new_head=False)
    else:
        model, image_processor = start_model(settings.model, data, tell)
    if settings.run.reference_batch_size:
        per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        arguments.learning_rate *= per_step / settings.run.reference_batch_size

    bar = LossBar()
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
    if is_main:
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


def _check_output(output: Path, resume: bool) -> None:
    """Refuse a folder with a model, with checkpoints to lose, or with those of another program."""
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"output: {output} is a file; give a folder.")
    of_others = not (output / SETTINGS_FILE).exists() and any(output.glob("checkpoint-*"))
    finished = (output / "config.json").exists() or latest_complete_checkpoint(output) is not None
    if of_others or (finished and not resume):
        raise FileExistsError(
            f"output: the folder {output} holds a model or a training; give a new one, or resume=True (--resume) to "
            "go on."
        )


def _write_settings(output: Path, given: Mapping[str, Any]) -> None:
    """Leave in the output folder what a resumed run begins with."""
    output.mkdir(parents=True, exist_ok=True)
    with written_whole(output / SETTINGS_FILE) as unfinished:
        unfinished.write_text(json.dumps(given, indent=2) + "\n")


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
        raise ValueError("Give either model (what to fine-tune) or preset ('tiny', 'small' or 'base', from scratch).")
    try:
        changes = json.loads(arguments.model_settings or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"model_settings: {arguments.model_settings!r} is no JSON: {error}.") from error
    for name in ("num_patches", "partition", "image_size", "drop_path_rate"):
        if getattr(arguments, name) is not None:
            changes[name] = getattr(arguments, name)

    if arguments.preset is not None:
        config = DartConfig.preset(arguments.preset, **changes, **_labels(data))
        model, image_processor = DartForImageClassification(config), DartImageProcessor()
        _set_crop(image_processor, config.image_size, arguments.crop_pct)
    elif _is_plain_vit(arguments.model):
        with tempfile.TemporaryDirectory() as folder:
            scorer = changes.pop("scorer", None)
            converted = convert_vit(arguments.model, Path(folder) / "converted", "flow", scorer, say=say)
            model, image_processor = _load_dart(converted, changes, data, arguments.new_head)
    else:
        model, image_processor = _load_dart(arguments.model, changes, data, arguments.new_head)
    if arguments.image_size is not None or arguments.crop_pct is not None:
        _set_crop(image_processor, model.config.image_size, arguments.crop_pct)
    if arguments.scorer_weights is not None:
        model.load_pretrained_scorer(None if arguments.scorer_weights == "imagenet" else arguments.scorer_weights)
    return model, image_processor


def _is_plain_vit(source: str) -> bool:
    """Whether this is a ViT or DeiT with a fixed grid, of timm's or transformers'."""
    if source.startswith("timm/") and not Path(source).is_dir():
        return True
    return load_config(source).model_type in VIT_TYPES


def _load_dart(
    source: str | os.PathLike, changes: Mapping[str, Any], data: ImageData, new_head: bool
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A DART classifier with other settings, its head's rows in the order of the data's classes."""
    config = load_dart_config(source)
    unknown = [name for name in changes if not hasattr(config, name)]
    if unknown:
        raise ValueError(f"model_settings: {type(config).__name__} has no setting {', '.join(map(repr, unknown))}.")
    names = [config.id2label[index] for index in range(config.num_labels)]
    has_head = any(name.endswith("ForImageClassification") for name in config.architectures or [])
    new_head = new_head or not has_head
    unnamed = names == [f"LABEL_{index}" for index in range(len(data.label_names))]
    if not new_head and not unnamed and sorted(names) != sorted(data.label_names):
        raise ValueError(
            f"The classes of {os.fspath(source)!r} are not those of the data: {_shortened(names)}; "
            f"{_shortened(data.label_names)}; replace its head with new_head=True (--new-head)."
        )
    config = AutoConfig.from_pretrained(source, **changes, **_labels(data))
    model, loading = AutoModelForImageClassification.from_pretrained(
        source, config=config, ignore_mismatched_sizes=True, output_loading_info=True
    )
    mismatched = {name for name, *_ in loading["mismatched_keys"]}
    lost = {name for name in loading["missing_keys"] | mismatched if not (new_head and name.startswith(HEADS))}
    if lost:
        raise ValueError(f"model_settings: {changes} does not fit the weights of {os.fspath(source)!r}: {min(lost)}.")
    for head in filter(None, (getattr(model, name, None) for name in HEADS)):
        with torch.no_grad():
            if new_head:
                torch.nn.init.trunc_normal_(head.weight, std=config.initializer_range)
                torch.nn.init.zeros_(head.bias)
            elif not unnamed:
                order = [names.index(name) for name in data.label_names]
                head.weight.copy_(head.weight[order])
                head.bias.copy_(head.bias[order])
    return model, AutoImageProcessor.from_pretrained(source)


def _labels(data: ImageData) -> dict[str, Any]:
    names = data.label_names
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def _shortened(names: Sequence[str]) -> str:
    more = ", …" if len(names) > 3 else ""
    return f"{len(names)} ({', '.join(names[:3])}{more})"


def _set_crop(image_processor: BaseImageProcessor, image_size: int, crop_pct: float | None) -> None:
    """Resize the short side, then crop the central square of `image_size` pixels."""
    crop_pct = PUBLISHED_CROP_PCT if crop_pct is None else crop_pct
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct must be above 0 and at most 1, got {crop_pct}.")
    image_processor.size = SizeDict(shortest_edge=round(image_size / crop_pct))
    image_processor.crop_size = SizeDict(height=image_size, width=image_size)


def _summary(model: PreTrainedModel, data: ImageData) -> str:
    def count(split: Any) -> str:
        return f"{len(split):,}" if hasattr(split, "__len__") else "a stream of"

    held_out = " (held out of them)" if data.evaluation_split is None else ""
    tested = f", {count(data.evaluation)} to evaluate{held_out}" if data.evaluation is not None else ""
    return (
        f"{count(data.train)} images of {len(data.label_names)} classes to learn from{tested}; "
        f"{model.num_parameters() / 1e6:.1f} million weights, {model.config.num_patches} tokens an image."
    )


def _facts(
    settings: TrainingSettings, data: ImageData, trainer: Trainer, metrics: Mapping[str, float]
) -> dict[str, Any]:
    skipped = torch.tensor(trainer.data_collator.num_skipped, device=trainer.args.device)
    return {
        "data": {
            "source": settings.data.data,
            "subset": settings.data.subset,
            "train_split": settings.data.train_split,
            "evaluation_split": data.evaluation_split,
            "num_train_images": len(data.train) if hasattr(data.train, "__len__") else None,
            "num_evaluation_images": len(data.evaluation) if hasattr(data.evaluation, "__len__") else None,
        },
        "started_from": settings.model.model or f"preset {settings.model.preset}",
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
        move_model(unfinished, output)
