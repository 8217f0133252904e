"""A training that is killed, anywhere and again and again, ends with the weights of one that is not, bit for bit."""

import gc
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.tiny_training import TINY, same_tensors, tiny_pictures, tiny_trainer
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerState

from dart_hf.training import checkpoints
from dart_hf.training import ema as averaging
from dart_hf.training.checkpoints import (
    MARKER,
    CompleteCheckpointCallback,
    RandomStateCallback,
    latest_complete_checkpoint,
    remove_incomplete_checkpoints,
    resume_training,
)
from dart_hf.training.command import SETTINGS_FILE, parse_settings, run_training
from dart_hf.training.ema import EMA_FILE, EmaCallback

WEIGHTS = "model.safetensors"
RANDOM_KILLS = 14

# --- trainings that are killed ----------------------------------------------------------------------------------------

# Each goes on from what is in its folder and at last writes its weights there, to `model.safetensors`. It keeps two
# checkpoints, so that others must be deleted.
Training = Callable[[Path], None]


def train_with_stock_trainer(output: Path) -> None:
    trainer = tiny_trainer(
        output,
        [RandomStateCallback(), EmaCallback(), CompleteCheckpointCallback()],
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    remove_incomplete_checkpoints(output)
    resume_training(trainer, latest_complete_checkpoint(output))
    trainer.save_model()


def train_with_the_command(output: Path) -> None:
    settings = {
        "data": str(output.parent / "pictures"),
        "preset": "tiny",
        "model_settings": json.dumps(TINY),
        "crop_pct": 1.0,
        "max_steps": 20,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "steps",
        "save_steps": 3,
        "ema_decay": 0.9,
        "horizontal_flip": 0.5,
        "random_erasing": 0.5,
        "mixup": 0.5,
        "cutmix": 0.5,
        "repeated_augmentation": 2,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = ["--output", str(output)]
    if (output / SETTINGS_FILE).exists():
        arguments += ["--resume"]
    else:
        arguments += [option for name, value in settings.items() for option in (f"--{name}", str(value))]
    run_training(parse_settings(arguments), say=lambda line: None)


TRAININGS: list[Training] = [train_with_stock_trainer, train_with_the_command]


def write_pictures(folder: Path) -> None:
    for split, count in (("train", 22), ("test", 6)):
        for number, row in enumerate(tiny_pictures(count)):
            (folder / split / str(row["label"])).mkdir(parents=True, exist_ok=True)
            row["image"].save(folder / split / str(row["label"]) / f"{number}.png")


# --- how they are killed ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """The call of a function: where, its name, with which arguments, and what it leaves behind when it is cut short."""

    owner: Any
    function: str
    applies: Callable[..., bool] = lambda *_, **__: True
    damage: Callable[..., Any] = lambda *_, **__: None


def _becomes(name: str) -> Callable[..., bool]:
    """Whether the second argument, a path, has this name."""
    return lambda _, path, *__, **___: Path(path).name == name


def _half_a_model(_: Trainer, folder: str, **__: Any) -> None:
    Path(folder).mkdir(parents=True)
    (Path(folder) / WEIGHTS).write_bytes(bytes(1000))


def _half_a_file(_: Any, path: str, **__: Any) -> None:
    Path(path).write_bytes(bytes(1000))


def _half_deleted(folder: Path, **_: Any) -> None:
    for path in sorted(folder.iterdir())[::2]:
        path.unlink()


MOMENTS = {
    "in a step": Moment(Trainer, "training_step"),
    "in an evaluation": Moment(Trainer, "prediction_step"),
    "in model.safetensors": Moment(Trainer, "_save", damage=_half_a_model),
    "after model.safetensors": Moment(Trainer, "_save_optimizer_and_scheduler"),
    "in optimizer.pt": Moment(torch, "save", _becomes("optimizer.pt"), _half_a_file),
    "before trainer_state.json": Moment(TrainerState, "save_to_json"),
    "in ema.safetensors": Moment(averaging, "save_model", damage=_half_a_file),
    "after ema.safetensors": Moment(os, "replace", _becomes(EMA_FILE)),
    "before the marker": Moment(checkpoints, "_mark_complete"),
    "in the marker": Moment(os, "replace", _becomes(MARKER)),
    "before deleting": Moment(checkpoints, "_remove"),
    "in deleting": Moment(shutil, "rmtree", damage=_half_deleted),
}


def run_to_a_moment(train: Training, output: Path, moment: str | None = None) -> None:
    """Train in this process, which dies when it comes to a moment for the second time: so that every run gets on."""
    torch.set_num_threads(1)
    # `Trainer` collects garbage, which would copy all that this process shares with the one it was forked from.
    gc.freeze()
    if moment is not None:
        deadly = MOMENTS[moment]
        original, calls = getattr(deadly.owner, deadly.function), itertools.count(1)

        def die_in_second_call(*args: Any, **kwargs: Any) -> Any:
            if deadly.applies(*args, **kwargs) and next(calls) == 2:
                deadly.damage(*args, **kwargs)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(deadly.owner, deadly.function, die_in_second_call)
    train(output)


def run_training_keeping_all(train: Training, output: Path) -> None:
    """Train in this process, undisturbed, and without deleting a checkpoint."""
    checkpoints._remove = lambda checkpoint: None
    run_to_a_moment(train, output)


@pytest.fixture(scope="module")
def start():
    """Runs a function in a process of its own, in which everything has been imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["pytest", "dart_hf.training.ema", "dart_hf.training.checkpoints", "dart_hf.training.command"]
    )

    def start(function: Callable[..., None], *args: Any) -> multiprocessing.Process:
        process = context.Process(target=function, args=args, daemon=True)
        process.start()
        return process

    # The first waits for the imports.
    start(os.getpid).join()
    return start


# --- what becomes of them ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", TRAININGS)
def test_kills_lose_nothing_and_change_nothing(train, start, tmp_path):
    write_pictures(tmp_path / "pictures")
    undisturbed = tmp_path / "undisturbed"
    started = time.monotonic()
    process = start(run_training_keeping_all, train, undisturbed)
    process.join()
    duration = time.monotonic() - started
    assert process.exitcode == 0

    outputs = (tmp_path / f"killed-{number}" for number in itertools.count())
    output, delays, steps = next(outputs), random.Random(0), -1
    pending: list[str | None] = [*MOMENTS, *[None] * RANDOM_KILLS]
    num_runs = 0
    while pending:
        process = start(run_to_a_moment, train, output, pending[0])
        if pending[0] is None:
            process.join(delays.uniform(0, 0.6) * duration)
            process.kill()
        process.join()
        num_runs += 1
        assert num_runs < 4 * (len(MOMENTS) + RANDOM_KILLS), f"no run reached {pending[0]!r}"

        if process.exitcode == -signal.SIGKILL:
            pending.pop(0)
            steps = assert_kept(output, undisturbed, steps)
        else:
            # It was done before its moment.
            assert process.exitcode == 0
            assert_same_result(output, undisturbed)
            shutil.rmtree(output)
            output, steps = next(outputs), -1

    process = start(run_to_a_moment, train, output)
    process.join()
    assert process.exitcode == 0
    assert_same_result(output, undisturbed)


def assert_kept(output: Path, undisturbed: Path, steps: int) -> int:
    """No checkpoint is lost, and the latest is the one that the undisturbed training had; returns its steps."""
    checkpoint = latest_complete_checkpoint(output)
    if checkpoint is None:
        assert steps == -1
        return steps
    assert int(checkpoint.name.removeprefix("checkpoint-")) >= steps
    expected = undisturbed / checkpoint.name
    for name in (WEIGHTS, EMA_FILE):
        assert same_tensors(load_file(checkpoint / name), load_file(expected / name)), name
    moments, expected_moments = (torch.load(folder / "optimizer.pt")["state"] for folder in (checkpoint, expected))
    assert moments.keys() == expected_moments.keys()
    assert all(same_tensors(moments[number], expected_moments[number]) for number in moments)
    found, wanted = (TrainerState.load_from_json(folder / "trainer_state.json") for folder in (checkpoint, expected))
    assert (found.global_step, found.best_metric) == (wanted.global_step, wanted.best_metric)
    return found.global_step


def assert_same_result(output: Path, undisturbed: Path) -> None:
    assert same_tensors(load_file(output / WEIGHTS), load_file(undisturbed / WEIGHTS))
    latest = latest_complete_checkpoint(output)
    assert latest.name == latest_complete_checkpoint(undisturbed).name
    assert_kept(output, undisturbed, 0)
    # Two, and the best; nothing is left of what was broken off.
    assert 2 <= len(list(output.glob("checkpoint-*"))) <= 3
    assert not list(output.rglob("*.unfinished"))


# --- resuming from every checkpoint -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gradient_accumulation_steps": 4, "max_steps": 5, "save_steps": 1},
        # The checkpoints at the ends of epochs are saved before their evaluation.
        {"eval_strategy": "epoch"},
        {"eval_on_start": True, "save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2.5},
    ],
    ids=["steps", "accumulation", "evaluation after saving", "epochs"],
)
def test_every_checkpoint_leads_to_the_same_weights(arguments, tmp_path):
    def trainer(output):
        callbacks = [RandomStateCallback(), EmaCallback(), CompleteCheckpointCallback()]
        return tiny_trainer(output, callbacks, **arguments)

    undisturbed = trainer(tmp_path / "undisturbed")
    undisturbed.train()
    found = sorted((tmp_path / "undisturbed").glob("checkpoint-*"))
    assert len(found) >= 2
    for checkpoint in found:
        output = tmp_path / f"from-{checkpoint.name}"
        shutil.copytree(checkpoint, output / checkpoint.name)
        resumed = trainer(output)
        resume_training(resumed, output / checkpoint.name)
        assert resumed.state.global_step == undisturbed.state.global_step
        assert same_tensors(resumed.model.state_dict(), undisturbed.model.state_dict()), checkpoint.name


# --- more than one process --------------------------------------------------------------------------------------------


def train_as_process(rank: int, port: int, output: Path, checkpoint: Path | None) -> None:
    """Train as one of two processes; the second is slow to write. Each writes the weights that it ends with."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port))
    if rank == 1:
        save = Trainer._save_rng_state
        Trainer._save_rng_state = lambda trainer, folder: (time.sleep(0.3), save(trainer, folder))
    callbacks = [RandomStateCallback(), EmaCallback(0.8, resume_from=checkpoint), CompleteCheckpointCallback()]
    trainer = tiny_trainer(output, callbacks, ddp_backend="gloo", per_device_train_batch_size=2, max_steps=9)
    resume_training(trainer, checkpoint)
    save_file(trainer.model.state_dict(), output / f"process-{rank}.safetensors")


@pytest.fixture(scope="module")
def train_as_two(start):
    """Runs a training in two processes, and gives the weights that both of them end with."""

    def train(output, checkpoint=None):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        processes = [start(train_as_process, rank, port, output, checkpoint) for rank in (0, 1)]
        for process in processes:
            process.join()
            assert process.exitcode == 0
        first, second = (load_file(output / f"process-{rank}.safetensors") for rank in (0, 1))
        assert same_tensors(first, second)
        return first

    return train


@pytest.fixture(scope="module")
def trained_as_two(train_as_two, tmp_path_factory):
    """The folder and the final weights of such a training."""
    output = tmp_path_factory.mktemp("two-processes")
    return output, train_as_two(output)


def test_two_processes_keep_the_same_average_and_wait_for_each_other(trained_as_two):
    output, weights = trained_as_two
    assert same_tensors(weights, load_file(output / "checkpoint-9" / EMA_FILE))
    for step in (3, 6, 9):
        files = json.loads((output / f"checkpoint-{step}" / MARKER).read_text())["files"]
        assert files.keys() > {"rng_state_0.pth", "rng_state_1.pth", EMA_FILE}


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"), reason="transformers cannot resume several processes on a CPU"
)
def test_two_processes_resume_in_the_middle_of_an_epoch(train_as_two, trained_as_two, tmp_path):
    output, weights = trained_as_two
    assert same_tensors(train_as_two(tmp_path, output / "checkpoint-3"), weights)
