"""The command line: what it prints and writes, and one readable line for every mistake of its user."""

import copy
import json
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import torch
from datasets import enable_progress_bars
from helpers.tiny_models import tiny_classifier
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage import data
from transformers.utils import logging
from typer.testing import CliRunner

import dart_hf.conversion.original
import dart_hf.quickstart
from dart_hf import DartConfig, DartForImageClassification, DartImageProcessor, DartModel, __version__
from dart_hf.cli.main import app
from dart_hf.modeling.region_scorer import RegionScorer

COMMANDS = ["quickstart", "convert", "predict", "visualize", "benchmark", "export", "evaluate", "calibrate", "publish"]
LABELS = ["cup", "cat", "rocket"]


@pytest.fixture(autouse=True)
def logging_as_before():
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield
    logging.set_verbosity(verbosity)
    (logging.enable_progress_bar if bar else logging.disable_progress_bar)()
    enable_progress_bars()


@pytest.fixture(scope="module")
def model() -> DartForImageClassification:
    return tiny_classifier(LABELS, image_size=64)


@pytest.fixture(scope="module")
def processor() -> DartImageProcessor:
    return DartImageProcessor(size=64, crop_size=64)


@pytest.fixture
def folder(tmp_path, monkeypatch, model, processor) -> Path:
    """The working folder: pictures, data sets of them, the model `model`, and unusable ones."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(data.coffee()).save("cup.png")
    Image.fromarray(data.chelsea()).save("cat.png")
    Path("half.png").write_bytes(Path("cup.png").read_bytes()[:5000])
    Path("text.png").write_text("not an image")
    for split, label, number in product(("train", "test"), ("Cat", "cup"), range(2)):
        Path("photos", split, label).mkdir(parents=True, exist_ok=True)
        shutil.copy(f"{label.lower()}.png", f"photos/{split}/{label}/{number}.png")
    for name, picture in (("damaged", "half.png"), ("other", "cup.png")):
        shutil.copytree("photos", name)
        Path(name, "test", "dog").mkdir()
        shutil.copy(picture, f"{name}/test/dog/0.png")
    Path("damaged/test/dog/0.png").rename("damaged/test/cup/5.png")
    Path("damaged/test/dog").rmdir()
    for name in ("model", "incomplete", "too-large"):
        model.save_pretrained(name)
        processor.save_pretrained(name)
    shutil.copytree("model", "unprepared")
    Path("unprepared/preprocessor_config.json").unlink()
    shutil.copytree("model", "program")
    Path("program/model.safetensors").rename("program/model.onnx")
    weights = load_file("model/model.safetensors")
    bias = weights.pop("classifier.bias")
    save_file(weights, "incomplete/model.safetensors")
    save_file({**weights, "classifier.bias": bias, "extra": bias.clone()}, "too-large/model.safetensors")
    for name, content in (("empty", None), ("vit", {"model_type": "vit"})):
        Path(name).mkdir()
        if content:
            Path(name, "config.json").write_text(json.dumps(content))
    DartModel(model.config).save_pretrained("encoder")
    processor.save_pretrained("encoder")
    return tmp_path


def run(*arguments: str):
    return CliRunner().invoke(app, arguments, prog_name="dart-hf", catch_exceptions=False)


def probabilities(model, processor, image: str, **settings) -> dict[str, float]:
    with torch.no_grad():
        logits = model(processor(image, return_tensors="pt").pixel_values, **settings).logits
    return dict(zip(LABELS, logits.softmax(dim=-1)[0].tolist(), strict=True))


def test_help_lists_the_commands():
    for result in (run(), run("--help")):
        assert result.exit_code == 0
        assert all(command in result.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: dart-hf {command} " in result.stdout


def test_version():
    assert run("--version").stdout == f"dart-hf {__version__}\n"


def test_predict_prints_labels_and_probabilities(folder, model, processor):
    result = run("predict", "cup.png", "cat.png", "--model", "model", "--top-k", "2")
    assert result.exit_code == 0
    expected = []
    for image in ("cup.png", "cat.png"):
        answers = sorted(probabilities(model, processor, image).items(), key=lambda answer: -answer[1])[:2]
        expected += [image, *(f"{probability:8.1%}  {label}" for label, probability in answers)]
    assert result.stdout.splitlines() == expected


def test_predict_prints_json(folder, model, processor):
    images = ["cup.png", "cat.png", "cup.png"]
    result = run("predict", *images, "--model", "model", "--num-patches", "16", "--json")
    assert result.exit_code == 0
    predictions = json.loads(result.stdout)
    assert [prediction["image"] for prediction in predictions] == images
    for prediction in predictions:
        # The model's scores are normalised over the batch, and still an image's answers do not depend on the others.
        answers = {answer["label"]: answer["probability"] for answer in prediction["answers"]}
        assert answers == pytest.approx(probabilities(model, processor, prediction["image"], num_patches=16), abs=1e-6)
        assert list(answers.values()) == sorted(answers.values(), reverse=True)


@pytest.mark.parametrize("name", ["model", "encoder"])
def test_visualize_writes_a_picture(folder, name):
    before = set(folder.iterdir())
    for output, settings in (("plain.png", []), ("scores.png", ["--scores", "--num-patches", "25"])):
        result = run("visualize", "cup.png", "--model", name, "--output", output, *settings)
        assert result.exit_code == 0
        assert result.stdout == f"Wrote {output}\n"
    assert {path.name for path in set(folder.iterdir()) - before} == {"plain.png", "scores.png"}
    assert Image.open("scores.png").width > 1.5 * Image.open("plain.png").width


def test_evaluate_prints_a_table_and_writes_results(folder):
    result = run(
        *["evaluate", "--model", "model", "--data", "photos", "--num-patches", "9,16", "--batch-size", "3"],
        *["--output", "evaluation.json", "--plot", "plot.png"],
    )
    assert result.exit_code == 0
    results = json.loads(Path("evaluation.json").read_text())
    assert results["data"] == {"source": str(folder / "photos"), "subset": None, "split": "test"}
    assert (results["num_images"], results["score_normalization"], results["batch_size"]) == (4, "image", 3)
    assert [budget["num_patches"] for budget in results["budgets"]] == [9, 16]
    rule, about, heads, *rows, wrote_json, wrote_plot = result.stdout.splitlines()
    assert "'image' in place of the model's own, 'batch'" in rule
    assert about.startswith(f"4 images of {folder / 'photos'} (test); ")
    assert heads.split() == ["tokens", "top-1", "top-5", "images/s"]
    for row, budget in zip(rows, results["budgets"], strict=True):
        assert row.split()[:3] == [str(budget["num_patches"]), f"{budget['top1']:.2%}", "–"]
    assert (wrote_json, wrote_plot) == ("Wrote evaluation.json", "Wrote plot.png")
    assert Image.open("plot.png").width > 100


def test_evaluate_leaves_out_what_cannot_be_read(folder):
    result = run("evaluate", "--model", "model", "--data", "damaged", "--skip-unreadable")
    assert result.exit_code == 0
    assert "1 more could not be read and are left out." in result.stdout.splitlines()


def test_calibrate_writes_a_model(folder):
    result = run("calibrate", "--model", "model", "--data", "photos", "--output", "calibrated", "--limit", "3")
    assert result.exit_code == 0
    assert result.stdout.startswith("Wrote calibrated: scores of 3 images have mean ")
    result = run("evaluate", "--model", "calibrated", "--data", "photos")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0].endswith("score normalisation 'running'")


def test_convert_writes_a_model(stand_in, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(data.coffee()).save("cup.png")
    result = run("convert", str(stand_in("darvit-tiny-ft121p")), "--output", "converted")
    assert result.exit_code == 0
    assert result.stdout == "Wrote converted\n"
    assert DartConfig.from_pretrained("converted").num_patches == 121
    result = run("predict", "cup.png", "--model", "converted", "--top-k", "3", "--json")
    assert result.exit_code == 0
    assert len(json.loads(result.stdout)[0]["answers"]) == 3


@pytest.mark.parametrize(
    ("module", "function", "arguments", "expected"),
    [
        (
            dart_hf.conversion.original,
            "convert_checkpoint",
            ["convert", "yinkx3/DART", "--output", "out", "--variant", "darvit-sm", "--ema"],
            (("yinkx3/DART", Path("out")), {"variant": "darvit-sm", "ema": True}),
        ),
        (
            dart_hf.quickstart,
            "run_quickstart",
            ["quickstart", "--output", "out", "--steps", "7", "--num-patches", "25", "--seed", "3"],
            ((Path("out"),), {"steps": 7, "num_patches": 25, "seed": 3}),
        ),
    ],
)
def test_options_reach_the_library(monkeypatch, module, function, arguments, expected):
    library = create_autospec(getattr(module, function), return_value=Path("out"))
    monkeypatch.setattr(module, function, library)
    assert run(*arguments).exit_code == 0
    ((given, settings),) = library.call_args_list
    settings.pop("say", None)
    assert (given, settings) == expected


PREDICT = ["predict", "cup.png", "--model"]
VISUALIZE = ["visualize", "cup.png", "--model", "model", "--output"]
EVALUATE = ["evaluate", "--model", "model", "--data"]
CALIBRATE = ["calibrate", "--model", "model", "--data"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["predict", "none.png", "--model", "model"], "There is no image file 'none.png'"),
        (["predict", "cup.png", "text.png", "--model", "model"], "Cannot read 'text.png' as an image"),
        (["predict", "half.png", "--model", "model"], "Cannot read 'half.png' as an image: image file is truncated"),
        ([*PREDICT, "empty"], "'empty' holds no model: it has no config.json"),
        ([*PREDICT, "vit"], "'vit', not a DART model"),
        ([*PREDICT, "encoder"], "'encoder' has no classifier: it is DartModel"),
        ([*PREDICT, "incomplete"], "missing classifier.bias"),
        ([*PREDICT, "too-large"], "unexpected extra"),
        ([*PREDICT, "unprepared"], "The folder 'unprepared' has no preprocessor_config.json: save an image processor"),
        ([*PREDICT, "program"], "The folder 'program' holds an exported program, model.onnx"),
        ([*PREDICT, "cup.png"], "'cup.png' is a file"),
        ([*PREDICT, "./none"], "There is no folder './none'"),
        ([*PREDICT, "some/model"], "no folder 'some/model', and the Hub did not give a model of that name"),
        ([*PREDICT, "model", "--num-patches", "0"], "--num-patches"),
        ([*PREDICT, "model", "--top-k", "many"], "--top-k"),
        (["predict", "cup.png"], "--model"),
        (["predict", "--model", "model"], "IMAGE"),
        (["visualize", "none.png", "--model", "model", "--output", "out.png"], "There is no image file 'none.png'"),
        (["visualize", "half.png", "--model", "model", "--output", "out.png"], "Cannot read 'half.png'"),
        ([*VISUALIZE, "out.doc"], "'out.doc': its name must end in one of"),
        ([*VISUALIZE, "none/out.png"], "there is no folder 'none'"),
        ([*VISUALIZE, "out.png", "--num-patches", "-1"], "--num-patches"),
        (["convert", "none.pth", "--output", "out"], "none.pth"),
        (["convert", "text.png", "--output", "out"], "text.png"),
        (["quickstart", "--steps", "0"], "--steps"),
        ([*EVALUATE, "photos", "--split", "dev"], "'photos' has no split 'dev'; it has 'train', 'test'"),
        ([*EVALUATE, "empty"], "'empty' has no images"),
        ([*EVALUATE, "./none"], "there is no folder './none'"),
        ([*EVALUATE, "other"], "1 of 3 classes ('dog') are none of the model's 3 ('cup', 'cat', 'rocket')"),
        ([*EVALUATE, "damaged"], "cup/5.png' cannot be read"),
        ([*EVALUATE, "damaged", "--workers", "1"], "cup/5.png' cannot be read"),
        ([*EVALUATE, "photos", "--num-patches", "121,abc"], "num_patches must be whole numbers of at least 1"),
        ([*EVALUATE, "photos", "--num-patches", "0"], "num_patches must be whole numbers of at least 1"),
        ([*EVALUATE, "photos", "--score-normalization", "layer"], "running, image, batch, got 'layer'"),
        ([*EVALUATE, "photos", "--score-normalization", "running"], "needs statistics, and the model has none"),
        ([*EVALUATE, "photos", "--output", "none/out.json"], "output: there is no folder 'none'"),
        ([*EVALUATE, "photos", "--plot", "out.doc"], "'out.doc': its name must end in one of"),
        (["evaluate", "--model", "vit", "--data", "photos"], "'vit', not a DART model"),
        (["evaluate", "--model", "encoder", "--data", "photos"], "'encoder' has no classifier: it is DartModel"),
        ([*CALIBRATE, "damaged", "--split", "test", "--output", "out"], "cup/5.png' cannot be read"),
        ([*CALIBRATE, "photos", "--split", "dev", "--output", "out"], "'photos' has no split 'dev'"),
        ([*CALIBRATE, "photos", "--output", "model"], "model is not empty"),
        ([*CALIBRATE, "photos"], "--output"),
        (["paint"], "paint"),
        (["--paint"], "--paint"),
    ],
)
def test_a_mistake_gives_one_line_and_exit_code_2(folder, arguments, words):
    before = set(folder.iterdir())
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert set(folder.iterdir()) == before


def test_a_mistake_of_ours_keeps_its_traceback(folder, monkeypatch):
    def broken(*arguments, **settings):
        raise RuntimeError("a bug")

    monkeypatch.setattr(DartForImageClassification, "forward", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run(*PREDICT, "model")


def test_a_half_precision_model_sees_all_of_a_picture(folder, model, monkeypatch):
    """Rounded to half precision before they are scored, pixels would move the regions."""
    seen = []
    forward = RegionScorer.forward
    monkeypatch.setattr(RegionScorer, "forward", lambda *given: seen.append(given[1].dtype) or forward(*given))
    copy.deepcopy(model).bfloat16().save_pretrained("half")
    DartImageProcessor(size=64, crop_size=64).save_pretrained("half")
    for command in (["predict", "cup.png"], ["visualize", "cup.png", "--output", "regions.png"]):
        assert run(*command, "--model", "half").exit_code == 0
    assert seen == [torch.float32] * 2


def test_the_installed_command(folder, model, processor):
    command = [Path(sys.executable).with_name("dart-hf"), "predict", "cup.png", "--json", "--model"]
    settings = {"capture_output": True, "text": True, "timeout": 300}
    result = subprocess.run([*command, "model"], **settings)
    assert (result.returncode, result.stderr) == (0, "")
    (prediction,) = json.loads(result.stdout)
    answers = {answer["label"]: answer["probability"] for answer in prediction["answers"]}
    assert answers == pytest.approx(probabilities(model, processor, "cup.png"), abs=1e-5)

    result = subprocess.run([*command, "incomplete"], **settings)
    assert (result.returncode, result.stdout) == (2, "")
    assert (
        result.stderr == "dart-hf: The weights of 'incomplete' do not fit its config.json: missing classifier.bias.\n"
    )
