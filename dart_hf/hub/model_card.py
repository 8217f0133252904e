"""Model cards: the README.md of a model on the Hub, made from the model and the records of its training.

A card has metadata (YAML) and text. It says nothing that no record says.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from dart_hf.hub.records import Measurement, Metric, Records, find_measurement
from dart_hf.modeling.configuration_region import SCORERS_WITHOUT_TRUNK

PAPER = "https://arxiv.org/abs/2506.10390"
CITATION = """\
@article{yin2025dart,
  title   = {{DART}: Differentiable Dynamic Adaptive Region Tokenizer for Vision Foundation Models},
  author  = {Yin, Shicheng and Yin, Kaixuan and Liu, Yang and Chen, Weixing and Lin, Liang},
  journal = {arXiv preprint arXiv:2506.10390},
  year    = {2025}
}"""
TAGS = ("dart", "dart-hf", "vision", "adaptive-tokens", "region-tokenizer")
TASK_TAGS = {"multi_label_classification": ["multi-label-classification"], "regression": ["image-regression"]}
# Publishing replaces a card that has a comment with this start.
GENERATED = "<!-- Made by dart-hf publish,"
COMMENT = f"{GENERATED} which replaces this text the next time. To keep your changes, remove this line. -->"
# Phrases in the cards that transformers writes: its template, and its Trainer's.
TEMPLATES = ("[More Information Needed]", "generated automatically according to the information the Trainer had access")
# Metadata that belongs to one set of weights.
WEIGHTS_METADATA = ("model-index", "metrics", "base_model", "datasets", "widget")
LICENSE = ("license", "license_name", "license_link")
# The Hub requires a name and an id of the data set of every result.
PRIVATE = "private"
SHOWN_LABELS = 20

PARTITIONS = {
    "flow": "regions follow the content along bands; any number of tokens",
    "grid": "rows and columns follow the content; the number of tokens is rows × columns",
    "uniform": "equal regions for every image, without the scorer; any number of tokens",
}
NORMALIZATIONS = {
    "running": "Scores are standardised by statistics of the training batches. No prediction depends on the other "
    "images of its batch.",
    "image": "The scores of each image are standardised by their own mean and deviation. No prediction depends on the "
    "other images of its batch.",
    "batch": "Scores are standardised over the whole batch, in evaluation too, as published by the authors of DART. "
    "**A prediction depends on the other images of its batch.** Give the model one image at a time, or set "
    '`model.config.score_normalization = "image"`.',
}
NO_STATISTICS = " There are no such statistics yet, so those of each image are used."


def make_model_card(model: PreTrainedModel, repo_id: str, records: Records) -> ModelCard:
    """Make the card of a DART model for the repository `repo_id`. Entries that `records` lack are left out."""
    measured = find_measurement(model, records)
    metadata = card_metadata(model, repo_id, records, measured)
    parts = [_introduction(model, repo_id), _usage(model, repo_id), _facts(model)]
    if model.config.partition != "uniform":
        parts.append(_normalization(model))
    if measured:
        parts.append(_evaluation(model, measured))
    if records.distillation:
        parts.append(_distillation(records.distillation))
    if records.training:
        parts.append(_training(records))
    parts.append(f"## Citation\n\n```bibtex\n{CITATION}\n```")
    text = "\n\n".join(parts)
    return _card(metadata, f"\n{COMMENT}\n\n{text}\n")


def _card(metadata: ModelCardData, text: str) -> ModelCard:
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n{text}")


def merge_cards(new: ModelCard, earlier: Sequence[ModelCard]) -> ModelCard:
    """Merge a new card with earlier ones.

    If somebody wrote one of the earlier cards, the first such card keeps its text and metadata, and gets the new tags,
    the metadata that it lacks, and all of `WEIGHTS_METADATA`. The licence is the new card's, else an earlier one's.
    """
    earlier = sorted(earlier, key=is_replaceable)
    metadata = new.data.to_dict()
    if new.data.license is None:
        licensed = next((card.data.to_dict() for card in earlier if card.data.license), {})
        metadata |= {name: licensed[name] for name in LICENSE if name in licensed}
    if not earlier or is_replaceable(earlier[0]):
        return _card(ModelCardData(**metadata), new.text)
    written = earlier[0]
    kept = {name: value for name, value in written.data.to_dict().items() if name not in (*WEIGHTS_METADATA, *LICENSE)}
    tags = [*(written.data.tags or []), *new.data.tags]
    return _card(ModelCardData(**{**metadata, **kept, "tags": tags}), written.text)


def is_replaceable(card: ModelCard) -> bool:
    """Return True if no person wrote the card: it is empty, or generated here or by transformers."""
    return not card.text.strip() or any(mark in card.text for mark in (GENERATED, *TEMPLATES))


# --- metadata ---------------------------------------------------------------------------------------------------------


def card_metadata(
    model: PreTrainedModel, repo_id: str, records: Records, measured: Measurement | None
) -> ModelCardData:
    """Make the metadata that the Hub reads: task, library, tags, licence, base model, data, and results."""
    results = [] if measured is None else _evaluation_results(measured)
    return ModelCardData(
        license=records.license,
        library_name="transformers",
        pipeline_tag=_task(model),
        tags=[*TAGS, *TASK_TAGS.get(model.config.problem_type, [])],
        base_model=records.base_model,
        datasets=[records.dataset] if records.dataset else None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        model_name=repo_id.rpartition("/")[2] if results else None,
        eval_results=results or None,
        widget=[{"src": records.example, "example_title": "Example"}] if records.example else None,
    )


def _evaluation_results(measured: Measurement) -> list[EvalResult]:
    """Make one result per budget and metric."""
    return [
        EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type=measured.dataset or PRIVATE,
            dataset_name=measured.data or PRIVATE,
            dataset_config=measured.subset,
            dataset_split=measured.split,
            metric_type=metric.hub_type,
            metric_name=f"{metric.title}, {num_patches} tokens",
            metric_value=values[metric.name],
            metric_args={"num_patches": num_patches},
        )
        for num_patches, values in measured.values.items()
        for metric in measured.metrics
        if metric.name in values
    ]


def _task(model: PreTrainedModel) -> str:
    return "image-classification" if _is_classifier(model) else "image-feature-extraction"


def _is_classifier(model: PreTrainedModel) -> bool:
    return type(model).__name__.endswith("ForImageClassification")


# --- text -------------------------------------------------------------------------------------------------------------


def _introduction(model: PreTrainedModel, repo_id: str) -> str:
    num_labels = model.config.num_labels
    purpose = {
        "multi_label_classification": f"finds which of {num_labels} labels an image has",
        "regression": f"predicts {'a number' if num_labels == 1 else f'{num_labels} numbers'} from an image",
    }.get(model.config.problem_type, f"classifies images into {num_labels} classes")
    if not _is_classifier(model):
        purpose = "encodes images"
    return (
        f"# {repo_id.rpartition('/')[2]}\n\n"
        f"This model {purpose}. It is a [DART]({PAPER}): a vision transformer whose tokens are regions of the image. "
        "The number of tokens can be chosen for each call."
    )


def _usage(model: PreTrainedModel, repo_id: str) -> str:
    auto_class = "AutoModelForImageClassification" if _is_classifier(model) else "AutoModel"
    return f"""\
