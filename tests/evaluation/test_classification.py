"""Accuracy and speed at several budgets: right numbers, from one pass, with classes matched by name."""

import hashlib
import io
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.tiny_models import tiny_classifier
from PIL import Image
from sklearn.datasets import load_digits

import dart_hf.evaluation.classification
from dart_hf import DartConfig, DartForImageClassification, DartImageProcessor
from dart_hf.data.sources import load_image_data
from dart_hf.evaluation.classification import (
    draw_accuracy,
    evaluate_classifier,
    parse_budgets,
    run_evaluation,
    table,
)
from dart_hf.modeling.region_scorer import RegionScorer

NAMES = ["zero", "one", "two", "three", "four", "five", "six"]
BUDGETS = [9, 16]
IMAGES = 26
# Between logits of the same image in batches of different sizes.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model() -> DartForImageClassification:
    return tiny_classifier(NAMES)


@pytest.fixture(scope="module")
def processor() -> DartImageProcessor:
    return DartImageProcessor(size=32, crop_size=32)


def encoded(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray((picture * 15).astype(np.uint8)).convert("RGB").resize((32, 32)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def data() -> Dataset:
    """Digits as undecoded images."""
    digits = load_digits(n_class=len(NAMES))
    rows = zip(digits.images[:IMAGES], digits.target[:IMAGES], strict=True)
    return Dataset.from_list(
        [{"image": {"bytes": encoded(image), "path": None}, "label": label} for image, label in rows]
    )


def logits_of(model, processor, data, num_patches: int, batch_size: int = 1, **settings) -> np.ndarray:
    """Logits (B, num_labels), computed without anything that is tested here."""
    images = [Image.open(io.BytesIO(row["image"]["bytes"])) for row in data]
    found = []
    with torch.no_grad():
        for start in range(0, len(images), batch_size):
            batch = processor(images[start : start + batch_size], return_tensors="pt").pixel_values
            found.append(model(batch, num_patches=num_patches).logits)
    return torch.cat(found).numpy()


def top(logits: np.ndarray, labels: list[int], k: int) -> float:
    return float(np.mean([label in np.argsort(row)[-k:] for row, label in zip(logits, labels, strict=True)]))


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_accuracies_are_those_of_the_images_one_by_one(model, processor, data):
    """The model's own rule would make them depend on their neighbours."""
    found = evaluate_classifier(model, processor, data, NAMES, BUDGETS, batch_size=8)
    assert (found.num_images, found.num_unreadable, found.score_normalization) == (IMAGES, 0, "image")
    assert (found.device, found.dtype, found.batch_size) == (model.device.type, "float32", 8)
    assert [result.num_patches for result in found.budgets] == BUDGETS
    for result in found.budgets:
        logits = logits_of(model, processor, data, result.num_patches)
        assert result.top1 == pytest.approx(top(logits, data["label"], 1))
        assert result.top5 == pytest.approx(top(logits, data["label"], 5))
        assert 0 < result.top1 < result.top5 < 1
    assert found.budgets[0].top1 != found.budgets[1].top1


def test_the_published_rule_by_choice(model, processor, data, monkeypatch):
    seen = []
    monkeypatch.setattr(
        dart_hf.evaluation.classification, "likeliest_classes", lambda logits, k: seen.append(logits) or logits[:, :5]
    )
    found = evaluate_classifier(model, processor, data, NAMES, [9], batch_size=8, score_normalization="batch")
    assert found.score_normalization == "batch"
    assert np.concatenate(seen) == pytest.approx(logits_of(model, processor, data, 9, batch_size=8), abs=TOLERANCE)
    assert np.concatenate(seen) != pytest.approx(logits_of(model, processor, data, 9), abs=100 * TOLERANCE)


def test_without_budgets_the_models_own(model, processor, data):
    found = evaluate_classifier(model, processor, data.select(range(2)), NAMES)
    assert [result.num_patches for result in found.budgets] == [model.config.num_patches]


def test_five_answers_only_where_there_are_more_classes(model, processor, data):
    config = DartConfig.from_dict({**model.config.to_dict(), "id2label": {0: "zero", 1: "one"}})
    found = evaluate_classifier(
        DartForImageClassification(config).eval(), processor, data.select([0, 1]), ["zero", "one"]
    )
    assert found.budgets[0].top5 is None


# --- one pass ---------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes only as told."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_each_batch_is_read_once_and_the_budgets_take_turns(model, processor, data, monkeypatch):
    clock, calls = Clock(), []

    def prepare(images, **settings):
        clock.now += 1000
        calls.append(len(images))
        return processor(images, **settings)

    def forward(pixel_values, num_patches):
        first = num_patches not in calls
        calls.append(num_patches)
        # The first call is slow, and so is the small batch at the end.
        clock.now += 500 if first or len(pixel_values) < 8 else num_patches
        return SimpleNamespace(logits=torch.zeros(len(pixel_values), len(NAMES)))

    monkeypatch.setattr(dart_hf.evaluation.classification, "time", clock)
    monkeypatch.setattr(model, "forward", forward)
    found = evaluate_classifier(model, prepare, data, NAMES, [9, 16, 25], batch_size=8)
    untimed = [8, 9, 9, 16, 16, 25, 25]
    assert calls == [*untimed, 8, 16, 25, 9, 8, 25, 9, 16, 2, 9, 16, 25]
    assert [result.images_per_second for result in found.budgets] == [8 / 9, 8 / 16, 8 / 25]


def test_a_small_batch_tells_no_speed(model, processor, data):
    found = evaluate_classifier(model, processor, data.select(range(3)), NAMES, BUDGETS, batch_size=4)
    assert [result.images_per_second for result in found.budgets] == [None, None]


@pytest.mark.parametrize("workers", [0, 1])
def test_tokens_without_memory_for_them(model, processor, data, workers):
    with pytest.raises(ValueError, match="num_patches: 99999999 tokens for each of 3 images need more memory than"):
        evaluate_classifier(model, processor, data.select(range(3)), NAMES, [9, 99999999], workers=workers)


def test_a_budget_named_twice_counts_once(model, processor, data):
    found = evaluate_classifier(model, processor, data.select([0]), NAMES, [16, 9, 16])
    assert [result.num_patches for result in found.budgets] == [16, 9]


def test_the_model_is_as_before(model, processor, data, monkeypatch):
    evaluate_classifier(model.train(), processor, data.select([0]), NAMES)
    assert not model.training
    assert model.config.score_normalization == "batch"
    monkeypatch.setattr(model, "forward", lambda *given, **settings: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate_classifier(model, processor, data.select([0]), NAMES)
    assert model.config.score_normalization == "batch"


# --- images that cannot be read ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def damaged(data) -> Dataset:
    """Four of the images, and a damaged one in the middle."""
    rows = data.select(range(4)).to_list()
    rows.insert(2, {"image": {"bytes": rows[2]["image"]["bytes"][:60], "path": "half.png"}, "label": 1})
    return Dataset.from_list(rows)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(model, processor, damaged, workers):
    with pytest.raises(OSError, match=r"^The image 'half.png' cannot be read") as caught:
        evaluate_classifier(model, processor, damaged, NAMES, workers=workers)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (5, 0), (3, 1)])
@pytest.mark.parametrize("rule", ["image", "batch"])
def test_an_unreadable_image_is_left_out_by_choice(model, processor, damaged, monkeypatch, batch_size, workers, rule):
    seen = []
    monkeypatch.setattr(
        dart_hf.evaluation.classification, "likeliest_classes", lambda logits, k: seen.append(logits) or logits[:, :5]
    )
    settings = {"batch_size": batch_size, "workers": workers, "score_normalization": rule, "skip_unreadable": True}
    found = evaluate_classifier(model, processor, damaged, NAMES, **settings)
    assert (found.num_images, found.num_unreadable) == (4, 1)
    readable = damaged.select([0, 1, 3, 4])
    if rule == "image":
        assert np.concatenate(seen) == pytest.approx(logits_of(model, processor, readable, 9), abs=TOLERANCE)
    elif batch_size == 5:
        # The picture that stands for it is not among its neighbours.
        assert np.concatenate(seen) == pytest.approx(
            logits_of(model, processor, readable, 9, batch_size=4), abs=TOLERANCE
        )


def test_nothing_can_be_read(model, processor, damaged):
    with pytest.raises(ValueError, match="the data has no images"):
        evaluate_classifier(model, processor, damaged.select([]), NAMES)
    with pytest.raises(ValueError, match="none of the 1 images could be read"):
        evaluate_classifier(model, processor, damaged.select([2]), NAMES, skip_unreadable=True)


# --- labels -----------------------------------------------------------------------------------------------------------


def test_classes_in_another_order_and_only_some(model, processor, data):
    names = ["Five", "zero", "THREE"]
    rows = [
        {**row, "label": names.index(name)} for row in data for name in names if NAMES[row["label"]] == name.lower()
    ]
    found = evaluate_classifier(model, processor, Dataset.from_list(rows), names)
    labels = [NAMES.index(names[row["label"]].lower()) for row in rows]
    assert found.budgets[0].top1 == pytest.approx(top(logits_of(model, processor, rows, 9), labels, 1))
    assert found.budgets[0].top5 == pytest.approx(top(logits_of(model, processor, rows, 9), labels, 5))


# --- rules and arguments ----------------------------------------------------------------------------------------------


def test_running_statistics_are_used_once_there_are_any(model, processor, data):
    statistics = model.scorer.statistics
    with pytest.raises(ValueError, match="needs statistics, and the model has none: 'dart-hf calibrate'"):
        evaluate_classifier(model, processor, data, NAMES, score_normalization="running")
    model.config.score_normalization = "running"
    try:
        assert evaluate_classifier(model, processor, data.select([0]), NAMES).score_normalization == "image"
        statistics.num_batches_tracked.fill_(1)
        assert evaluate_classifier(model, processor, data.select([0]), NAMES).score_normalization == "running"
    finally:
        statistics.num_batches_tracked.zero_()
        model.config.score_normalization = "batch"


def test_equal_regions_have_no_rule(model, processor, data, monkeypatch):
    monkeypatch.setattr(model.config, "partition", "uniform")
    monkeypatch.setattr(RegionScorer, "is_dead", True)
    found = evaluate_classifier(model, processor, data.select([0]), NAMES)
    assert (found.score_normalization, found.scorer_is_dead) == (None, False)
    with pytest.raises(ValueError, match=r"score_normalization: a model with partition='uniform' .*, got 'image'"):
        evaluate_classifier(model, processor, data, NAMES, score_normalization="image")


def test_a_dead_scorer_is_recorded(model, processor, data, monkeypatch):
    assert evaluate_classifier(model, processor, data.select([0]), NAMES).scorer_is_dead is False
    monkeypatch.setattr(RegionScorer, "is_dead", True)
    assert evaluate_classifier(model, processor, data.select([0]), NAMES).scorer_is_dead is True


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"budgets": [9, 0]}, "num_patches must be at least 1, got 0"),
        ({"score_normalization": "layer"}, "score_normalization must be one of running, image, batch, got 'layer'"),
    ],
)
def test_arguments_out_of_range(model, processor, data, settings, words):
    with pytest.raises(ValueError, match=words):
        evaluate_classifier(model, processor, data, NAMES, **settings)


