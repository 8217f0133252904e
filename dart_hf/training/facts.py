"""Facts of a training, for `training.json` and the model card."""

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

import torch
from transformers import Trainer
from transformers.modeling_utils import PreTrainedModel

from dart_hf.data.image_data import ImageData
from dart_hf.files import absolute_source
from dart_hf.training.settings import TrainingSettings

METRICS = (
    "eval_accuracy",
    "eval_top5_accuracy",
    "eval_mean_average_precision",
    "eval_f1",
    "eval_mean_absolute_error",
    "eval_mean_squared_error",
    "eval_loss",
)
PACKAGES = ("dart-hf", "torch", "transformers", "datasets", "timm")


def training_facts(settings: TrainingSettings, data: ImageData, trainer: Trainer) -> dict[str, Any]:
    """The facts of a training, without its metrics. Every process must call this."""
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
        "started_from": (
            absolute_source(settings.model.model) if settings.model.model else f"preset {settings.model.preset}"
        ),
        "settings": settings.given,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "metrics": {},
        "skipped_images": int(trainer.accelerator.reduce(skipped)),
        "versions": package_versions(),
    }


def package_versions() -> dict[str, str]:
    """The versions of Python and of the packages that a training's result depends on."""
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def with_metrics(facts: Mapping[str, Any], metrics: Mapping[str, float]) -> dict[str, Any]:
    """The facts with the results of an evaluation."""
    return {**facts, "metrics": {name: metrics[name] for name in METRICS if name in metrics}}


def summary(model: PreTrainedModel, data: ImageData) -> str:
    """One line about the images and the model, for the start of a run."""
    held_out = " (held out of them)" if data.evaluation_split is None else ""
    trained, tested = (
        f"{len(split):,} images" if hasattr(split, "__len__") else "a stream of images"
        for split in (data.train, data.evaluation or [])
    )
    also = f", {tested} to evaluate{held_out}" if data.evaluation is not None else ""
    classes = "Regression" if data.problem_type == "regression" else f"{len(data.label_names)} classes"
    return (
        f"{classes}: {trained} to learn from{also}; "
        f"{model.num_parameters() / 1e6:.1f} million weights, {model.config.num_patches} tokens an image."
    )
