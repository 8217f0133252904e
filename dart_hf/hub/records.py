"""Records: facts about a model beyond its weights, from its training and evaluation.

`dart-hf train` writes `training.json` into the model's folder, `dart-hf dartify` writes `distillation.json`, and
`dart-hf evaluate --output` writes `evaluation.json`.
Only the entries that are listed here are published. Records hold more, such as access tokens and local paths.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel


@dataclass(frozen=True)
class Metric:
    """A metric of `training.json` and `evaluation.json`.

    Args:
        name: Its key in `evaluation.json`.
        training_name: Its key in `training.json`.
        title: Its name in the card's metadata.
        column: Its name in the card's table.
        hub_type: The Hub's name for metrics of this kind.
        is_share: The value lies between 0 and 1 and is shown as a percentage.
    """

    name: str
    training_name: str
    title: str
    column: str
    hub_type: str
    is_share: bool = True


METRICS = (
    Metric("top1", "eval_accuracy", "Top-1 accuracy", "top-1", "accuracy"),
    Metric("top5", "eval_top5_accuracy", "Top-5 accuracy", "top-5", "accuracy"),
    Metric(
        *("mean_average_precision", "eval_mean_average_precision"),
        *("Mean average precision", "mAP", "mean_average_precision"),
    ),
    Metric("f1", "eval_f1", "F1", "F1", "f1"),
    Metric("mean_absolute_error", "eval_mean_absolute_error", "Mean absolute error", "MAE", "mae", is_share=False),
    Metric("mean_squared_error", "eval_mean_squared_error", "Mean squared error", "MSE", "mse", is_share=False),
)

# The entries of a record that are published, and their types.
SETTINGS = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim"),
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("reference_batch_size", "bf16", "fp16", "seed"),
    *("auto_augment", "crop_scale", "horizontal_flip", "color_jitter", "random_erasing", "repeated_augmentation"),
    *("mixup", "cutmix", "label_smoothing_factor", "drop_path_rate", "ema_decay"),
    *("layer_decay", "scorer_learning_rate"),
    *("distillation", "distillation_alpha", "distillation_temperature"),
)
VERSIONS = dict.fromkeys(("python", "dart-hf", "torch", "torchvision", "transformers", "datasets", "timm"), str)
TRAINING = {
    "data": {
        **dict.fromkeys(("source", "subset", "train_split", "evaluation_split"), str),
        **dict.fromkeys(("num_train_images", "num_evaluation_images"), int),
    },
    "started_from": str,
    "settings": dict.fromkeys(SETTINGS, object),
    "steps": int,
    "epochs": Real,
    "metrics": dict.fromkeys(("eval_loss", *(metric.training_name for metric in METRICS)), Real),
    "skipped_images": int,
    "versions": VERSIONS,
}
EVALUATION = {
    "data": dict.fromkeys(("source", "subset", "split"), str),
    "weights_sha256": str,
    **dict.fromkeys(("num_images", "num_unreadable", "batch_size", "threads"), int),
    **dict.fromkeys(("score_normalization", "device", "dtype", "processor"), str),
    "budgets": [
        {"num_patches": int, "images_per_second": Real, **dict.fromkeys((metric.name for metric in METRICS), Real)}
    ],
    "versions": VERSIONS,
}

DISTILLATION = {
    "data": {"source": str, **dict.fromkeys(("num_train_images", "num_held_out_images"), int)},
    **dict.fromkeys(("started_from", "trained"), str),
    **dict.fromkeys(("steps", "batch_size", "image_size", "teacher_size", "skipped_images"), int),
    "learning_rate": Real,
    "similarity": [
        {
            "num_patches": int,
            **dict.fromkeys(("pooled_before", "pooled_after", "patches_before", "patches_after"), Real),
        }
    ],
    "versions": VERSIONS,
}


@dataclass(frozen=True)
class Records:
    """Facts about a model beyond its weights.

    Args:
        training: `training.json`, read by [`read_record`].
        evaluation: `evaluation.json`, read by [`read_record`].
        distillation: `distillation.json`, read by [`read_record`].
        license: The weights' licence by the Hub's name for it ("apache-2.0", "cc-by-nc-4.0").
        base_model: Hub id of the model that the training started from.
        dataset: Hub id of the training data.
        evaluation_dataset: Hub id of the data of `evaluation`.
        example: File name of an example image in the repository.
    """

    training: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    distillation: Mapping[str, Any] = field(default_factory=dict)
    license: str | None = None
    base_model: str | None = None
    dataset: str | None = None
    evaluation_dataset: str | None = None
    example: str | None = None


@dataclass(frozen=True)
class Measurement:
    """A model's metrics on a data set.

    Args:
        data: Name of the data set; None if it is not public.
        dataset: Its id on the Hub, if it is there.
        subset, split: The part of the data set; None if unknown.
        num_images: The number of images; None if unknown.
        score_normalization: The rule that standardised the scores; None if unknown.
        values: For each number of tokens, the values of the metrics by `Metric.name`.
    """

    data: str | None
    dataset: str | None
    subset: str | None
    split: str | None
    num_images: int | None
    score_normalization: str | None
    values: Mapping[int, Mapping[str, float]]

    @property
    def metrics(self) -> Sequence[Metric]:
        """The metrics that were measured with any number of tokens."""
        return [metric for metric in METRICS if any(metric.name in values for values in self.values.values())]


def read_record(path: Path, shape: Mapping[str, Any]) -> dict[str, Any]:
    """Read the entries of a JSON file that `shape` lists; return an empty record if there is no file.

    Raises:
        ValueError: The file is damaged, or an entry has another type than `shape` says.
    """
    if not path.is_file():
        return {}
    try:
        return _select(json.loads(path.read_text(encoding="utf-8")), shape)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}); write it again or remove it.") from error


def _select(value: Any, shape: Any) -> Any:
    if isinstance(shape, dict) and isinstance(value, dict):
        return {key: _select(value[key], kind) for key, kind in shape.items() if value.get(key) is not None}
    if isinstance(shape, list) and isinstance(value, list):
        return [_select(entry, shape[0]) for entry in value]
    if isinstance(shape, type) and isinstance(value, shape) and (not isinstance(value, float) or isfinite(value)):
        return value
    raise ValueError(f"{json.dumps(value)[:50]} is unexpected")


def find_measurement(model: PreTrainedModel, records: Records) -> Measurement | None:
    """Return the metrics of `evaluation.json`, else those at the end of the training, else None."""
    names = [metric.name for metric in METRICS]
    values = {
        budget["num_patches"]: {name: budget[name] for name in names if name in budget}
        for budget in records.evaluation.get("budgets", [])
        if "num_patches" in budget
    }
    values = {num_patches: values[num_patches] for num_patches in sorted(values) if values[num_patches]}
    if values:
        data, dataset = records.evaluation.get("data", {}), records.evaluation_dataset
        num_images, rule = records.evaluation.get("num_images"), records.evaluation.get("score_normalization")
    else:
        found = records.training.get("metrics", {})
        values = {metric.name: found[metric.training_name] for metric in METRICS if metric.training_name in found}
        if not values:
            return None
        values = {model.config.num_patches: values}
        data, dataset = records.training.get("data", {}), records.dataset
        num_images, rule = data.get("num_evaluation_images"), model.config.score_normalization
    return Measurement(
        data=data.get("source"),
        dataset=dataset,
        subset=data.get("subset"),
        split=data.get("split") or data.get("evaluation_split"),
        num_images=num_images,
        score_normalization=rule,
        values=values,
    )
