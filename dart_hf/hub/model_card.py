"""Model cards: what a repository on the Hub says of its model, made from the model and from records of its training.

A card is metadata (YAML) and text. Nothing in it is guessed: what no record tells is left out.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

PAPER = "https://arxiv.org/abs/2506.10390"
CITATION = """\
@article{yin2025dart,
  title   = {{DART}: Differentiable Dynamic Adaptive Region Tokenizer for Vision Foundation Models},
  author  = {Yin, Shicheng and Yin, Kaixuan and Liu, Yang and Chen, Weixing and Lin, Liang},
  journal = {arXiv preprint arXiv:2506.10390},
  year    = {2025}
}"""
TAGS = ("dart", "dart-hf", "vision", "adaptive-tokens", "region-tokenizer")
# A card with this line is made anew whenever its model is published; somebody who edits the card removes the line.
MADE = "<!-- Made by dart-hf publish, and made anew the next time. To keep what you change here, remove this line. -->"
# By which the cards are known that transformers makes: of push_to_hub, to be filled in, and of its Trainer.
TEMPLATES = ("[More Information Needed]", "generated automatically according to the information the Trainer had access")
# Metadata that is true of one set of weights only.
OF_THE_WEIGHTS = ("model-index", "metrics", "base_model", "datasets", "widget")
LICENSE = ("license", "license_name", "license_link")
# The Hub wants a name and an id of every data set that something was measured on.
PRIVATE = "private"
SHOWN_LABELS = 20

PARTITIONS = {
    "flow": "regions follow the content along bands; any number of tokens",
    "grid": "rows and columns follow the content; the number of tokens is rows × columns",
    "uniform": "equal regions whatever the image shows; the scorer is not run; any number of tokens",
}
NORMALIZATIONS = {
    "running": "Before scores become regions they are standardised by statistics of the training batches, so no "
    "prediction depends on the other images of its batch.",
    "image": "Before scores become regions each image's are standardised by their own mean and deviation, so no "
    "prediction depends on the other images of its batch.",
    "batch": "Before scores become regions they are standardised over the whole batch, in evaluation too, as published "
    "by the authors of DART: **an image's prediction depends on the other images of its batch.** Give the model one "
    'image at a time, or set `model.config.score_normalization = "image"`.',
}
NO_STATISTICS = " There are no such statistics yet: each image's own are used."


# What is published of `training.json` and `evaluation.json`, and its kinds. Whatever else they hold, tokens and paths
# among it, is nobody else's business.
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
    "metrics": dict.fromkeys(("eval_accuracy", "eval_top5_accuracy", "eval_loss"), Real),
    "skipped_images": int,
    "versions": VERSIONS,
}
EVALUATION = {
    "data": dict.fromkeys(("source", "subset", "split"), str),
    "weights_sha256": str,
    **dict.fromkeys(("num_images", "num_unreadable", "batch_size", "threads"), int),
    **dict.fromkeys(("score_normalization", "device", "dtype", "processor"), str),
    "budgets": [{"num_patches": int, "top1": Real, "top5": Real, "images_per_second": Real}],
    "versions": VERSIONS,
}


def read_record(path: Path, shape: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a JSON file that `shape` describes; empty where there is no file.

    Raises:
        ValueError: The file is damaged, or something in it is of another kind.
    """
    if not path.is_file():
        return {}
    try:
        return _shaped(json.loads(path.read_text(encoding="utf-8")), shape)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}); write it again or remove it.") from error


def _shaped(value: Any, shape: Any) -> Any:
    if isinstance(shape, dict) and isinstance(value, dict):
        return {key: _shaped(value[key], kind) for key, kind in shape.items() if value.get(key) is not None}
    if isinstance(shape, list) and isinstance(value, list):
        return [_shaped(entry, shape[0]) for entry in value]
    if isinstance(shape, type) and isinstance(value, shape) and (not isinstance(value, float) or isfinite(value)):
        return value
    raise ValueError(f"{json.dumps(value)[:50]} is unexpected")


@dataclass(frozen=True)
class Records:
    """What is known of a model beyond its weights.

    Args:
        training: `training.json`, as `dart-hf train` writes it, see [`read_record`].
        evaluation: `evaluation.json`, as `dart-hf evaluate --output` writes it.
        license: The weights' licence, by the Hub's name for it ("apache-2.0", "cc-by-nc-4.0").
        base_model: Hub id of the model that the training started from.
        dataset: Hub id of the training data.
        evaluation_dataset: Hub id of the data of `evaluation`.
        example: File name of an example image in the repository.
    """

    training: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    license: str | None = None
    base_model: str | None = None
    dataset: str | None = None
    evaluation_dataset: str | None = None
    example: str | None = None


@dataclass(frozen=True)
class Accuracy:
    """What a model reached with a number of tokens, as shares from 0 to 1."""

    num_patches: int
    top1: float
    top5: float | None


