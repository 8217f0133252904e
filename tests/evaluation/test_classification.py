"""Metrics and speed at several budgets, in one pass, with classes matched by name."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.tiny_models import tiny_classifier
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score

import dart_hf.evaluation.classification
from dart_hf import DartForImageClassification
from dart_hf.evaluation.classification import evaluate_classifier
from dart_hf.modeling.region_scorer import RegionScorer

NAMES = ["zero", "one", "two", "three", "four", "five", "six"]
BUDGETS = [9, 16]
IMAGES = 16
# For logits of the same image in batches of different sizes.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model() -> DartForImageClassification:
    return tiny_classifier(NAMES)


@pytest.fixture
def seen(monkeypatch) -> list[np.ndarray]:
    """The logits of every batch that is evaluated."""
    found = []
    name = "dart_hf.evaluation.classification.likeliest_classes"
    monkeypatch.setattr(name, lambda logits, k: found.append(logits) or logits[:, :5])
    return found


def logits_of(model, processor, data, num_patches: int, batch_size: int = 1, **settings) -> np.ndarray:
    """Logits (B, num_labels), computed without the code under test."""
    images = [Image.open(io.BytesIO(row["image"]["bytes"])) for row in data]
    found = []
    with torch.no_grad():
        for start in range(0, len(images), batch_size):
            batch = processor(images[start : start + batch_size], return_tensors="pt").pixel_values
            found.append(model(batch, num_patches=num_patches).logits)
    return torch.cat(found).numpy()


def with_labels(data: Dataset, labels: list) -> Dataset:
    return data.select(range(len(labels))).remove_columns("label").add_column("label", labels)


def top(logits: np.ndarray, labels: list[int], k: int) -> float:
    return float(np.mean([label in np.argsort(row)[-k:] for row, label in zip(logits, labels, strict=True)]))


def test_accuracies_are_those_of_single_images(model, processor, data):
    """With the model's own rule for scores they would depend on the other images of a batch."""
    # With 9 tokens the model is right about every other image, and some labels are its last answers.
    answers = logits_of(model, processor, data, 9).argsort().tolist()
    data = with_labels(data, [row[-1] if number % 2 else row[number % 4] for number, row in enumerate(answers)])
    found = evaluate_classifier(model, processor, data, NAMES, BUDGETS, batch_size=8)
    assert (found.num_images, found.num_unreadable, found.score_normalization) == (IMAGES, 0, "image")
    assert (found.device, found.dtype, found.batch_size) == (model.device.type, "float32", 8)
    assert [result.num_patches for result in found.budgets] == BUDGETS
    for result in found.budgets:
        logits = logits_of(model, processor, data, result.num_patches)
        expected = top(logits, data["label"], 1), top(logits, data["label"], 5)
        assert (result.top1, result.top5) == pytest.approx(expected)
    assert found.budgets[0].top1 == 0.5 < found.budgets[0].top5 < 1
    assert found.budgets[1].metrics != found.budgets[0].metrics


def test_published_score_rule_is_used_on_request(model, processor, data, seen):
    found = evaluate_classifier(model, processor, data, NAMES, [9], batch_size=8, score_normalization="batch")
    assert found.score_normalization == "batch"
    assert np.concatenate(seen) == pytest.approx(logits_of(model, processor, data, 9, batch_size=8), abs=TOLERANCE)
    assert np.concatenate(seen) != pytest.approx(logits_of(model, processor, data, 9), abs=100 * TOLERANCE)


def test_default_budget_is_the_models_own_and_repeated_ones_count_once(processor, data):
    model, data = tiny_classifier(["no", "yes"]), data.select(range(2))
    (result,) = evaluate_classifier(model, processor, data, ["no", "yes"]).budgets
    assert (result.num_patches, result.top5) == (model.config.num_patches, None)
    found = evaluate_classifier(model, processor, data, ["no", "yes"], [16, 9, 16], batch_size=4)
    assert [result.num_patches for result in found.budgets] == [16, 9]
    # There was no full batch.
    assert [result.images_per_second for result in found.budgets] == [None, None]


def test_each_batch_is_read_once_and_budgets_take_turns(model, processor, data, monkeypatch):
    # The time passes only where the test says so.
    clock, calls = SimpleNamespace(now=0.0), []

    def prepare(images, **settings):
        clock.now += 1000
        calls.append(len(images))
        return processor(images, **settings)

    def forward(pixel_values, num_patches):
        first = num_patches not in calls
        calls.append(num_patches)
        # The first call is slow, and so is the small batch at the end.
        clock.now += 500 if first or len(pixel_values) < 6 else num_patches
        return SimpleNamespace(logits=torch.zeros(len(pixel_values), len(NAMES)))

    monkeypatch.setattr(dart_hf.evaluation.classification, "synchronized_time", lambda: clock.now)
    monkeypatch.setattr(model, "forward", forward)
    found = evaluate_classifier(model, prepare, data, NAMES, [9, 16, 25], batch_size=6)
    untimed = [6, 9, 9, 16, 16, 25, 25]
    assert calls == [*untimed, 6, 16, 25, 9, 4, 25, 9, 16]
    assert [result.images_per_second for result in found.budgets] == [6 / 9, 6 / 16, 6 / 25]


