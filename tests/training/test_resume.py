"""A training that is killed anywhere, again and again, ends with the weights of one that is not, bit for bit."""

import functools
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
from helpers.tiny_training import TINY, same_tensors, tiny_trainer, write_photos
from helpers.train_command import train
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerState

from dart_hf.training import Recipe, checkpoints, ema
from dart_hf.training import trainer as trainer_module
from dart_hf.training.checkpoints import MARKER, latest_complete_checkpoint
from dart_hf.training.ema import EMA_FILE
from dart_hf.training.output_folder import SETTINGS_FILE

WEIGHTS = "model.safetensors"
RANDOM_KILLS = 14
TWO_EPOCHS = {"max_steps": -1, "num_train_epochs": 2}
slow = functools.partial(pytest.param, marks=pytest.mark.slow)

# Trainings that are killed ----------------------------------------------------------------------------------------

# Each goes on from the contents of its folder, and writes its final weights there, to `model.safetensors`. It keeps two
# checkpoints, so others must be deleted.
Training = Callable[[Path], None]


def train_with_trainer(output: Path) -> None:
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    trainer = tiny_trainer(output, Recipe(ema_decay=0.99996), save_total_limit=2, **best)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()


def train_with_command(output: Path) -> None:
    if (output / SETTINGS_FILE).exists():
        train("--output", output, "--resume")
        return
    settings = {
        "data": write_photos(output.parent / "pictures"), "preset": "tiny", "model_settings": json.dumps(TINY),
        "crop_pct": 1.0, "max_steps": 20, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True,
        "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3, "ema_decay": 0.9,
        "horizontal_flip": 0.5, "random_erasing": 0.5, "mixup": 0.5, "cutmix": 0.5, "repeated_augmentation": 2,
        "disable_tqdm": True, "output": output,
    }  # fmt: skip
    train(*(option for name, value in settings.items() for option in (f"--{name}", value)))


# Kills ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """A call of a function, and the damage that it leaves when it is killed."""

    owner: Any
    function: str
    applies: Callable[..., bool] = lambda *_, **__: True
    damage: Callable[..., Any] = lambda *_, **__: None


def _is_named(name: str) -> Callable[..., bool]:
    """A condition: the second argument is a path with this name."""
    return lambda _, path, *__, **___: Path(path).name == name


def _write_half_a_model(_: Trainer, folder: str, **__: Any) -> None:
    Path(folder).mkdir(parents=True)
    (Path(folder) / WEIGHTS).write_bytes(bytes(1000))


def _write_half_a_file(_: Any, path: str, **__: Any) -> None:
    Path(path).write_bytes(bytes(1000))


def _delete_every_second_file(folder: Path, **_: Any) -> None:
    for path in sorted(folder.iterdir())[::2]:
        path.unlink()


MOMENTS = {
    "in a step": Moment(Trainer, "training_step"),
    "in an evaluation": Moment(Trainer, "prediction_step"),
    "in model.safetensors": Moment(Trainer, "_save", damage=_write_half_a_model),
    "after model.safetensors": Moment(Trainer, "_save_optimizer_and_scheduler"),
    "in optimizer.pt": Moment(torch, "save", _is_named("optimizer.pt"), _write_half_a_file),
    "before trainer_state.json": Moment(TrainerState, "save_to_json"),
    "in ema.safetensors": Moment(ema, "save_model", damage=_write_half_a_file),
    "after ema.safetensors": Moment(os, "replace", _is_named(EMA_FILE)),
    "before the marker": Moment(trainer_module, "mark_complete"),
    "in the marker": Moment(os, "replace", _is_named(MARKER)),
    "before deleting": Moment(checkpoints, "remove_checkpoint"),
    "in deleting": Moment(shutil, "rmtree", damage=_delete_every_second_file),
}


def train_up_to(train: Training, output: Path, moment: str | None = None) -> None:
    """Train in this process, which kills itself at the second time of a moment, so that every run makes progress."""
    torch.set_num_threads(1)
    # `Trainer` collects garbage, which would copy all memory that this process shares with its parent.
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


def train_keeping_every_checkpoint(train: Training, output: Path) -> None:
    """Train in this process without a kill."""
    checkpoints.remove_checkpoint = lambda checkpoint: None
    train_up_to(train, output)


