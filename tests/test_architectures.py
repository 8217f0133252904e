"""Every encoder goes from a folder of images to a trained, evaluated and calibrated model."""

from pathlib import Path

import pytest
import torch
from helpers.tiny_models import ENCODERS, tiny_classifier
from helpers.tiny_training import tiny_pictures

from dart_hf import DartImageProcessor
from dart_hf.evaluation.calibration import calibrate_model
from dart_hf.evaluation.prediction import predict
from dart_hf.evaluation.run import run_evaluation
from dart_hf.hub.loading import load_model
from dart_hf.training.run import run_training
from dart_hf.training.settings import parse_settings

LABELS = ("0", "1", "2")
SIDE = 32


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """train/CLASS/IMAGE, 18 pictures of three classes, and test/CLASS/IMAGE, 6."""
    root = tmp_path_factory.mktemp("photos")
    for number, row in enumerate(tiny_pictures(24)):
        folder = root / ("train" if number < 18 else "test") / str(row["label"])
        folder.mkdir(parents=True, exist_ok=True)
        row["image"].save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module", params=ENCODERS)
def start(request, tmp_path_factory) -> Path:
    """A model of each architecture as conversion leaves it."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_classifier(LABELS, request.param, initializer_range=0.1).save_pretrained(folder)
    DartImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE).save_pretrained(folder)
    return folder


def train(start: Path, photos: Path, output: Path, *arguments: object) -> dict:
    settings = ["--model", start, "--data", photos, "--output", output, "--per-device-train-batch-size", 6]
    settings += ["--learning-rate", 1e-2, "--drop-path-rate", 0.1, "--layer-decay", 0.8, "--ema-decay", 0.8]
    settings += ["--mixup", 0.2, "--label-smoothing-factor", 0.1, "--disable-tqdm", True, *arguments]
    return run_training(parse_settings([str(setting) for setting in settings]), say=lambda line: None)


@pytest.fixture(scope="module")
def trained(start, photos, tmp_path_factory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("trained") / "out"
    return output, train(start, photos, output, "--num-train-epochs", 8)


def test_training_learns_and_turns_scores_to_running_statistics(start, trained):
    output, facts = trained
    before, _ = load_model(start)
    model, _ = load_model(output)
    assert facts["metrics"]["eval_accuracy"] > 0.6
    assert model.config.score_normalization == "running" and model.config.label2id == {"0": 0, "1": 1, "2": 2}
    state = before.state_dict()
    unchanged = [name for name, tensor in model.state_dict().items() if torch.equal(tensor, state[name])]
    # Every parameter learned.
    assert not {name for name, _ in model.named_parameters()} & set(unchanged)


@pytest.mark.slow
def test_resumed_training_ends_with_the_same_weights(start, photos, trained, tmp_path):
    output, _ = trained
    saved = ("--num-train-epochs", 8, "--save-strategy", "steps", "--save-steps", 7)
    train(start, photos, tmp_path / "out", *saved)
    whole = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert whole == (output / "model.safetensors").read_bytes()
    # As if killed behind the checkpoint of step 21.
    for name in ("config.json", "model.safetensors", "training.json"):
        (tmp_path / "out" / name).unlink()
    train(start, photos, tmp_path / "out", *saved, "--resume")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == whole


def test_evaluation_at_several_budgets(trained, photos):
    output, facts = trained
    results = run_evaluation(output, photos, budgets=[4, 9, 16], report=lambda line: None)
    assert [entry["num_patches"] for entry in results["budgets"]] == [4, 9, 16]
    of_nine = next(entry for entry in results["budgets"] if entry["num_patches"] == 9)
    assert of_nine["top1"] == pytest.approx(facts["metrics"]["eval_accuracy"])


def test_calibration_and_prediction(start, photos, tmp_path):
    calibrate_model(start, photos, tmp_path / "calibrated", batch_size=4)
    model, processor = load_model(tmp_path / "calibrated")
    assert model.config.score_normalization == "running" and model.scorer.statistics.num_batches_tracked > 0
    image = str(sorted((photos / "test").rglob("*.png"))[0])
    pixel_values = processor(image, return_tensors="pt").pixel_values
    with torch.no_grad():
        logits = model(pixel_values).logits[0]
    (prediction,) = predict(model, processor, [image])
    assert [answer.label for answer in prediction.answers] == [
        LABELS[index] for index in logits.argsort(descending=True)
    ]