@dataclass(frozen=True)
class Measurement:
    """Accuracies on a data set.

    Args:
        data: Its name; None if that is not public.
        dataset: Its id on the Hub, if it is there.
        subset, split: The part of it; None if unknown.
        num_images: How many images; None if unknown.
        score_normalization: The rule that scores were standardised by; None if unknown.
    """

    data: str | None
    dataset: str | None
    subset: str | None
    split: str | None
    num_images: int | None
    score_normalization: str | None
    accuracies: Sequence[Accuracy]


def make_model_card(model: PreTrainedModel, repo_id: str, records: Records) -> ModelCard:
    """The card of a model.

    Args:
        model: A DART model.
        repo_id: Where on the Hub it is to stand.
        records: What else is known. Keys that they lack are left out of the card.
    """
    measured = find_measurement(model, records)
    metadata = card_metadata(model, repo_id, records, measured)
    parts = [_introduction(model, repo_id), _usage(model, repo_id), _facts(model)]
    if model.config.partition != "uniform":
        parts.append(_normalization(model))
    if measured:
        parts.append(_accuracy(model, measured))
    if records.training:
        parts.append(_training(records))
    parts.append(f"## Citation\n\n```bibtex\n{CITATION}\n```")
    text = "\n\n".join(parts)
    return _card(metadata, f"\n{MADE}\n\n{text}\n")


def _card(metadata: ModelCardData, text: str) -> ModelCard:
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n{text}")


def finished_card(made: ModelCard, earlier: Sequence[ModelCard]) -> ModelCard:
    """A new card, with what earlier ones have that no record tells.

    The first that somebody wrote keeps its text and metadata: it gets the new tags, other metadata where it has none,
    and always those of `OF_THE_WEIGHTS`. The licence is the new card's, else that of an earlier one.
    """
    earlier = sorted(earlier, key=is_replaceable)
    metadata = made.data.to_dict()
    if made.data.license is None:
        licensed = next((card.data.to_dict() for card in earlier if card.data.license), {})
        metadata |= {name: licensed[name] for name in LICENSE if name in licensed}
    if not earlier or is_replaceable(earlier[0]):
        return _card(ModelCardData(**metadata), made.text)
    written = earlier[0]
    kept = {name: value for name, value in written.data.to_dict().items() if name not in (*OF_THE_WEIGHTS, *LICENSE)}
    tags = [*(written.data.tags or []), *made.data.tags]
    return _card(ModelCardData(**{**metadata, **kept, "tags": tags}), written.text)


def is_replaceable(card: ModelCard) -> bool:
    """Whether nobody wrote a card: it is empty, or made here or by transformers."""
    return not card.text.strip() or any(mark in card.text for mark in (MADE, *TEMPLATES))


# --- metadata ---------------------------------------------------------------------------------------------------------


def card_metadata(
    model: PreTrainedModel, repo_id: str, records: Records, measured: Measurement | None
) -> ModelCardData:
    """What the Hub reads: task, library, tags, licence, base model, data, and the metrics as model-index."""
    results = [] if measured is None else _evaluation_results(measured)
    return ModelCardData(
        license=records.license,
        library_name="transformers",
        pipeline_tag=_task(model),
        tags=list(TAGS),
        base_model=records.base_model,
        datasets=[records.dataset] if records.dataset else None,
        metrics=["accuracy"] if results else None,
        model_name=repo_id.rpartition("/")[2] if results else None,
        eval_results=results or None,
        widget=[{"src": records.example, "example_title": "Example"}] if records.example else None,
    )


def _evaluation_results(measured: Measurement) -> list[EvalResult]:
    """One result per budget and metric."""
    results = []
    for accuracy in measured.accuracies:
        values = {"Top-1 accuracy": accuracy.top1, "Top-5 accuracy": accuracy.top5}
        for name, value in values.items():
            if value is not None:
                results.append(
                    EvalResult(
                        task_type="image-classification",
                        task_name="Image Classification",
                        dataset_type=measured.dataset or PRIVATE,
                        dataset_name=measured.data or PRIVATE,
                        dataset_config=measured.subset,
                        dataset_split=measured.split,
                        metric_type="accuracy",
                        metric_name=f"{name}, {accuracy.num_patches} tokens",
                        metric_value=value,
                        metric_args={"num_patches": accuracy.num_patches},
                    )
                )
    return results


def find_measurement(model: PreTrainedModel, records: Records) -> Measurement | None:
    """The accuracies of `evaluation.json`, else those at the end of the training; None where neither has any."""
    evaluation, training = records.evaluation, records.training
    accuracies = [
        Accuracy(budget["num_patches"], budget["top1"], budget.get("top5"))
        for budget in evaluation.get("budgets", [])
        if {"num_patches", "top1"} <= budget.keys()
    ]
    if accuracies:
        data, dataset = evaluation.get("data", {}), records.evaluation_dataset
        num_images, rule = evaluation.get("num_images"), evaluation.get("score_normalization")
    else:
        metrics = training.get("metrics", {})
        if "eval_accuracy" not in metrics:
            return None
        accuracies = [Accuracy(model.config.num_patches, metrics["eval_accuracy"], metrics.get("eval_top5_accuracy"))]
        data, dataset = training.get("data", {}), records.dataset
        num_images, rule = data.get("num_evaluation_images"), model.config.score_normalization
    return Measurement(
        data=data.get("source"),
        dataset=dataset,
        subset=data.get("subset"),
        split=data.get("split") or data.get("evaluation_split"),
        num_images=num_images,
        score_normalization=rule,
        accuracies=sorted(accuracies, key=lambda accuracy: accuracy.num_patches),
    )