def test_several_classes_for_an_image_have_no_accuracy(model, processor, data, monkeypatch):
    monkeypatch.setattr(model.config, "problem_type", "multi_label_classification")
    with pytest.raises(ValueError, match=r"needs one class for each image; .* 'multi_label_classification'"):
        evaluate_classifier(model, processor, data, NAMES)


def test_budgets_in_a_line():
    assert parse_budgets("121, 196,392") == [121, 196, 392]
    for text in ("121,abc", "0", "121,,196", "-1", "1.5", ""):
        with pytest.raises(ValueError, match=f"num_patches must be whole numbers of at least 1 .*, got '{text}'"):
            parse_budgets(text)


# --- reports ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(data, tmp_path_factory) -> Path:
    """The images in one folder for each class."""
    folder = tmp_path_factory.mktemp("photos")
    for number, row in enumerate(data):
        path = folder / "test" / NAMES[row["label"]] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row["image"]["bytes"])
    return folder


@pytest.fixture(scope="module")
def saved(model, processor, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_run_reports_facts(model, processor, data, photos, saved, tmp_path, monkeypatch):
    lines = []
    output, plot = tmp_path / "evaluation.json", tmp_path / "plot.png"
    monkeypatch.chdir(saved.parent)
    source, data_source = saved.name, os.path.relpath(photos, saved.parent)
    results = run_evaluation(source, data_source, [16, 9], batch_size=8, output=output, plot=plot, say=lines.append)
    assert json.loads(output.read_text()) == results
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"evaluation.json", "plot.png"}
    assert results["model"] == str(saved.resolve())
    assert results["weights_sha256"] == hashlib.sha256((saved / "model.safetensors").read_bytes()).hexdigest()
    assert results["data"] == {"source": str(photos.resolve()), "subset": None, "split": "test"}
    assert (results["num_images"], results["num_unreadable"], results["batch_size"]) == (IMAGES, 0, 8)
    assert results["score_normalization"] == "image"
    assert results["processor"] and results["command"]
    assert set(results["versions"]) >= {"dart-hf", "torch", "transformers"}
    expected = evaluate_classifier(model.cpu(), processor, data, NAMES, [16, 9])
    for found, result in zip(results["budgets"], expected.budgets, strict=True):
        assert found["num_patches"] == result.num_patches
        assert (found["top1"], found["top5"]) == pytest.approx((result.top1, result.top5))
        assert found["images_per_second"] > 0
    assert "'image' in place of the model's own, 'batch'" in lines[0]
    assert lines[1:-2] == list(table(results))
    assert lines[-2:] == [f"Wrote {output}", f"Wrote {plot}"]


