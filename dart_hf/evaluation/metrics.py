"""Metrics, on `evaluate`'s machinery but without its download."""

from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score
from transformers import EvalPrediction

from dart_hf.data.collator import IGNORED_LABEL

# How many answers the second accuracy grants, where there are more classes than that.
TOP = 5
NO_CLASS = -1


class _OfflineMetric(evaluate.Metric):
    """A metric of `evaluate` that is installed here, and that keeps what it is given in memory."""

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

    `evaluate.load("accuracy")` fetches a script from the Hub and runs it; this is the same metric where there is no
    network. Use it as any metric: `Accuracy().compute(predictions=[0, 1], references=[0, 0])["accuracy"]`.
    """

    inputs = "predictions and references: class indices, as many of one as of the other."
    prediction = datasets.Value("int32")

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class TopKAccuracy(_OfflineMetric):
    """The share of images whose class is among the first `k` answers; the key is `top5_accuracy` for `k=5`.

    A prediction is the classes of an image, the likeliest first, as [`likeliest_classes`] gives them:
    `TopKAccuracy(2).compute(predictions=[[3, 0], [1, 2]], references=[0, 0])["top2_accuracy"]`. Classes, and not the
    logits, because a thousand logits for each of 50,000 images take `evaluate` forty times as long as five classes.
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
    """Logits (B, num_labels) -> the k likeliest classes of each image (B, k), or all of them if they are fewer.

    Equal logits count in the order of the classes, as for `argmax`. An image with NaN among its logits has no answer:
    -1 throughout.
    """
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
    return np.where(np.isnan(logits).any(axis=-1, keepdims=True), NO_CLASS, order)


def classification_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """`Trainer`'s `compute_metrics`: the accuracy of logits (B, num_labels) against labels (B,).

    Images labelled -100 could not be read and do not count.

    Returns:
        `accuracy` and, where there are more than five classes, `top5_accuracy`.

    Raises:
        ValueError: No image counts.
    """
    counted = prediction.label_ids != IGNORED_LABEL
    labels, logits = prediction.label_ids[counted], prediction.predictions[counted]
    if not len(labels):
        raise ValueError(f"There is nothing to evaluate: none of the {len(counted)} images could be read.")
    classes = likeliest_classes(logits, TOP)
    results = Accuracy().compute(predictions=classes[:, 0], references=labels)
    if logits.shape[1] > TOP:
        results |= TopKAccuracy(TOP).compute(predictions=classes, references=labels)
    return results