def _task(model: PreTrainedModel) -> str:
    return "image-classification" if _classifies(model) else "image-feature-extraction"


def _classifies(model: PreTrainedModel) -> bool:
    return type(model).__name__.endswith("ForImageClassification")


# --- text -------------------------------------------------------------------------------------------------------------


def _introduction(model: PreTrainedModel, repo_id: str) -> str:
    purpose = f"classifies images into {model.config.num_labels} classes" if _classifies(model) else "encodes images"
    return (
        f"# {repo_id.rpartition('/')[2]}\n\n"
        f"This model {purpose}. It is a [DART]({PAPER}): a vision transformer whose tokens are regions of the image, "
        "as many as one asks for."
    )


def _usage(model: PreTrainedModel, repo_id: str) -> str:
    auto_class = "AutoModelForImageClassification" if _classifies(model) else "AutoModel"
    return f"""\
## Use

```python
from transformers import pipeline

run = pipeline("{_task(model)}", model="{repo_id}", trust_remote_code=True)
run("photo.jpg")
```

`trust_remote_code=True` runs the model's code, which this repository holds; it needs torch, torchvision and timm. Where
`dart_hf` is installed, `import dart_hf` takes its place, and every call may have its own number of tokens:

```python
import dart_hf
from transformers import AutoImageProcessor, {auto_class}

processor = AutoImageProcessor.from_pretrained("{repo_id}")
model = {auto_class}.from_pretrained("{repo_id}")
inputs = processor("photo.jpg", return_tensors="pt")
outputs = model(**inputs, num_patches={model.config.num_patches}, output_regions=True)
```"""


def _facts(model: PreTrainedModel) -> str:
    config = model.config
    frozen = ", frozen" if config.scorer_frozen else ""
    rows = {
        "Parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        "Image size": f"{config.image_size} × {config.image_size} pixels",
        "Tokens": f"{config.num_patches}, or as many as a call asks for",
        "Partition": f"`{config.partition}`: {PARTITIONS[config.partition]}",
        "Scorer": f"`{config.scorer}`{frozen}, on a grid of {config.score_grid_size} × {config.score_grid_size}",
    }
    if _classifies(model):
        rows["Labels"] = _labels(config.id2label)
    return f"## Model\n\n{_table(('', ''), rows.items())}"


def _labels(id2label: Mapping[int, str]) -> str:
    labels = [_in_one_cell(id2label[index]) for index in sorted(id2label)]
    more = f" and {len(labels) - SHOWN_LABELS} more" if len(labels) > SHOWN_LABELS else ""
    return ", ".join(labels[:SHOWN_LABELS]) + more


def _normalization(model: PreTrainedModel) -> str:
    rule = model.config.score_normalization
    text = f"## Score normalisation\n\n`{rule}`: {NORMALIZATIONS[rule]}"
    if rule == "running" and not model.scorer.statistics.num_batches_tracked:
        text += NO_STATISTICS
    return text


def _accuracy(model: PreTrainedModel, measured: Measurement) -> str:
    images = f"{measured.num_images:,} images of " if measured.num_images else ""
    data = _in_one_cell(measured.data or "data that are not public")
    part = ", ".join(name for name in (measured.subset, measured.split) if name)
    text = f"## Accuracy\n\nOn {images}{data}{f' ({part})' if part else ''}"
    if measured.score_normalization not in (None, model.config.score_normalization):
        text += f", with `{measured.score_normalization}` score normalisation"
    rows = [
        (accuracy.num_patches, f"{accuracy.top1:.1%}", "–" if accuracy.top5 is None else f"{accuracy.top5:.1%}")
        for accuracy in measured.accuracies
    ]
    return f"{text}:\n\n{_table(('tokens', 'top-1', 'top-5'), rows)}"


def _training(records: Records) -> str:
    training = records.training
    data = training.get("data", {})
    rows = {
        "Started from": training.get("started_from"),
        "Data": data.get("source"),
        "Subset": data.get("subset"),
        "Split": data.get("train_split"),
        "Images": data.get("num_train_images"),
        "Unreadable images left out": training.get("skipped_images") or None,
        "Steps": training.get("steps"),
        "Epochs": training.get("epochs"),
        **{f"`{name}`": value for name, value in training.get("settings", {}).items()},
        **training.get("versions", {}),
    }
    known = [(name, _in_one_cell(value)) for name, value in rows.items() if value is not None]
    return f"## Training\n\n{_table(('', ''), known)}"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _in_one_cell(value: object) -> str:
    """A value as text that breaks no table."""
    return " ".join(str(value).split()).replace("|", "\\|")
