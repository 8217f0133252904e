"""Metrics of classifiers, multi-label classifiers and regressors.

The accuracies are metrics of the package `evaluate`, without the download from the Hub that `evaluate.load` would make.
Mean average precision and F1 are torchmetrics'.
"""

from collections.abc import Callable
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from transformers import EvalPrediction

from dart_hf.data.collator import IGNORED_LABEL

# The second accuracy counts an image as right if its class is among this many answers.
TOP = 5
NO_CLASS = -1
# A multi-label classifier gives an image every label whose probability is above this.
LABEL_THRESHOLD = 0.5


class _OfflineMetric(evaluate.Metric):
    """A metric of `evaluate` that is defined here and keeps its inputs in memory."""

    inputs: str
    prediction: Any

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description=self.inputs,
            features=datasets.Features({"predictions": self.prediction, "references": datasets.Value("int32")}),
        )


class Accuracy(_OfflineMetric):
    """The share of predictions that are right.

    It computes the same as `evaluate.load("accuracy")`, which needs a network to fetch its script from the Hub:
    `Accuracy().compute(predictions=[0, 1], references=[0, 0])["accuracy"]`.
    """

    inputs = "predictions and references: class indices, the same number of both."
    prediction = datasets.Value("int32")

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.equal(predictions, references)))}


class TopKAccuracy(_OfflineMetric):
    """The share of images whose class is among the first `k` answers; the key is `top5_accuracy` for `k=5`.

    A prediction is a list of classes, the likeliest first, as [`likeliest_classes`] returns them:
    `TopKAccuracy(2).compute(predictions=[[3, 0], [1, 2]], references=[0, 0])["top2_accuracy"]`. It takes classes and
    not logits, because `evaluate` stores what it is given, and a thousand logits for each of 50,000 images are slow to
    store.
    """

    inputs = "predictions: at least k class indices for each reference, the likeliest first; references: class indices."
    prediction = datasets.Sequence(datasets.Value("int32"))

    def __init__(self, k: int = TOP) -> None:
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}.")
        self.k = k
        super().__init__()

    def _compute(self, predictions: list[list[int]], references: list[int]) -> dict[str, float]:
        fewest = min(map(len, predictions))
        if fewest < self.k:
            raise ValueError(f"k={self.k} needs at least {self.k} classes for each image, got {fewest}.")
        hits = [reference in answers[: self.k] for answers, reference in zip(predictions, references, strict=True)]
        return {f"top{self.k}_accuracy": float(np.mean(hits))}


def likeliest_classes(logits: np.ndarray, k: int) -> np.ndarray:
    """Logits (B, num_labels) -> the k likeliest classes of each image (B, k), or all classes if there are fewer.

    Equal logits are ordered by class, as `argmax` does. An image with NaN among its logits gets -1 everywhere.
    """
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
    return np.where(np.isnan(logits).any(axis=-1, keepdims=True), NO_CLASS, order)


def compute_metrics_for(problem_type: str | None) -> Callable[[EvalPrediction], dict[str, float]]:
    """The `compute_metrics` function of a `Trainer` for a kind of task.

    Args:
        problem_type: As in a model's configuration: `"single_label_classification"` or None gives
            [`classification_accuracy`], `"multi_label_classification"` gives [`multi_label_metrics`], `"regression"`
            gives [`regression_errors`].

    Raises:
        ValueError: `problem_type` is none of these.
    """
    functions = {
        None: classification_accuracy,
        "single_label_classification": classification_accuracy,
        "multi_label_classification": multi_label_metrics,
        "regression": regression_errors,
    }
    if problem_type not in functions:
        accepted = ", ".join(name for name in functions if name)
        raise ValueError(f"problem_type must be one of {accepted}, got {problem_type!r}.")
    return functions[problem_type]


def classification_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The accuracy of logits (B, num_labels) against labels (B,), for `Trainer`'s `compute_metrics`.

    Images labelled -100 could not be read and do not count.

    Returns:
        `accuracy` and, if there are more than five classes, `top5_accuracy`.

    Raises:
        ValueError: No image counts.
    """
    logits, labels = _counted(prediction, prediction.label_ids != IGNORED_LABEL)
    classes = likeliest_classes(logits, TOP)
    results = Accuracy().compute(predictions=classes[:, 0], references=labels)
    if logits.shape[1] > TOP:
        results |= TopKAccuracy(TOP).compute(predictions=classes, references=labels)
    return results


def multi_label_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Metrics of logits (B, num_labels) for labels (B, num_labels) in {0, 1}, for `Trainer`'s `compute_metrics`.

    Both numbers are averages over the labels that at least one image has: there is nothing to find of the others. A row
    of labels with -100 is that of an image that could not be read, and does not count. NaN counts as the lowest logit.

    Returns:
        `mean_average_precision`: the area under each label's curve of precision against recall, averaged over labels.
        `f1`: the harmonic mean of precision and recall where probabilities above 0.5 count as found, averaged over
        labels.

    Raises:
        ValueError: No image counts, or no image has a label.
    """
    # Imported here because it is slow to import, and other tasks do not need it.
    from torchmetrics.functional.classification import multilabel_average_precision, multilabel_f1_score

    logits, labels = _counted(prediction, (prediction.label_ids != IGNORED_LABEL).all(axis=1))
    labels = torch.from_numpy(labels).long()
    present = labels.any(dim=0)
    if not present.any():
        raise ValueError("There is nothing to evaluate: no image has a label.")
    logits = torch.from_numpy(logits).double().nan_to_num(nan=-torch.inf)
    # The checks would refuse a single label.
    arguments = (logits.sigmoid()[:, present], labels[:, present], int(present.sum()))
    precision = multilabel_average_precision(*arguments, average="macro", validate_args=False)
    f1 = multilabel_f1_score(*arguments, threshold=LABEL_THRESHOLD, average="macro", validate_args=False)
    return {"mean_average_precision": precision.item(), "f1": f1.item()}


def regression_errors(prediction: EvalPrediction) -> dict[str, float]:
    """The errors of predicted numbers (B, num_labels) against labels (B,) or (B, num_labels).

    Images whose label is NaN could not be read and do not count.

    Returns:
        `mean_absolute_error`, in the units of the labels, and `mean_squared_error`, in their squares: averages over
        images and numbers.

    Raises:
        ValueError: No image counts.
    """
    labels = prediction.label_ids.reshape(len(prediction.label_ids), -1)
    numbers, labels = _counted(EvalPrediction(prediction.predictions, labels), ~np.isnan(labels).any(axis=1))
    differences = numbers.astype(np.float64) - labels
    return {
        "mean_absolute_error": float(np.abs(differences).mean()),
        "mean_squared_error": float(np.square(differences).mean()),
    }


def _counted(prediction: EvalPrediction, counted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The predictions and labels of the images that count, (B,) of booleans."""
    if not counted.any():
        raise ValueError(f"There is nothing to evaluate: none of the {len(counted)} images could be read.")
    return prediction.predictions[counted], prediction.label_ids[counted]
