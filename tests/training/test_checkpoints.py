"""Which checkpoints count as complete, and what is deleted when."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.tiny_training import tiny_trainer
from transformers import Trainer, TrainerCallback

from dart_hf import files as folders
from dart_hf.training import checkpoints
from dart_hf.training.checkpoints import (
    MARKER,
    CompleteCheckpointCallback,
    RandomStateCallback,
    is_complete,
    latest_complete_checkpoint,
    remove_incomplete_checkpoints,
    resume_training,
)


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with complete checkpoints of 3, 6, 9 and 12 steps. Not to be written to."""
    output = tmp_path_factory.mktemp("checkpoints")
    tiny_trainer(output, [CompleteCheckpointCallback()], max_steps=12).train()
    return output


@pytest.fixture
def folder(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "trained"))


def test_the_marker_has_every_file(trained):
    for step in (3, 6, 9, 12):
        checkpoint = trained / f"checkpoint-{step}"
        files = json.loads((checkpoint / MARKER).read_text())["files"]
        assert files == {name: (checkpoint / name).stat().st_size for name in names(checkpoint) - {MARKER}}
        assert files.keys() > {"model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"}


def test_files_in_subfolders_count(tmp_path):
    (tmp_path / "checkpoint-1" / "shards").mkdir(parents=True)
    shard = tmp_path / "checkpoint-1" / "shards" / "0.bin"
    shard.write_bytes(b"weights")
    checkpoints._mark_complete(shard.parent.parent)
    assert latest_complete_checkpoint(tmp_path) == shard.parent.parent
    shard.write_bytes(b"wei")
    assert latest_complete_checkpoint(tmp_path) is None


def test_everything_is_flushed_before_it_counts(folder, monkeypatch):
    checkpoint = folder / "checkpoint-12"
    (checkpoint / MARKER).unlink()
    flush, before, after = folders.flush_to_disk, set(), set()

    def record(path):
        (after if is_complete(checkpoint) else before).add(path)
        flush(path)

    for module in (checkpoints, folders):
        monkeypatch.setattr(module, "flush_to_disk", record)
    files = set(checkpoint.iterdir())
    checkpoints._mark_complete(checkpoint)
    assert before == files | {folder, checkpoint, checkpoint / f".{MARKER}.unfinished"}
    assert after == {checkpoint}


def test_the_latest_has_the_most_steps(folder):
    assert latest_complete_checkpoint(folder) == folder / "checkpoint-12"
    assert latest_complete_checkpoint(str(folder)) == folder / "checkpoint-12"
    shutil.rmtree(folder / "checkpoint-12")
    assert latest_complete_checkpoint(folder) == folder / "checkpoint-9"
    assert latest_complete_checkpoint(folder / "missing") is None


@pytest.mark.parametrize("damage", ["no marker", "half a marker", "a file is missing", "a file is cut", "empty"])
def test_an_incomplete_checkpoint_is_not_taken_and_is_removed_if_it_never_was_complete(damage, folder):
    checkpoint = folder / "checkpoint-12"
    if damage == "no marker":
        (checkpoint / MARKER).unlink()
    elif damage == "half a marker":
        (checkpoint / MARKER).write_text((checkpoint / MARKER).read_text()[:20])
    elif damage == "a file is missing":
        (checkpoint / "scheduler.pt").unlink()
    elif damage == "a file is cut":
        (checkpoint / "optimizer.pt").write_bytes((checkpoint / "optimizer.pt").read_bytes()[:-1])
    else:
        shutil.rmtree(checkpoint)
        checkpoint.mkdir()
    assert latest_complete_checkpoint(folder) == folder / "checkpoint-9"
    assert checkpoint.exists()
    never_complete = damage in ("no marker", "empty")
    assert remove_incomplete_checkpoints(folder) == ([checkpoint] if never_complete else [])
    assert names(folder) == {"checkpoint-3", "checkpoint-6", "checkpoint-9"} | (
        set() if never_complete else {"checkpoint-12"}
    )


def test_other_folders_are_left_alone(folder):
    for name in ("checkpoint-last", "checkpoint-", "old-checkpoint-9"):
        (folder / name).mkdir()
    (folder / "checkpoint-99").write_text("a file")
    before = names(folder)
    assert latest_complete_checkpoint(folder) == folder / "checkpoint-12"
    assert remove_incomplete_checkpoints(folder) == []
    assert names(folder) == before
    assert remove_incomplete_checkpoints(folder / "missing") == []


