"""What the commands print and write."""

import copy
import json
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import torch
from PIL import Image

import dart_hf.quickstart
from dart_hf import DartConfig
from dart_hf.modeling.region_scorer import RegionScorer


def probabilities(model, processor, image: str, **settings) -> dict[str, float]:
    with torch.no_grad():
        logits = model(processor(image, return_tensors="pt").pixel_values, **settings).logits
    return dict(zip(model.config.id2label.values(), logits.softmax(dim=-1)[0].tolist(), strict=True))


def test_predict_prints_labels_and_probabilities(run, folder, model, processor):
    result = run("predict", "cup.png", "cat.png", "--model", "model", "--top-k", "2")
    assert result.exit_code == 0
    expected = []
    for image in ("cup.png", "cat.png"):
        answers = sorted(probabilities(model, processor, image).items(), key=lambda answer: -answer[1])[:2]
        expected += [image, *(f"{probability:8.1%}  {label}" for label, probability in answers)]
    assert result.stdout.splitlines() == expected


def test_predict_prints_json(run, folder, model, processor):
    images = ["cup.png", "cat.png", "cup.png"]
    result = run("predict", *images, "--model", "model", "--num-patches", "16", "--json")
    assert result.exit_code == 0
    predictions = json.loads(result.stdout)
    assert [prediction["image"] for prediction in predictions] == images
    for prediction in predictions:
        # The model normalises scores over the batch, but the answers for an image must not depend on other images.
        answers = {answer["label"]: answer["probability"] for answer in prediction["answers"]}
        assert answers == pytest.approx(probabilities(model, processor, prediction["image"], num_patches=16), abs=1e-6)
        assert list(answers.values()) == sorted(answers.values(), reverse=True)


def test_predict_answers_for_readable_files_and_names_the_others(run, folder):
    result = run("predict", "text.png", "photos/test/cup", "--model", "model", "--top-k", "1")
    assert result.exit_code == 2
    assert result.stderr.startswith("dart-hf: Cannot read 'text.png' as an image") and result.stderr.count("\n") == 1
    names = [str(path) for path in sorted(Path("photos/test/cup").iterdir())]
    assert names and result.stdout.splitlines()[::2] == names
    skipped = run("predict", "text.png", "photos/test/cup", "--model", "model", "--top-k", "1", "--skip-unreadable")
    assert (skipped.exit_code, skipped.stdout, skipped.stderr) == (0, result.stdout, result.stderr)


@pytest.mark.parametrize("name", ["model", "encoder"])
def test_visualize_writes_an_image(run, folder, tmp_path, name):
    plain, scores = tmp_path / "plain.png", tmp_path / "scores.png"
    for output, settings in ((plain, []), (scores, ["--scores", "--num-patches", "25"])):
        result = run("visualize", "cup.png", "--model", name, "--output", output, *settings)
        assert (result.exit_code, result.stdout) == (0, f"Wrote {output}\n")
    assert Image.open(scores).width > 1.5 * Image.open(plain).width


def test_half_precision_model_scores_float32_pixels(run, folder, model, tmp_path, monkeypatch):
    """Pixels in half precision would move the regions."""
    seen = []
    forward = RegionScorer.forward
    monkeypatch.setattr(RegionScorer, "forward", lambda *given: seen.append(given[1].dtype) or forward(*given))
    copy.deepcopy(model).bfloat16().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_bytes(Path("model/preprocessor_config.json").read_bytes())
    for command in (["predict", "cup.png"], ["visualize", "cup.png", "--output", tmp_path / "regions.png"]):
        assert run(*command, "--model", tmp_path).exit_code == 0
    assert seen == [torch.float32] * 2


def test_evaluate_prints_a_table_and_writes_results(run, folder, tmp_path):
    written, plot = tmp_path / "evaluation.json", tmp_path / "plot.png"
    result = run(
        *["evaluate", "--model", "model", "--data", "photos", "--num-patches", "9,16", "--batch-size", "3"],
        *["--output", written, "--plot", plot],
    )
    assert result.exit_code == 0
    results = json.loads(written.read_text())
    assert results["data"] == {"source": str(folder / "photos"), "subset": None, "split": "test"}
    assert (results["num_images"], results["score_normalization"], results["batch_size"]) == (4, "image", 3)
    assert [budget["num_patches"] for budget in results["budgets"]] == [9, 16]
    rule, about, heads, *rows, wrote_json, wrote_plot = result.stdout.splitlines()
    assert "'image' instead of the model's own 'batch'" in rule
    assert about.startswith(f"4 images of {folder / 'photos'} (test); ")
    assert heads.split() == ["tokens", "top-1", "top-5", "images/s"]
    for row, budget in zip(rows, results["budgets"], strict=True):
        assert row.split()[:3] == [str(budget["num_patches"]), f"{budget['top1']:.2%}", "–"]
    assert (wrote_json, wrote_plot) == (f"Wrote {written}", f"Wrote {plot}")
    assert Image.open(plot).width > 100


def test_evaluate_leaves_out_unreadable_images(run, folder):
    result = run("evaluate", "--model", "model", "--data", "damaged", "--skip-unreadable")
    assert result.exit_code == 0
    assert "1 more could not be read and are left out." in result.stdout.splitlines()


def test_calibrate_writes_a_model(run, folder, tmp_path):
    output = tmp_path / "calibrated"
    result = run("calibrate", "--model", "model", "--data", "photos", "--output", output, "--limit", "3")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Wrote {output}: scores of 3 images have mean ")
    result = run("evaluate", "--model", output, "--data", "photos")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0].endswith("score normalisation 'running'")


def test_convert_writes_a_model(run, folder, stand_in, tmp_path):
    output = tmp_path / "converted"
    result = run("convert", stand_in("darvit-tiny-ft121p"), "--output", output)
    assert (result.exit_code, result.stdout) == (0, f"Wrote {output}\n")
    assert DartConfig.from_pretrained(output).num_patches == 121
    result = run("predict", "cup.png", "--model", output, "--top-k", "3", "--json")
    assert result.exit_code == 0
    assert len(json.loads(result.stdout)[0]["answers"]) == 3


def test_quickstart_options_reach_the_library(run, monkeypatch):
    library = create_autospec(dart_hf.quickstart.run_quickstart)
    monkeypatch.setattr(dart_hf.quickstart, "run_quickstart", library)
    options = ("--steps", "7", "--num-patches", "25", "--scorer", "detail", "--seed", "3")
    assert run("quickstart", "--output", "out", *options).exit_code == 0
    ((given, settings),) = library.call_args_list
    settings.pop("report", None)
    assert (given, settings) == ((Path("out"),), {"steps": 7, "num_patches": 25, "scorer": "detail", "seed": 3})


def test_export_names_its_output_after_the_model(run, tmp_path, monkeypatch):
    (tmp_path / "cups" / "cups-onnx" / "used").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cups")
    assert "the folder cups-onnx is not empty" in run("export", "--model", ".").stderr


def test_export_takes_the_old_spelling_and_warns(run, folder, tmp_path):
    result = run("export", "vit", "--output", tmp_path / "out")
    warning, error = result.stderr.splitlines()
    assert warning == "dart-hf: the model as an argument is deprecated; write: dart-hf export --model vit"
    assert "'vit', not a DART model" in error
