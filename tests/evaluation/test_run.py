"""Evaluation runs: what they report and write, and which images they take."""

import hashlib
import json
import os
import shutil
from pathlib import Path

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


def test_results_are_returned_printed_and_written(model, processor, data, photos, saved, tmp_path, monkeypatch):
    lines = []
    output, plot = tmp_path / "evaluation.json", tmp_path / "plot.png"
    monkeypatch.chdir(saved.parent)
    source, data_source = saved.name, os.path.relpath(photos, saved.parent)
    results = run_evaluation(source, data_source, [16, 9], batch_size=8, output=output, plot=plot, report=lines.append)
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
    assert "'image' instead of the model's own 'batch'" in lines[0]
    assert lines[1:-2] == list(table(results))
    assert lines[-2:] == [f"Wrote {output}", f"Wrote {plot}"]


def test_no_score_rule_and_no_digest_are_invented(model, processor, photos, tmp_path):
    """The partition is uniform, and the weights are in no safetensors file."""
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "partition": "uniform"}))
    lines = []
    results = run_evaluation(tmp_path, photos, split="test", limit=2, report=lines.append)
    assert results["num_images"] == 2
    assert (results["weights_sha256"], results["score_normalization"]) == (None, None)
    assert lines == list(table(results)) and lines[0].endswith("batch 32; equal regions")


RESULTS = {
    "model": "some/darvit",
    "problem_type": "single_label_classification",
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


def test_table():
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


def test_plot():
    (axes,) = draw_metrics({**RESULTS, "budgets": RESULTS["budgets"][:1] * 2}).axes
    assert [line.get_label() for line in axes.lines] == ["top-5", "top-1"]
    (axes,) = draw_metrics({**RESULTS, "budgets": [{**entry, "top5": None} for entry in RESULTS["budgets"]]}).axes
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
def test_mistakes_are_refused_before_anything_is_written(photos, saved, tmp_path, monkeypatch, settings, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=words):
        run_evaluation(saved, photos, **settings)
    assert not list(tmp_path.iterdir())


def test_table_and_plot_of_other_tasks():
    multi_label = {
        **RESULTS,
        "problem_type": "multi_label_classification",
        "budgets": [{"num_patches": 9, "mean_average_precision": 0.5, "f1": 0.25, "images_per_second": 8.25}],
    }
    assert list(table(multi_label))[2:] == [
        "  tokens       mAP        F1  images/s",
        "       9    50.00%    25.00%       8.2",
    ]
    (axes,) = draw_metrics(multi_label).axes
    assert [(line.get_label(), line.get_ydata().tolist()) for line in axes.lines] == [("F1", [25.0]), ("mAP", [50.0])]
    errors = {"mean_absolute_error": 1.5, "mean_squared_error": 1234567.0}
    regression = {
        **RESULTS,
        "problem_type": "regression",
        "budgets": [{"num_patches": 9, **errors, "images_per_second": None}],
    }
    assert list(table(regression))[2:4] == [
        "  tokens  mean absolute error  mean squared error  images/s",
        "       9                  1.5           1.235e+06         –",
    ]
    (axes,) = draw_metrics(regression).axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [[1.5]]


def test_budgets_are_parsed():
    assert parse_budgets("121, 196,392") == [121, 196, 392]
    for text in ("121,abc", "0", "121,,196", "-1", "1.5", ""):
        with pytest.raises(ValueError, match=f"num_patches must be whole numbers of at least 1 .*, got '{text}'"):
            parse_budgets(text)


# --- held-out images --------------------------------------------------------------------------------------------------


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
    digests = [image["sha256"] for image in record["images"]]
    return images, folder, digests


def test_held_out_images_are_those_of_the_record(trained, monkeypatch):
    """An image that was added after the training changes nothing."""
    images, folder, digests = trained
    Image.new("RGB", (40, 40)).save(images / "zero" / "added.png")
    seen = []
    monkeypatch.setattr(
        "dart_hf.evaluation.run.evaluate_classifier",
        lambda model, processor, images, *others: (
            seen.append(images) or evaluate_classifier(model, processor, images, *others)
        ),
    )
    results = run_evaluation(folder, images, held_out=0.3, report=lambda line: None)
    assert results["num_images"] == len(digests) == 5
    assert results["data"]["split"] == "held out of train"
    assert sorted(image["sha256"] for image in held_out_record(seen[0])["images"]) == sorted(digests)


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


def test_labels_for_another_task_are_refused(photos, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "model")
    config = json.loads((saved / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "problem_type": "regression"}))
    with pytest.raises(ValueError, match=r"task is 'regression', and the labels .* for 'single_label_classification'"):
        run_evaluation(tmp_path / "model", photos)