def test_nothing_is_said_of_rules_where_there_are_none(model, processor, photos, tmp_path):
    """The weights are in no safetensors file, and neither the rule nor a digest is made up."""
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "partition": "uniform"}))
    lines = []
    results = run_evaluation(tmp_path, photos, limit=2, say=lines.append)
    assert (results["weights_sha256"], results["score_normalization"]) == (None, None)
    assert lines == list(table(results)) and lines[0].endswith("batch 32; equal regions")


def test_what_a_training_held_out(photos, saved, tmp_path):
    (split,) = photos.iterdir()
    results = run_evaluation(saved, split, held_out=0.3, say=lambda line: None)
    assert results["num_images"] == len(load_image_data(split, held_out=0.3).evaluation)
    assert results["data"]["split"] == "held out of train"
    for name in ("train", "test"):
        shutil.copytree(split, tmp_path / name)
    with pytest.raises(ValueError, match="held_out is for data without a split to evaluate with; here there is 'test'"):
        run_evaluation(saved, tmp_path, held_out=0.3)


def test_a_limit(photos, saved):
    lines = []
    results = run_evaluation(saved, photos, limit=5, split="test", score_normalization="image", say=lines.append)
    assert (results["num_images"], results["data"]["split"]) == (5, "test")
    assert lines == list(table(results))