@pytest.fixture(scope="module")
def start():
    """Runs a function in a process of its own that has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "dart_hf.training.run"])

    def start(function: Callable[..., None], *args: Any) -> multiprocessing.Process:
        process = context.Process(target=function, args=args, daemon=True)
        process.start()
        return process

    # The first process waits for the imports.
    start(os.getpid).join()
    return start


EVERY_KILL = [*MOMENTS, *[None] * RANDOM_KILLS]


@pytest.mark.parametrize(
    ("train", "kills"),
    [
        pytest.param(train_with_command, ["in ema.safetensors", "in deleting"], id="command, two kills"),
        slow(train_with_trainer, EVERY_KILL, id="trainer, every kill"),
        slow(train_with_command, EVERY_KILL, id="command, every kill"),
    ],
)
def test_kills_lose_no_checkpoint_and_change_no_weights(train, kills, start, tmp_path):
    undisturbed = tmp_path / "undisturbed"
    started = time.monotonic()
    process = start(train_keeping_every_checkpoint, train, undisturbed)
    process.join()
    duration = time.monotonic() - started
    assert process.exitcode == 0

    outputs = (tmp_path / f"killed-{number}" for number in itertools.count())
    output, delays, steps = next(outputs), random.Random(0), -1
    pending: list[str | None] = list(kills)
    num_runs = 0
    while pending:
        process = start(train_up_to, train, output, pending[0])
        if pending[0] is None:
            process.join(delays.uniform(0, 0.6) * duration)
            process.kill()
        process.join()
        num_runs += 1
        assert num_runs < 4 * len(EVERY_KILL), f"no run reached {pending[0]!r}"

        if process.exitcode == -signal.SIGKILL:
            pending.pop(0)
            steps = assert_kept(output, undisturbed, steps)
        else:
            # It ended before its moment.
            assert process.exitcode == 0
            assert_same_result(output, undisturbed)
            shutil.rmtree(output)
            output, steps = next(outputs), -1

    process = start(train_up_to, train, output)
    process.join()
    assert process.exitcode == 0
    assert_same_result(output, undisturbed)


def assert_kept(output: Path, undisturbed: Path, steps: int) -> int:
    """No checkpoint is lost, and the latest equals the undisturbed training's. Returns its steps."""
    checkpoint = latest_complete_checkpoint(output)
    if checkpoint is None:
        assert steps == -1
        return steps
    expected = undisturbed / checkpoint.name
    for name in (WEIGHTS, EMA_FILE):
        assert same_tensors(load_file(checkpoint / name), load_file(expected / name)), name
    moments, expected_moments = (torch.load(folder / "optimizer.pt")["state"] for folder in (checkpoint, expected))
    assert moments.keys() == expected_moments.keys()
    assert all(same_tensors(moments[number], expected_moments[number]) for number in moments)
    found, wanted = (TrainerState.load_from_json(folder / "trainer_state.json") for folder in (checkpoint, expected))
    assert (found.global_step, found.best_metric) == (wanted.global_step, wanted.best_metric)
    assert found.global_step >= steps
    return found.global_step


def assert_same_result(output: Path, undisturbed: Path) -> None:
    assert same_tensors(load_file(output / WEIGHTS), load_file(undisturbed / WEIGHTS))
    assert latest_complete_checkpoint(output).name == latest_complete_checkpoint(undisturbed).name
    assert_kept(output, undisturbed, 0)
    # Two and the best, and no unfinished file.
    assert 2 <= len(list(output.glob("checkpoint-*"))) <= 3
    assert not list(output.rglob("*.unfinished"))


# Resuming from every checkpoint -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        # The checkpoints at the ends of epochs are saved before their evaluation.
        pytest.param({"eval_strategy": "epoch", "save_steps": 4, **TWO_EPOCHS}, id="evaluation after saving"),
        slow({}, id="steps"),
        slow({"gradient_accumulation_steps": 4, "max_steps": 5, "save_steps": 1}, id="accumulation"),
        slow({"eval_on_start": True, "save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2.5}, id="epochs"),
    ],
)
def test_every_checkpoint_leads_to_the_same_weights(arguments, tmp_path):
    undisturbed = tiny_trainer(tmp_path / "undisturbed", Recipe(ema_decay=0.9), **arguments)
    undisturbed.train()
    found = list((tmp_path / "undisturbed").glob("checkpoint-*"))
    assert len(found) >= 2
    for checkpoint in found:
        output = tmp_path / f"from-{checkpoint.name}"
        shutil.copytree(checkpoint, output / checkpoint.name)
        resumed = tiny_trainer(output, Recipe(ema_decay=0.9), **arguments)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == undisturbed.state.global_step
        assert same_tensors(resumed.model.state_dict(), undisturbed.model.state_dict()), checkpoint.name


# Two processes ----------------------------------------------------------------------------------------------------


def train_as_process(rank: int, port: int, output: Path) -> None:
    """Train as one of two processes; the second is slow to write. Each writes its final weights."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port))
    if rank == 1:
        save = Trainer._save_rng_state
        Trainer._save_rng_state = lambda trainer, folder: (time.sleep(0.3), save(trainer, folder))
    trainer = tiny_trainer(output, Recipe(ema_decay=0.8), ddp_backend="gloo", max_steps=3)
    trainer.train()
    save_file(trainer.model.state_dict(), output / f"process-{rank}.safetensors")


def test_two_processes_keep_one_average_and_wait_for_each_other(start, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [start(train_as_process, rank, port, tmp_path) for rank in (0, 1)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    first, second = (load_file(tmp_path / f"process-{rank}.safetensors") for rank in (0, 1))
    assert same_tensors(first, second)
    assert same_tensors(first, load_file(tmp_path / "checkpoint-3" / EMA_FILE))
    files = json.loads((tmp_path / "checkpoint-3" / MARKER).read_text())["files"]
    assert files.keys() > {"rng_state_0.pth", "rng_state_1.pth", EMA_FILE}
