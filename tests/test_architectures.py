"""Every encoder goes from a folder of images to a trained, evaluated and calibrated model."""

from pathlib import Path

import pytest
import torch
from helpers.tiny_models import ENCODERS, tiny_classifier
from helpers.tiny_training import write_photos
from helpers.train_command import train

from dart_hf import DartImageProcessor
from dart_hf.evaluation.calibration import calibrate_model
from dart_hf.evaluation.prediction import predict
from dart_hf.evaluation.run import run_evaluation
from dart_hf.hub.loading import load_config, load_model

LABELS = ("0", "1", "2")
SIDE = 32


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), 18, 6)


@pytest.fixture(scope="module", params=ENCODERS)
def start(request, tmp_path_factory) -> Path:
    """A model of each architecture as conversion leaves it."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_classifier(LABELS, request.param, initializer_range=0.1).save_pretrained(folder)
    DartImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(start, photos, tmp_path_factory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("trained") / "out"
    settings = ["--model", start, "--data", photos, "--output", output, "--per-device-train-batch-size", 6]
    settings += ["--learning-rate", 1e-2, "--layer-decay", 0.8, "--ema-decay", 0.8]
    if hasattr(load_config(start), "drop_path_rate"):
        settings += ["--drop-path-rate", 0.1]
    settings += ["--mixup", 0.2, "--label-smoothing-factor", 0.1, "--disable-tqdm", True, "--num-train-epochs", 8]
    return output, train(*settings)


def test_training_learns_and_turns_scores_to_running_statistics(start, trained):
    output, facts = trained
    model, _ = load_model(output)
    assert facts["metrics"]["eval_accuracy"] > 0.6
    assert model.config.score_normalization == "running" and model.config.label2id == {"0": 0, "1": 1, "2": 2}
    before = dict(load_model(start)[0].named_parameters())
    unlearned = [name for name, learned in model.named_parameters() if torch.equal(learned, before[name])]
    # DINOv2 reads its mask token in its pretraining only.
    assert not [name for name in unlearned if not name.endswith("mask_token")]


def test_evaluation_at_several_budgets(trained, photos):
    output, facts = trained
    results = run_evaluation(output, photos, budgets=[4, 9, 16], report=lambda line: None)
    top1 = {entry["num_patches"]: entry["top1"] for entry in results["budgets"]}
    assert list(top1) == [4, 9, 16] and top1[9] == pytest.approx(facts["metrics"]["eval_accuracy"])


def test_calibration_and_prediction(start, photos, tmp_path):
    calibrate_model(start, photos, tmp_path / "calibrated", batch_size=4)
    model, processor = load_model(tmp_path / "calibrated")
    assert model.config.score_normalization == "running" and model.scorer.statistics.num_batches_tracked > 0
    image = str(sorted((photos / "test").rglob("*.png"))[0])
    pixel_values = processor(image, return_tensors="pt").pixel_values
    with torch.no_grad():
        logits = model(pixel_values).logits[0]
    (prediction,) = predict(model, processor, [image])
    best_first = [LABELS[index] for index in logits.argsort(descending=True)]
    assert [answer.label for answer in prediction.answers] == best_first