## Use

```python
from transformers import pipeline

run = pipeline("{_task(model)}", model="{repo_id}", trust_remote_code=True)
run("photo.jpg")
```

`trust_remote_code=True` runs the model code of this repository, which needs torch, torchvision and timm. With `dart_hf`
installed, `import dart_hf` replaces it. Every call can use another number of tokens:

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
    frozen = ", frozen" if config.scorer_frozen and config.scorer not in SCORERS_WITHOUT_TRUNK else ""
    rows = {
        "Parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        "Image size": f"{config.image_size} × {config.image_size} pixels",
        "Tokens": f"{config.num_patches} by default, any number per call",
        "Partition": f"`{config.partition}`: {PARTITIONS[config.partition]}",
        "Scorer": f"`{config.scorer}`{frozen}, on a grid of {config.score_grid_size} × {config.score_grid_size}",
    }
    if _is_classifier(model):
        rows["Outputs" if config.problem_type == "regression" else "Labels"] = _labels(config.id2label)
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


def _evaluation(model: PreTrainedModel, measured: Measurement) -> str:
    images = f"{measured.num_images:,} images of " if measured.num_images else ""
    data = _in_one_cell(measured.data or "data that are not public")
    part = ", ".join(name for name in (measured.subset, measured.split) if name)
    text = f"## Evaluation\n\nOn {images}{data}{f' ({part})' if part else ''}"
    if measured.score_normalization not in (None, model.config.score_normalization):
        text += f", with `{measured.score_normalization}` score normalisation"
    head = ("tokens", *(metric.column for metric in measured.metrics))
    rows = [
        (num_patches, *(_shown(values.get(metric.name), metric) for metric in measured.metrics))
        for num_patches, values in measured.values.items()
    ]
    return f"{text}:\n\n{_table(head, rows)}"


def _shown(value: float | None, metric: Metric) -> str:
    if value is None:
        return "–"
    return f"{value:.1%}" if metric.is_share else f"{value:.4g}"


def _distillation(record: Mapping[str, Any]) -> str:
    data = record.get("data", {})
    rows = {
        "Distilled from": record.get("started_from"),
        "Data": data.get("source"),
        "Images, without labels": data.get("num_train_images"),
        "Trained": record.get("trained"),
        "Steps": record.get("steps"),
        "Images in a step": record.get("batch_size"),
        "Learning rate": record.get("learning_rate"),
        "Pixels on a side": record.get("image_size"),
        "Pixels on a side for the original": record.get("teacher_size"),
    }
    known = [(name, _in_one_cell(value)) for name, value in rows.items() if value is not None]
    text = f"## Distillation\n\n{_table(('', ''), known)}"
    kinds = {"pooled": "features of the image", "patches": "features of its patches"}
    compared = [
        (
            budget.get("num_patches"),
            *(f"{budget[f'{kind}_before']:.3f} → {budget[f'{kind}_after']:.3f}" for kind in kinds),
        )
        for budget in record.get("similarity", [])
    ]
    if not compared:
        return text
    return (
        f"{text}\n\nCosine similarity to the original on {data.get('num_held_out_images', 'some')} held-out images, "
        f"before → after:\n\n{_table(('tokens', *kinds.values()), compared)}"
    )


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
    """Format a value so that it does not break a table."""
    return " ".join(str(value).split()).replace("|", "\\|")