@pytest.mark.parametrize(
    ("limit", "save_total_limit", "kept"),
    [(None, 2, {9, 12}), (1, 3, {12}), (None, None, {3, 6, 9, 12}), (None, 0, {3, 6, 9, 12})],
)
def test_older_checkpoints_are_deleted(limit, save_total_limit, kept, tmp_path):
    callback = CompleteCheckpointCallback(limit)
    tiny_trainer(tmp_path, [callback], max_steps=12, save_total_limit=save_total_limit).train()
    assert names(tmp_path) == {f"checkpoint-{step}" for step in kept}


def test_the_best_checkpoint_is_kept(tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = tiny_trainer(tmp_path, [CompleteCheckpointCallback(1)], max_steps=12, **best)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint).name
    assert best != "checkpoint-12"
    assert names(tmp_path) == {best, "checkpoint-12"}


def test_the_older_go_only_when_the_new_is_complete(tmp_path, monkeypatch):
    remove, seen = checkpoints._remove, []

    def record(checkpoint):
        seen.append((checkpoint.name, latest_complete_checkpoint(tmp_path).name))
        remove(checkpoint)

    monkeypatch.setattr(checkpoints, "_remove", record)
    tiny_trainer(tmp_path, [CompleteCheckpointCallback()], max_steps=9, save_total_limit=1).train()
    assert seen == [("checkpoint-3", "checkpoint-6"), ("checkpoint-6", "checkpoint-9")]


def test_what_is_being_deleted_is_not_complete(folder, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda checkpoint: None)
    checkpoints._remove(folder / "checkpoint-12")
    assert not is_complete(folder / "checkpoint-12")


def test_a_checkpoint_is_written_again_from_nothing(folder, monkeypatch):
    (folder / "checkpoint-6" / "stale.txt").write_text("from a training that was killed")
    save, complete = Trainer._save, []

    def record(trainer, output, *args, **kwargs):
        complete.append((Path(output) / MARKER).exists())
        save(trainer, output, *args, **kwargs)

    monkeypatch.setattr(Trainer, "_save", record)
    tiny_trainer(folder, [CompleteCheckpointCallback(1)], max_steps=9).train(
        resume_from_checkpoint=str(folder / "checkpoint-3")
    )
    # While it is written, it does not count as complete.
    assert complete == [False, False]
    # The one of 12 steps is not older.
    assert names(folder) == {"checkpoint-9", "checkpoint-12"}
    assert not (folder / "checkpoint-9" / "stale.txt").exists()


def test_saving_the_best_alone(tmp_path):
    stale = tmp_path / "checkpoint-3"
    stale.mkdir()
    (stale / "stale.txt").write_text("from a training that was killed")
    best = {"save_strategy": "best", "metric_for_best_model": "loss", "greater_is_better": True}
    tiny_trainer(tmp_path, [CompleteCheckpointCallback()], max_steps=6, **best).train()
    assert latest_complete_checkpoint(tmp_path) is not None
    assert not (stale / "stale.txt").exists()


def test_a_limit_out_of_range():
    with pytest.raises(ValueError, match="total_limit must be at least 1, or None to keep all checkpoints, got 0"):
        CompleteCheckpointCallback(0)


class Evaluations(TrainerCallback):
    """Keeps torch's random state before and after the first evaluation; given before a [`RandomStateCallback`]."""

    def __init__(self):
        self.states = []

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_evaluate:
            self.states.append(torch.get_rng_state())

    def on_evaluate(self, args, state, control, **kwargs):
        self.states.append(torch.get_rng_state())


def test_an_evaluation_draws_from_no_random_numbers_of_the_training(tmp_path):
    drawn = Evaluations()
    tiny_trainer(tmp_path, [drawn], max_steps=3).train()
    before, after = drawn.states
    assert not torch.equal(before, after)

    kept = Evaluations()
    trainer = tiny_trainer(tmp_path, [RandomStateCallback(), kept], max_steps=3)
    trainer.train()
    before, after = kept.states
    assert torch.equal(before, after)
    # One that the training did not schedule is none of its business.
    torch.manual_seed(1234)
    trainer.evaluate()
    assert torch.initial_seed() == 1234


def test_resuming_where_the_training_ended_trains_nothing(trained, tmp_path):
    trainer = tiny_trainer(tmp_path, [], max_steps=9)
    resume_training(trainer, trained / "checkpoint-9")
    assert trainer.state.global_step == 9
    assert not list(tmp_path.glob("checkpoint-*"))
    # The trainer is as it was.
    assert len(trainer.get_train_dataloader()) == 6


def test_resuming_from_nothing_starts(tmp_path):
    trainer = tiny_trainer(tmp_path, [], max_steps=1)
    resume_training(trainer, None)
    assert trainer.state.global_step == 1
