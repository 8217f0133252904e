"""Accuracies on `evaluate`'s machinery, without the network."""

import evaluate
import numpy as np
import pytest
from sklearn.metrics import top_k_accuracy_score
from transformers import EvalPrediction

from dart_hf.evaluation.metrics import Accuracy, TopKAccuracy, classification_accuracy, likeliest_classes


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


def test_top_k_is_a_metric_of_evaluate():
    metric = TopKAccuracy(2)
    assert isinstance(metric, evaluate.Metric)
    # The third image's class is only the third answer.
    answers, classes = [[3, 0, 1], [1, 2, 0], [1, 2, 0], [0, 1, 2]], [0, 1, 0, 0]
    assert metric.compute(predictions=answers, references=classes) == {"top2_accuracy": 0.75}
    for answer, reference in zip(answers, classes, strict=True):
        metric.add_batch(predictions=np.array([answer]), references=[reference])
    assert metric.compute() == {"top2_accuracy": 0.75}


@pytest.mark.parametrize("k", [1, 3, 5])
def test_top_k_of_logits_is_that_of_scikit_learn(k):
    rng = np.random.default_rng(0)
    logits, classes = rng.standard_normal((200, 8)), rng.integers(0, 6, 200)
    found = TopKAccuracy(k).compute(predictions=likeliest_classes(logits, k), references=classes)
    # Classes 6 and 7 are among no references.
    assert found[f"top{k}_accuracy"] == pytest.approx(top_k_accuracy_score(classes, logits, k=k, labels=range(8)))


def test_top_k_needs_k_answers():
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        TopKAccuracy(0)
    with pytest.raises(ValueError, match="k=5 needs at least 5 classes for each image, got 3"):
        TopKAccuracy(5).compute(predictions=[[0, 1, 2]], references=[0])


def test_equal_logits_count_in_the_order_of_the_classes():
    """As for argmax, so that the first of five answers is the one that the other accuracy looks at."""
    logits = np.array([[1.0, 2.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert likeliest_classes(logits, 3).tolist() == [[1, 3, 0], [0, 1, 2]]
    assert likeliest_classes(logits, 9).tolist() == [[1, 3, 0, 2], [0, 1, 2, 3]]
    assert likeliest_classes(np.zeros((1, 1000)), 5).tolist() == [[0, 1, 2, 3, 4]]


def test_nan_is_never_right():
    logits = np.array([[np.nan, 1.0, 0.0], [0.0, 1.0, np.nan], [np.inf, 0.0, -np.inf]])
    assert likeliest_classes(logits, 2).tolist() == [[-1, -1], [-1, -1], [0, 1]]
    found = classification_accuracy(EvalPrediction(logits, np.array([0, 1, 0])))
    assert found == {"accuracy": pytest.approx(1 / 3)}


def test_five_answers_where_there_are_more_classes():
    logits = np.tile(np.arange(6.0), (4, 1))
    found = classification_accuracy(EvalPrediction(logits, np.array([5, 1, 0, 1])))
    assert found == {"accuracy": 0.25, "top5_accuracy": 0.75}
    assert set(classification_accuracy(EvalPrediction(logits[:, :5], np.array([4, 1, 0, 1])))) == {"accuracy"}


def test_images_that_could_not_be_read_do_not_count():
    logits = np.tile(np.arange(6.0), (3, 1))
    found = classification_accuracy(EvalPrediction(logits, np.array([5, -100, 0])))
    assert found == {"accuracy": 0.5, "top5_accuracy": 0.5}
    with pytest.raises(ValueError, match="none of the 3 images could be read"):
        classification_accuracy(EvalPrediction(logits, np.full(3, -100)))
