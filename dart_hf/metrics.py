"""Metrics, on `evaluate`'s machinery but without its download."""

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score
from transformers import EvalPrediction


class Accuracy(evaluate.Metric):
    """The share of predictions that are right.

    `evaluate.load("accuracy")` fetches a script from the Hub and runs it; this is the same metric where there is no
    network. Use it as any metric: `Accuracy().compute(predictions=[0, 1], references=[0, 0])["accuracy"]`.
    """

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="The share of predictions that are right.",
            citation="",
            inputs_description="predictions and references: class indices, as many of one as of the other.",
            features=datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


def classification_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """`Trainer`'s `compute_metrics`: the accuracy of logits (B, num_labels) against labels (B,)."""
    return Accuracy().compute(predictions=np.argmax(prediction.predictions, axis=-1), references=prediction.label_ids)
