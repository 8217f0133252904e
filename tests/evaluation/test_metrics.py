"""Metrics: accuracies without the network, metrics of multi-label classifiers, errors of regressors."""

import evaluate
import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, top_k_accuracy_score
from transformers import EvalPrediction

from dart_hf.evaluation.metrics import (
    Accuracy,
    TopKAccuracy,
    classification_accuracy,
    compute_metrics_for,
    likeliest_classes,
)


def test_accuracy_is_a_metric_of_evaluate(tmp_path, monkeypatch):
    """It writes no files."""
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path)
    metric = Accuracy()
    assert isinstance(metric, evaluate.Metric)
    assert metric.compute(predictions=[0, 1, 2, 2], references=[0, 1, 1, 2]) == {"accuracy": 0.75}
    for answers, classes in (([0, 1], [0, 1]), ([2], [1])):
        metric.add_batch(predictions=answers, references=classes)
    assert metric.compute()["accuracy"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="Mismatch"):
        Accuracy().compute(predictions=[0], references=[0, 1])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_top_k_is_a_metric_of_evaluate_that_needs_k_answers():
    metric = TopKAccuracy(2)
    assert isinstance(metric, evaluate.Metric)
    # The class of the third image is only the third answer.
    answers, classes = [[3, 0, 1], [1, 2, 0], [1, 2, 0], [0, 1, 2]], [0, 1, 0, 0]
    assert metric.compute(predictions=answers, references=classes) == {"top2_accuracy": 0.75}
    for answer, reference in zip(answers, classes, strict=True):
        metric.add_batch(predictions=np.array([answer]), references=[reference])
    assert metric.compute() == {"top2_accuracy": 0.75}
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        TopKAccuracy(0)
    with pytest.raises(ValueError, match="k=5 needs at least 5 classes for each image, got 3"):
        TopKAccuracy(5).compute(predictions=[[0, 1, 2]], references=[0])


@pytest.mark.parametrize("k", [1, 3, 5])
def test_top_k_of_logits_agrees_with_scikit_learn(k):
    rng = np.random.default_rng(0)
    logits, classes = rng.standard_normal((200, 8)), rng.integers(0, 6, 200)
    found = TopKAccuracy(k).compute(predictions=likeliest_classes(logits, k), references=classes)
    # No reference is class 6 or 7.
    assert found[f"top{k}_accuracy"] == pytest.approx(top_k_accuracy_score(classes, logits, k=k, labels=range(8)))


def test_equal_logits_are_ordered_by_class():
    """So the first of five answers is that of `argmax`, which the other accuracy uses."""
    logits = np.array([[1.0, 2.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert likeliest_classes(logits, 3).tolist() == [[1, 3, 0], [0, 1, 2]]
    assert likeliest_classes(logits, 9).tolist() == [[1, 3, 0, 2], [0, 1, 2, 3]]
    assert likeliest_classes(np.zeros((1, 1000)), 5).tolist() == [[0, 1, 2, 3, 4]]


def test_nan_is_never_right():
    logits = np.array([[np.nan, 1.0, 0.0], [0.0, 1.0, np.nan], [np.inf, 0.0, -np.inf]])
    assert likeliest_classes(logits, 2).tolist() == [[-1, -1], [-1, -1], [0, 1]]
    found = classification_accuracy(EvalPrediction(logits, np.array([0, 1, 0])))
    assert found == {"accuracy": pytest.approx(1 / 3)}


def test_classification_accuracy_has_top5_and_ignores_unreadable_images():
    logits = np.tile(np.arange(6.0), (4, 1))
    found = classification_accuracy(EvalPrediction(logits, np.array([5, 1, 0, 1])))
    assert found == {"accuracy": 0.25, "top5_accuracy": 0.75}
    assert set(classification_accuracy(EvalPrediction(logits[:, :5], np.array([4, 1, 0, 1])))) == {"accuracy"}
    # Images labelled -100 could not be read.
    assert classification_accuracy(EvalPrediction(logits, np.array([5, -100, 0, -100])))["accuracy"] == 0.5
    with pytest.raises(ValueError, match="none of the 4 images could be read"):
        classification_accuracy(EvalPrediction(logits, np.full(4, -100)))


def test_metrics_follow_from_the_problem_type():
    assert compute_metrics_for(None) is compute_metrics_for("single_label_classification") is classification_accuracy
    with pytest.raises(ValueError, match=r"problem_type must be one of single_label_classification, .*, got 'ranking'"):
        compute_metrics_for("ranking")


def multi_label(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return compute_metrics_for("multi_label_classification")(EvalPrediction(logits, labels))


def test_multi_label_metrics_agree_with_scikit_learn():
    """Of the six labels no image has the last, which therefore does not count."""
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((50, 6)), (rng.random((50, 6)) < 0.3).astype(np.float32)
    labels[:, 5] = 0
    found = multi_label(logits, labels)
    assert found == {
        "mean_average_precision": pytest.approx(average_precision_score(labels[:, :5], logits[:, :5]), abs=1e-6),
        "f1": pytest.approx(f1_score(labels[:, :5], logits[:, :5] > 0, average="macro"), abs=1e-6),
    }
    # An image labelled -100 could not be read.
    assert multi_label(np.vstack([logits, logits[:1]]), np.vstack([labels, np.full((1, 6), -100)])) == found
    expected = f1_score(labels[:, 0], logits[:, 0] > 0)
    assert multi_label(logits[:, :1], labels[:, :1])["f1"] == pytest.approx(expected, abs=1e-6)


def test_multi_label_metrics_of_a_diverged_model_are_low():
    found = multi_label(np.full((4, 2), np.nan), np.array([[1.0, 0], [0, 1], [1, 1], [0, 0]]))
    assert found == {"mean_average_precision": pytest.approx(0.5), "f1": 0}


def test_multi_label_metrics_need_a_label():
    for label, message in ((0, "no image has a label"), (-100, "none of the 2 images could be read")):
        with pytest.raises(ValueError, match=message):
            multi_label(np.zeros((2, 3)), np.full((2, 3), label))


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_regression_errors(shape):
    compute = compute_metrics_for("regression")
    labels = np.array([1.0, -2.0, np.nan], dtype=np.float32).reshape(shape)
    found = compute(EvalPrediction(np.array([[2.0], [1.0], [9.0]]), labels))
    assert found == {"mean_absolute_error": 2.0, "mean_squared_error": 5.0}
    with pytest.raises(ValueError, match="none of the 3 images could be read"):
        compute(EvalPrediction(np.zeros((3, 1)), np.full(shape, np.nan)))
