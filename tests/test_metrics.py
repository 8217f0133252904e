"""Accuracy on `evaluate`'s machinery, without the network."""

import evaluate
import numpy as np
import pytest
from transformers import EvalPrediction

from dart_hf.metrics import Accuracy, classification_accuracy


def test_it_is_a_metric_of_evaluate():
    metric = Accuracy()
    assert isinstance(metric, evaluate.Metric)
    assert metric.compute(predictions=[0, 1, 2, 2], references=[0, 1, 1, 2]) == {"accuracy": 0.75}


def test_batches_add_up():
    metric = Accuracy()
    metric.add_batch(predictions=[0, 1], references=[0, 1])
    metric.add_batch(predictions=[2], references=[1])
    assert metric.compute()["accuracy"] == pytest.approx(2 / 3)


def test_it_writes_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path)
    Accuracy().compute(predictions=[0], references=[0])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_as_many_predictions_as_references():
    with pytest.raises(ValueError, match="Mismatch"):
        Accuracy().compute(predictions=[0], references=[0, 1])


def test_of_logits():
    logits = np.array([[0.1, 0.9], [2.0, -1.0], [0.0, 1.0]])
    assert classification_accuracy(EvalPrediction(logits, np.array([1, 0, 0])))["accuracy"] == pytest.approx(2 / 3)
