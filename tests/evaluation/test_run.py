"""Evaluation runs: what they report and write, and which images they take."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import tiny_classifier
from PIL import Image

from dart_hf import DartForImageClassification
from dart_hf.data.held_out import HELD_OUT_FILE, held_out_record
from dart_hf.data.image_data import load_image_data
from dart_hf.evaluation import evaluate_classifier, run_evaluation
from dart_hf.evaluation.report import draw_metrics, table
from dart_hf.evaluation.run import parse_budgets

NAMES = ["zero", "one", "two", "three", "four", "five", "six"]
IMAGES = 16


@pytest.fixture(scope="module")
def model() -> DartForImageClassification:
    return tiny_classifier(NAMES)


@pytest.fixture(scope="module")
def photos(data, tmp_path_factory) -> Path:
    """The images, in one folder for each class."""
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


def copy_with_settings(saved: Path, folder: Path, **settings) -> Path:
    shutil.copytree(saved, folder)
    config = json.loads((saved / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))
    return folder


def test_results_are_returned_printed_and_written(model, processor, data, photos, saved, tmp_path, monkeypatch):
    lines, output, plot = [], tmp_path / "evaluation.json", tmp_path / "plot.png"
    monkeypatch.chdir(saved.parent)
    source, data_source = saved.name, os.path.relpath(photos, saved.parent)
    results = run_evaluation(source, data_source, [16, 9], batch_size=8, output=output, plot=plot, report=lines.append)
    assert json.loads(output.read_text()) == results
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"evaluation.json", "plot.png"}
    expected = {
        "model": str(saved.resolve()),
        "weights_sha256": hashlib.sha256((saved / "model.safetensors").read_bytes()).hexdigest(),
        "data": {"source": str(photos.resolve()), "subset": None, "split": "test"},
        **{"num_images": IMAGES, "num_unreadable": 0, "batch_size": 8, "score_normalization": "image"},
    }
    assert {name: results[name] for name in expected} == expected
    assert results["processor"] and results["command"]
    assert set(results["versions"]) >= {"dart-hf", "torch", "transformers"}
    expected = evaluate_classifier(model.cpu(), processor, data, NAMES, [16, 9])
    for found, result in zip(results["budgets"], expected.budgets, strict=True):
        assert (found["num_patches"], found["images_per_second"] > 0) == (result.num_patches, True)
        assert (found["top1"], found["top5"]) == pytest.approx((result.top1, result.top5))
    assert "'image' instead of the model's own 'batch'" in lines[0]
    assert lines[1].endswith("; score normalisation 'image'")
    assert lines[1:] == [*table(results), f"Wrote {output}", f"Wrote {plot}"]


def test_no_score_rule_and_no_digest_are_invented(model, saved, photos, tmp_path):
    """The partition is uniform, and the weights are in no safetensors file."""
    folder, lines = copy_with_settings(saved, tmp_path / "model", partition="uniform"), []
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    results = run_evaluation(folder, photos, split="test", limit=2, report=lines.append)
    assert (results["num_images"], results["weights_sha256"], results["score_normalization"]) == (2, None, None)
    assert lines == list(table(results)) and lines[0].endswith("batch 32; equal regions")


@pytest.fixture(scope="module")
def results(saved, photos) -> dict[str, Any]:
    return run_evaluation(saved, photos, limit=2, report=lambda line: None)


def budget(num_patches: int = 9, speed: float | None = None, **metrics: float | None) -> dict[str, float | None]:
    return {"num_patches": num_patches, "images_per_second": speed, **metrics}


@pytest.mark.parametrize(
    ("changes", "budgets", "expected", "curves"),
    [
        (
            {"num_unreadable": 2345},
            [budget(392, 8.5, top1=0.875, top5=0.9375), budget(121, 100.0, top1=0.75, top5=None)],
            """2,345 more could not be read and are left out.
  tokens     top-1     top-5  images/s
     392    87.50%    93.75%       8.5
     121    75.00%         –     100.0""",
            {"top-1": [75.0, 87.5]},
        ),
        (
            {"scorer_is_dead": True},
            [budget(top1=0.75, top5=1.0)],
            """The scorer has no weights: these are results of regions that do not follow the image.
  tokens     top-1     top-5  images/s
       9    75.00%   100.00%         –