def test_a_failed_write_leaves_the_results_before_it(photos, saved, tmp_path, monkeypatch):
    def fail(*given):
        raise OSError("no space left")

    output = tmp_path / "evaluation.json"
    output.write_text("{}")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        run_evaluation(saved, photos, limit=1, output=output, say=lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]
    assert output.read_text() == "{}"


RESULTS = {
    "model": "some/darvit",
    "data": {"source": "photos", "subset": None, "split": "test"},
    "num_images": 1234,
    "num_unreadable": 2,
    "score_normalization": "image",
    "scorer_is_dead": False,
    "dtype": "float32",
    "batch_size": 32,
    "processor": "a processor",
    "budgets": [
        {"num_patches": 392, "top1": 0.875, "top5": 0.9375, "images_per_second": 8.25},
        {"num_patches": 121, "top1": 0.75, "top5": None, "images_per_second": 100.0},
    ],
}


def test_the_table():
    assert list(table(RESULTS)) == [
        "1,234 images of photos (test); a processor, float32, batch 32; score normalisation 'image'",
        "2 more could not be read and are left out.",
        "  tokens     top-1     top-5  images/s",
        "     392    87.50%    93.75%       8.2",
        "     121    75.00%         –     100.0",
    ]
    unusual = {
        **RESULTS,
        "num_unreadable": 0,
        "score_normalization": None,
        "scorer_is_dead": True,
        "budgets": [{**RESULTS["budgets"][1], "images_per_second": None}],
    }
    assert list(table(unusual)) == [
        "1,234 images of photos (test); a processor, float32, batch 32; equal regions",
        "The scorer has no weights: these are results of regions that do not follow the image.",
        "  tokens     top-1     top-5  images/s",
        "     121    75.00%         –         –",
        "No speed: there was no full batch of 32 images.",
    ]


def test_the_plot():
    (axes,) = draw_accuracy({**RESULTS, "budgets": RESULTS["budgets"][:1] * 2}).axes
    assert [line.get_label() for line in axes.lines] == ["top-5", "top-1"]
    (axes,) = draw_accuracy({**RESULTS, "budgets": [{**entry, "top5": None} for entry in RESULTS["budgets"]]}).axes
    (line,) = axes.lines
    assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([121, 392], [75.0, 87.5])
    assert [text.get_text() for text in axes.texts] == ["100.0 images/s", "8.2 images/s"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"output": "none/out.json"}, "output: there is no folder 'none'"),
        ({"output": "."}, "output: . is a folder; give a file"),
        ({"plot": "out.doc"}, "'out.doc': its name must end in one of"),
        ({"split": "dev"}, "has no split 'dev'; it has 'test'"),
    ],
)
def test_a_mistake_leaves_nothing(photos, saved, tmp_path, monkeypatch, settings, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=words):
        run_evaluation(saved, photos, **settings)
    assert not list(tmp_path.iterdir())
