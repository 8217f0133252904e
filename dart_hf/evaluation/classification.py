"""Evaluate a model at several token budgets, in one pass over a data set: its metrics and its speed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import torch
from transformers import BaseImageProcessor, EvalPrediction, PreTrainedModel

from dart_hf.data.batches import image_batches
from dart_hf.data.collator import ImageClassificationCollator, is_labelled
from dart_hf.data.labels import class_names, match_labels
from dart_hf.environment import synchronized_time
from dart_hf.evaluation.metrics import TOP, Accuracy, TopKAccuracy, compute_metrics_for, likeliest_classes

SCORE_NORMALIZATIONS = ("running", "image", "batch")


@dataclass(frozen=True)
class BudgetResult:
    """The results of a model with one token budget.

    Args:
        num_patches: The budget.
        metrics: Name -> value. For single-label classification `top1` and `top5`, shares from 0 to 1 (`top5` is None
            for a model with five classes or fewer); else what [`compute_metrics_for`] gives.
        images_per_second: The speed of the model alone, see [`evaluate_classifier`]; None if no batch was full.
    """

    num_patches: int
    metrics: dict[str, float | None]
    images_per_second: float | None

    @property
    def top1(self) -> float:
        """The share of images whose class is the model's first answer."""
        return self.metrics["top1"]

    @property
    def top5(self) -> float | None:
        """The share of images whose class is among the model's first five answers."""
        return self.metrics["top5"]

    def to_dict(self) -> dict[str, Any]:
        """All fields, with the metrics among them."""
        return {"num_patches": self.num_patches, **self.metrics, "images_per_second": self.images_per_second}


@dataclass(frozen=True)
class Evaluation:
    """The results of [`evaluate_classifier`].

    Args:
        problem_type: The model's task, in transformers' words.
        num_images: Number of images that were evaluated.
        num_unreadable: Number of images that could not be read and were left out.
        score_normalization: The rule that standardised the scores; None for a model with `partition="uniform"`.
        scorer_is_dead: The scorer never got weights, so the regions did not follow the image.
        device, dtype: Where the model ran, and the type of its weights.
        batch_size: Images in a batch.
        budgets: The results, one for each budget.
    """

    problem_type: str
    num_images: int
    num_unreadable: int
    score_normalization: str | None
    scorer_is_dead: bool
    device: str
    dtype: str
    batch_size: int
    budgets: list[BudgetResult]


@dataclass
class _Outputs:
    """The outputs of a model with one budget: an answer and a label for each image, and the time of each batch.

    The answers of single-label classification are the likeliest classes, and not the logits, which would take gigabytes
    for a large data set with many classes.
    """

    task: str
    num_labels: int
    answers: list[np.ndarray] = field(default_factory=list)
    labels: list[np.ndarray] = field(default_factory=list)
    # Images and seconds of each batch.
    calls: list[tuple[int, float]] = field(default_factory=list)

    def add(self, logits: torch.Tensor, labels: torch.Tensor, seconds: float) -> None:
        logits = logits.float().cpu().numpy()
        self.answers.append(likeliest_classes(logits, TOP) if self.task == "single_label_classification" else logits)
        self.labels.append(labels.numpy())
        self.calls.append((len(labels), seconds))

    def metrics(self) -> dict[str, float | None]:
        answers, labels = np.concatenate(self.answers), np.concatenate(self.labels)
        if self.task != "single_label_classification":
            return compute_metrics_for(self.task)(EvalPrediction(answers, labels))
        top1 = Accuracy().compute(predictions=answers[:, 0], references=labels)["accuracy"]
        if self.num_labels <= TOP:
            return {"top1": top1, "top5": None}
        top5 = TopKAccuracy(TOP).compute(predictions=answers, references=labels)
        return {"top1": top1, "top5": top5[f"top{TOP}_accuracy"]}

    def images_per_second(self, batch_size: int) -> float | None:
        # A smaller batch says little about speed: the last one, or one without its unreadable images.
        full = [seconds for images, seconds in self.calls if images == batch_size]
        return batch_size * len(full) / sum(full) if full else None


