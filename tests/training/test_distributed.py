"""Two processes learn what one does with the same images in each step: scores are standardised over both."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from helpers.tiny_models import ENCODERS, tiny_classifier
from helpers.tiny_training import same_tensors
from safetensors.torch import load_file

from dart_hf import DartImageProcessor
from dart_hf.data.digits_on_photos import digits_on_photos

SIDE = 64
STEPS = 8
# Relative tolerance of losses and weights: two processes add up in another order than one.
TOLERANCE = 1e-5
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A model with a frozen trunk, because a BatchNorm in training sees its own process's images alone."""
    folder = tmp_path_factory.mktemp("start")
    model = tiny_classifier(
        [str(digit) for digit in range(10)], image_size=SIDE, scorer="mobilenet_v3_small", initializer_range=0.2
    )
    scorer = model.scorer
    with torch.no_grad():
        # Random trunks have tiny features; logits of about 1 keep rounding errors where they are.
        features, _ = scorer.features(torch.randn(2, 3, SIDE, SIDE))
        scorer.head.fc1.weight.normal_(std=1 / (features.std().item() * features.shape[1] ** 0.5))
        scorer.head.fc2.weight.normal_(std=0.3)
        scorer.trunk_loaded.fill_(1)
    model.save_pretrained(folder)
    DartImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(start, tmp_path_factory):
    """Runs `dart-hf train`, 8 images a step whatever the number of processes, and returns its output folder."""
    root = tmp_path_factory.mktemp("runs")
    (root / "data").mkdir()
    digits_on_photos("train", 1, SIDE, (28, 60)).select(range(100)).to_parquet(root / "data" / "train.parquet")
    settings = {
        "data": str(root / "data"), "model": str(start), "max_steps": STEPS, "learning_rate": 0.05, "optim": "sgd",
        "lr_scheduler_type": "constant", "weight_decay": 0.0, "held_out": 0.0, "eval_strategy": "no",
        "save_strategy": "steps", "save_steps": 4, "save_total_limit": 5, "logging_steps": 1, "ema_decay": 0.9,
        "label_smoothing_factor": 0.1, "use_cpu": True,
    }  # fmt: skip
    (root / "config.json").write_text(json.dumps(settings))

    def train(processes: int, name: str, *arguments: str) -> Path:
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
        done = subprocess.run(
            [sys.executable, "-m", *(launcher if processes > 1 else []), "dart_hf", "train",
             *(arguments or ("--config", str(root / "config.json"), "--output", str(root / name),
                             "--per-device-train-batch-size", str(8 // processes)))],
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(root / "home")},
            capture_output=True,
            text=True,
            timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("Wrote ") == 1
        return root / name

    return train


@pytest.fixture(scope="module")
def two(run) -> Path:
    return run(2, "two")


def losses(output: Path) -> list[float]:
    history = json.loads((output / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.slow
def test_two_processes_learn_as_one(run, two, start):
    one = run(1, "one")
    assert losses(two) == pytest.approx(losses(one), rel=TOLERANCE)
    before, alone, together = (load_file(folder / "model.safetensors") for folder in (start, one, two))
    for name, expected in alone.items():
        # Weights that the loss does not depend on move by rounding errors alone.
        assert torch.allclose(together[name], expected, rtol=TOLERANCE, atol=1e-6), name
    for name in ("head.fc1.bias", "head.fc2.weight", "statistics.running_mean", "statistics.running_var"):
        assert not torch.equal(alone[f"dart.tokenizer.scorer.{name}"], before[f"dart.tokenizer.scorer.{name}"])


@pytest.mark.slow
def test_two_processes_resume_to_the_same_weights(run, two, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(two, broken)
    shutil.rmtree(broken / f"checkpoint-{STEPS}")
    (broken / "model.safetensors").unlink()
    run(2, "broken", "--output", str(broken), "--resume")
    assert same_tensors(*(load_file(folder / "model.safetensors") for folder in (two, broken)))


def test_accelerate_reads_the_configurations():
    ddp, fsdp = (load_config_from_file(str(EXAMPLES / f"{name}.yaml")) for name in ("ddp", "fsdp"))
    assert (ddp.distributed_type, fsdp.distributed_type) == ("MULTI_GPU", "FSDP")
    # Each model names its own units.
    assert "fsdp_transformer_layer_cls_to_wrap" not in fsdp.fsdp_config


@pytest.mark.parametrize("model_type", ENCODERS)
def test_units_of_fsdp_are_modules_of_the_model(model_type):
    model = tiny_classifier(model_type=model_type)
    found = {type(module).__name__ for module in model.modules()}
    assert set(model._no_split_modules) <= found and "RegionScorer" in model._no_split_modules