No speed: there was no full batch of 32 images.""",
            {"top-5": [100.0], "top-1": [75.0]},
        ),
        (
            {"problem_type": "multi_label_classification"},
            [budget(9, 8.5, mean_average_precision=0.5, f1=0.25)],
            "  tokens       mAP        F1  images/s\n       9    50.00%    25.00%       8.5",
            {"F1": [25.0], "mAP": [50.0]},
        ),
        (
            {"problem_type": "regression"},
            [budget(9, 8.5, mean_absolute_error=1.5, mean_squared_error=1234567.0)],
            """  tokens  mean absolute error  mean squared error  images/s
       9                  1.5           1.235e+06       8.5""",
            {"mean absolute error": [1.5]},
        ),
    ],
    ids=["classes", "dead scorer", "multi-label", "regression"],
)
def test_table_and_plot_show_the_results(results, changes, budgets, expected, curves):
    results = {**results, **changes, "budgets": budgets}
    lines = expected.splitlines()
    assert list(table(results))[-len(lines) :] == lines
    (axes,) = draw_metrics(results).axes
    assert {line.get_label(): line.get_ydata().tolist() for line in axes.lines} == curves
    budgets = sorted(budgets, key=lambda entry: entry["num_patches"])
    assert axes.lines[-1].get_xdata().tolist() == [entry["num_patches"] for entry in budgets]
    assert [text.get_text() for text in axes.texts] == [
        f"{entry['images_per_second'] or '–'} images/s" for entry in budgets
    ]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"output": "none/out.json"}, "output: there is no folder 'none'"),
        ({"output": "."}, "output: . is a folder; give a file"),
        ({"plot": "out.doc"}, "'out.doc': its name must end in one of"),
        ({"split": "dev"}, "has no split 'dev'; it has 'test'"),
        ({"task": "regression"}, r"task is 'regression', and the labels .* for 'single_label_classification'"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(photos, saved, tmp_path, monkeypatch, settings, words):
    monkeypatch.chdir(tmp_path)
    if task := settings.pop("task", None):
        saved = copy_with_settings(saved, tmp_path / "model", problem_type=task)
    before = list(tmp_path.iterdir())
    with pytest.raises((ValueError, OSError), match=words):
        run_evaluation(saved, photos, **settings)
    assert list(tmp_path.iterdir()) == before


def test_budgets_are_parsed():
    assert parse_budgets("121, 196,392") == [121, 196, 392]
    for text in ("121,abc", "0", "121,,196", "-1", "1.5", ""):
        with pytest.raises(ValueError, match=f"num_patches must be whole numbers of at least 1 .*, got '{text}'"):
            parse_budgets(text)


@pytest.fixture
def trained(photos, saved, tmp_path) -> tuple[Path, Path, list[bytes]]:
    """Training images without splits, a model that held out 30% of them, and the contents of the held-out files."""
    images, folder = tmp_path / "images", tmp_path / "trained"
    shutil.copytree(photos / "test", images)
    shutil.copytree(saved, folder)
    split = load_image_data(images, held_out=0.3)
    record = held_out_record(split.evaluation)
    (folder / HELD_OUT_FILE).write_text(json.dumps(record))
    counts = {"num_train_images": len(split.train), "num_evaluation_images": len(split.evaluation)}
    (folder / "training.json").write_text(json.dumps({"data": {"train_split": "train", **counts}}))
    return images, folder, [image["sha256"] for image in record["images"]]


def test_held_out_images_are_those_of_the_record(trained, monkeypatch):
    """An image that was added after the training changes nothing."""
    images, folder, digests = trained
    Image.new("RGB", (40, 40)).save(images / "zero" / "added.png")
    seen = []

    def evaluate(model, processor, images, *others):
        seen.extend(image["sha256"] for image in held_out_record(images)["images"])
        return evaluate_classifier(model, processor, images, *others)

    monkeypatch.setattr("dart_hf.evaluation.run.evaluate_classifier", evaluate)
    results = run_evaluation(folder, images, held_out=0.3, report=lambda line: None)
    assert (results["num_images"], results["data"]["split"]) == (5, "held out of train")
    assert sorted(seen) == sorted(digests)


def test_held_out_images_must_be_known_and_present(trained, saved):
    images, folder, digests = trained

    def refused(words: str, model: Path = folder, data: Path = images, share: float = 0.3) -> None:
        with pytest.raises(ValueError, match=words):
            run_evaluation(model, data, held_out=share)

    refused(f"has no {HELD_OUT_FILE}, so it is not known which images", model=saved)
    refused("held_out=0.2 is not the share of the training, which held out 5 of 16 images", share=0.2)
    for name in ("train", "test"):
        shutil.copytree(images, folder.parent / "split" / name)
    refused("held_out is for data without a split to evaluate on; here there is 'test'", data=folder.parent / "split")
    for path in images.rglob("*.png"):
        if hashlib.sha256(path.read_bytes()).hexdigest() == digests[0]:
            path.unlink()
    refused("1 of the 5 images that the training held out are not in the data")