def test_model_keeps_its_score_rule(model, processor, data, monkeypatch):
    evaluate_classifier(model.train(), processor, data.select([0]), NAMES)
    assert not model.training
    assert model.config.score_normalization == "batch"
    monkeypatch.setattr(model, "forward", lambda *given, **settings: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate_classifier(model, processor, data.select([0]), NAMES)
    assert model.config.score_normalization == "batch"


@pytest.mark.parametrize(("batch_size", "workers", "rule"), [(1, 0, "image"), (3, 1, "image"), (5, 0, "batch")])
def test_unreadable_image_is_named_or_left_out(model, processor, damaged, seen, batch_size, workers, rule):
    settings = {"batch_size": batch_size, "workers": workers, "score_normalization": rule}
    with pytest.raises(OSError, match=r"^The image 'half.png' cannot be read") as caught:
        evaluate_classifier(model, processor, damaged, NAMES, **settings)
    assert "Traceback" not in str(caught.value)
    seen.clear()
    found = evaluate_classifier(model, processor, damaged, NAMES, **settings, skip_unreadable=True)
    assert (found.num_images, found.num_unreadable) == (4, 1)
    # The placeholder of the damaged image is not part of the batch.
    readable, together = damaged.select([0, 1, 3, 4]), 4 if rule == "batch" else 1
    assert np.concatenate(seen) == pytest.approx(logits_of(model, processor, readable, 9, together), abs=TOLERANCE)


def test_data_without_readable_images_is_refused(model, processor, damaged):
    with pytest.raises(ValueError, match="the data has no images"):
        evaluate_classifier(model, processor, damaged.select([]), NAMES)
    with pytest.raises(ValueError, match="none of the 1 images could be read"):
        evaluate_classifier(model, processor, damaged.select([2]), NAMES, skip_unreadable=True)


def test_classes_are_matched_by_name(model, processor, data):
    names = ["Five", "zero", "THREE"]
    rows = [{**row, "label": names.index(n)} for row in data for n in names if NAMES[row["label"]] == n.lower()]
    (result,) = evaluate_classifier(model, processor, Dataset.from_list(rows), names).budgets
    logits, labels = logits_of(model, processor, rows, 9), [NAMES.index(names[row["label"]].lower()) for row in rows]
    assert (result.top1, result.top5) == pytest.approx((top(logits, labels, 1), top(logits, labels, 5)))


def test_running_statistics_are_used_if_there_are_any(model, processor, data, monkeypatch):
    data = data.select([0])
    with pytest.raises(ValueError, match="needs statistics, and the model has none: 'dart-hf calibrate'"):
        evaluate_classifier(model, processor, data, NAMES, score_normalization="running")
    monkeypatch.setattr(model.config, "score_normalization", "running")
    assert evaluate_classifier(model, processor, data, NAMES).score_normalization == "image"
    model.scorer.statistics.num_batches_tracked.fill_(1)
    assert evaluate_classifier(model, processor, data, NAMES).score_normalization == "running"
    model.scorer.statistics.num_batches_tracked.zero_()


def test_dead_scorer_is_recorded_and_uniform_partition_has_no_score_rule(model, processor, data, monkeypatch):
    assert evaluate_classifier(model, processor, data.select([0]), NAMES).scorer_is_dead is False
    monkeypatch.setattr(RegionScorer, "is_dead", True)
    assert evaluate_classifier(model, processor, data.select([0]), NAMES).scorer_is_dead is True
    monkeypatch.setattr(model.config, "partition", "uniform")
    found = evaluate_classifier(model, processor, data.select([0]), NAMES)
    assert (found.score_normalization, found.scorer_is_dead) == (None, False)
    with pytest.raises(ValueError, match=r"score_normalization: a model with partition='uniform' .*, got 'image'"):
        evaluate_classifier(model, processor, data, NAMES, score_normalization="image")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"budgets": [9, 0]}, "num_patches must be at least 1, got 0"),
        ({"budgets": [9, 99999999]}, "num_patches: 99999999 tokens for each of 16 images need more memory than"),
        ({"score_normalization": "layer"}, "score_normalization must be one of running, image, batch, got 'layer'"),
    ],
)
def test_arguments_out_of_range_are_refused(model, processor, data, settings, words):
    with pytest.raises(ValueError, match=words):
        evaluate_classifier(model, processor, data, NAMES, **settings)


def test_multi_label_metrics_count_the_models_labels(model, processor, data, monkeypatch):
    """The data has some of the model's labels, in another order. scikit-learn gives the same numbers."""
    monkeypatch.setattr(model.config, "problem_type", "multi_label_classification")
    names, labels = ["three", "zero"], [[0], [1], [0, 1], [], [1]]
    found = evaluate_classifier(model, processor, with_labels(data, labels), names, [9], batch_size=2)
    assert found.problem_type == "multi_label_classification"
    truth = np.array([[0 in row, 1 in row] for row in labels])
    logits = logits_of(model, processor, data.select(range(5)), 9)[:, [NAMES.index(name) for name in names]]
    (result,) = found.budgets
    assert result.metrics == {
        "mean_average_precision": pytest.approx(average_precision_score(truth, logits)),
        "f1": pytest.approx(f1_score(truth, logits > 0, average="macro")),
    }
    assert result.to_dict() == {"num_patches": 9, **result.metrics, "images_per_second": result.images_per_second}


def test_regression_metrics_are_errors(processor, data, damaged):
    model = tiny_classifier(["age"], problem_type="regression")
    labels = [0.5, 2.0, -1.0, 0.0]
    found = evaluate_classifier(model, processor, with_labels(data, labels), [], [9])
    errors = logits_of(model, processor, data.select(range(4)), 9)[:, 0] - labels
    assert found.budgets[0].metrics == {
        "mean_absolute_error": pytest.approx(np.abs(errors).mean(), rel=1e-4),
        "mean_squared_error": pytest.approx(np.square(errors).mean(), rel=1e-4),
    }
    rows = with_labels(damaged, [*labels, 1.0])
    skipped = evaluate_classifier(model, processor, rows, [], skip_unreadable=True)
    assert (skipped.num_images, skipped.num_unreadable) == (4, 1)
    assert np.isfinite(list(skipped.budgets[0].metrics.values())).all()