def evaluate_classifier(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    data: datasets.Dataset,
    label_names: Sequence[str],
    budgets: Sequence[int] = (),
    batch_size: int = 32,
    score_normalization: str | None = None,
    skip_unreadable: bool = False,
    workers: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Run a model on a data set with every token budget. Each batch is read once; the budgets take turns to be first.

    The metrics follow from the model's task: accuracies for one class per image, mean average precision and F1 for
    several, errors for a regression.

    The speed is that of the forward pass alone, over full batches that are on the model's device already. Reading,
    preparing and moving images is not timed. Every budget has one untimed call first. On a CPU, `workers` compete with
    the model; use none of them to measure speed.

    Args:
        model: A DART classifier or regressor; it is put in evaluation mode. It chooses among all its classes, even if
            the data has only some of them.
        image_processor: Prepares the images.
        data: Columns `image` and `label`: an index into `label_names`, a list of indices for a multi-label model, a
            number or a list of numbers for a regression.
        label_names: The data's classes; [`match_labels`] finds them among the model's. A regression does not use them.
        budgets: Numbers of tokens; by default the model's own.
        batch_size: Images in a batch.
        score_normalization: How scores are standardised: `"running"`, `"image"`, or `"batch"`, which makes the results
            depend on the batch size and the order of the images. By default the model's own rule, with two exceptions
            that use `"image"`: `"batch"`, because `"image"` gives the result that `"batch"` gives for single images, as
            in [`predict`]; and `"running"` if the model has no statistics yet. Not for a model with
            `partition="uniform"`, which does not use its scores.
        skip_unreadable: Leave out images that cannot be read, instead of raising.
        workers: Number of processes that read images besides this one.
        progress: Show a progress bar on a terminal.

    Raises:
        ValueError: An argument is out of range, the labels do not match the model's, or no image could be read.
        OSError: An image cannot be read and `skip_unreadable` is False.
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("workers", workers, 0),
        *(("num_patches", budget, 1) for budget in budgets),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
    if not len(data):
        raise ValueError("There is nothing to evaluate: the data has no images.")
    task = problem_type_of(model)
    budgets = list(dict.fromkeys(budgets)) or [model.config.num_patches]
    rule = _score_rule(model, score_normalization)
    num_labels = model.config.num_labels if task == "regression" else len(label_names)
    collate = ImageClassificationCollator(
        image_processor, num_labels, skip_unreadable=skip_unreadable, problem_type=task
    )
    classes = None if task == "regression" else _classes_of_model(label_names, model)

    model.eval()
    outputs = {budget: _Outputs(task, model.config.num_labels) for budget in budgets}
    num_unreadable = 0
    with _score_rule_applied(model, rule), torch.inference_mode():
        for number, batch in enumerate(image_batches(data, collate, batch_size, workers, progress)):
            pixel_values, labels = batch["pixel_values"], batch["labels"]
            readable = is_labelled(labels)
            if not readable.all():
                num_unreadable += int((~readable).sum())
                pixel_values, labels = pixel_values[readable], labels[readable]
            if not len(labels):
                continue
            pixel_values = pixel_values.to(model.device)
            labels = _labels_of_model(labels, classes, model.config.num_labels)
            turn = number % len(budgets)
            for budget in (*budgets[turn:], *budgets[:turn]):
                if not outputs[budget].calls:
                    _try_budget(model, pixel_values, budget)
                started = synchronized_time()
                logits = model(pixel_values, num_patches=budget).logits
                outputs[budget].add(logits, labels, synchronized_time() - started)
    if num_unreadable == len(data):
        raise ValueError(f"There is nothing to evaluate: none of the {len(data)} images could be read.")
    return Evaluation(
        problem_type=task,
        num_images=len(data) - num_unreadable,
        num_unreadable=num_unreadable,
        score_normalization=rule,
        scorer_is_dead=rule is not None and model.scorer.is_dead,
        device=model.device.type,
        dtype=str(model.dtype).removeprefix("torch."),
        batch_size=batch_size,
        budgets=[
            BudgetResult(budget, outputs[budget].metrics(), outputs[budget].images_per_second(batch_size))
            for budget in budgets
        ],
    )


def problem_type_of(model: PreTrainedModel) -> str:
    """The task of a model. If its configuration does not name it, transformers' rule decides: one label is a number."""
    if model.config.problem_type is not None:
        return model.config.problem_type
    return "regression" if model.config.num_labels == 1 else "single_label_classification"


def _classes_of_model(label_names: Sequence[str], model: PreTrainedModel) -> torch.Tensor:
    """The model's class of each of the data's classes."""
    try:
        return torch.tensor(match_labels(label_names, class_names(model)))
    except ValueError as error:
        raise ValueError(f"The labels of the data do not match the model's: {error}") from error


def _labels_of_model(labels: torch.Tensor, classes: torch.Tensor | None, num_labels: int) -> torch.Tensor:
    """Labels of the data -> the model's: indices (B,), zeros and ones (B, num_labels), or numbers as they are."""
    if classes is None:
        return labels
    if labels.ndim == 1:
        return classes[labels]
    return labels.new_zeros(len(labels), num_labels).index_copy_(1, classes, labels)


def _try_budget(model: PreTrainedModel, pixel_values: torch.Tensor, num_patches: int) -> None:
    """The untimed first call, which shows whether there is enough memory."""
    try:
        model(pixel_values, num_patches=num_patches)
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        raise ValueError(
            f"num_patches: {num_patches} tokens for each of {len(pixel_values)} images need more memory than there is; "
            "give fewer, or a smaller batch_size."
        ) from error


def _score_rule(model: PreTrainedModel, asked: str | None) -> str | None:
    """The rule that standardises the scores in this evaluation."""
    if asked not in (None, *SCORE_NORMALIZATIONS):
        raise ValueError(f"score_normalization must be one of {', '.join(SCORE_NORMALIZATIONS)}, got {asked!r}.")
    if model.config.partition == "uniform":
        if asked is not None:
            raise ValueError(
                f"score_normalization: a model with partition='uniform' does not use its scores, got {asked!r}."
            )
        return None
    has_statistics = model.scorer.statistics.num_batches_tracked.item() > 0
    if asked == "running" and not has_statistics:
        raise ValueError(
            "score_normalization='running' needs statistics, and the model has none: 'dart-hf calibrate' takes them "
            "from images."
        )
    rule = asked or model.config.score_normalization
    replaced = rule == "batch" or (rule == "running" and not has_statistics)
    return "image" if asked is None and replaced else rule


@contextmanager
def _score_rule_applied(model: PreTrainedModel, rule: str | None) -> Iterator[None]:
    before = model.config.score_normalization
    model.config.score_normalization = rule or before
    try:
        yield
    finally:
        model.config.score_normalization = before
