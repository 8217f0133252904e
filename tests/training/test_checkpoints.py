"""Which checkpoints count as complete, and which are deleted when."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.tiny_training import KEEP_WORST, same_tensors, tiny_trainer
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from dart_hf import files
from dart_hf.training import checkpoints
from dart_hf.training.checkpoints import (
    MARKER,
    is_complete,
    latest_complete_checkpoint,
    mark_complete,
    remove_checkpoint,
    remove_incomplete_checkpoints,
)


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with complete checkpoints of 3, 6, 9 and 12 steps. Not to be written to."""
    output = tmp_path_factory.mktemp("checkpoints")
    tiny_trainer(output, max_steps=12).train()
    return output


@pytest.fixture
def folder(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "trained"))


def test_marker_has_every_file(trained):
    for step in (3, 6, 9, 12):
        checkpoint = trained / f"checkpoint-{step}"
        marked = json.loads((checkpoint / MARKER).read_text())["files"]
        assert marked == {name: (checkpoint / name).stat().st_size for name in names(checkpoint) - {MARKER}}
        assert marked.keys() > {"model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"}


def test_files_in_subfolders_count(tmp_path):
    (tmp_path / "checkpoint-1" / "shards").mkdir(parents=True)
    shard = tmp_path / "checkpoint-1" / "shards" / "0.bin"
    shard.write_bytes(b"weights")
    mark_complete(shard.parent.parent)
    assert latest_complete_checkpoint(tmp_path) == shard.parent.parent
    shard.write_bytes(b"wei")
    assert latest_complete_checkpoint(tmp_path) is None


def test_files_are_flushed_before_the_checkpoint_is_marked(folder, monkeypatch):
    checkpoint = folder / "checkpoint-12"
    (checkpoint / MARKER).unlink()
    flush, before, after = files.flush_to_disk, set(), set()

    def record(path):
        (after if is_complete(checkpoint) else before).add(path)
        flush(path)

    for module in (checkpoints, files):
        monkeypatch.setattr(module, "flush_to_disk", record)
    contents = set(checkpoint.iterdir())
    mark_complete(checkpoint)
    assert before == contents | {folder, checkpoint, checkpoint / f".{MARKER}.unfinished"}
    assert after == {checkpoint}


# Damage -> what it does to a checkpoint.
DAMAGES = {
    "no marker": lambda checkpoint: (checkpoint / MARKER).unlink(),
    "half a marker": lambda checkpoint: (checkpoint / MARKER).write_text((checkpoint / MARKER).read_text()[:20]),
    "a file is missing": lambda checkpoint: (checkpoint / "scheduler.pt").unlink(),
    "a file is cut": lambda checkpoint: (checkpoint / "optimizer.pt").write_bytes(b"half"),
    "empty": lambda checkpoint: (shutil.rmtree(checkpoint), checkpoint.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_incomplete_checkpoint_is_not_used_and_removed_if_it_never_was_complete(damage, folder):
    checkpoint, never_complete = folder / "checkpoint-12", damage in ("no marker", "empty")
    DAMAGES[damage](checkpoint)
    assert latest_complete_checkpoint(str(folder)) == folder / "checkpoint-9"
    assert checkpoint.exists()
    assert remove_incomplete_checkpoints(folder) == ([checkpoint] if never_complete else [])
    assert checkpoint.exists() != never_complete and len(names(folder)) == 4 - never_complete


def test_other_folders_stay(folder):
    for name in ("checkpoint-last", "checkpoint-", "old-checkpoint-9"):
        (folder / name).mkdir()
    (folder / "checkpoint-99").write_text("a file")
    before = names(folder)
    assert latest_complete_checkpoint(folder) == folder / "checkpoint-12"
    assert remove_incomplete_checkpoints(folder) == []
    assert names(folder) == before
    assert remove_incomplete_checkpoints(folder / "missing") == []
    assert latest_complete_checkpoint(folder / "missing") is None


@pytest.mark.parametrize(("limit", "kept"), [(2, {9, 12}), (None, {3, 6, 9, 12}), (0, {3, 6, 9, 12})])
def test_older_checkpoints_are_deleted(limit, kept, tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=12, save_total_limit=limit)
    trainer.train()
    assert names(tmp_path) == {f"checkpoint-{step}" for step in kept}
    assert trainer.args.save_total_limit == limit


def test_best_checkpoint_is_kept_and_found_after_the_folder_moved(tmp_path):
    trainer = tiny_trainer(tmp_path / "before", max_steps=12, save_total_limit=1, **KEEP_WORST)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint).name
    assert best != "checkpoint-12"
    assert names(tmp_path / "before") == {best, "checkpoint-12"}
    (tmp_path / "before").rename(tmp_path / "after")
    moved = tiny_trainer(tmp_path / "after", max_steps=12, **KEEP_WORST)
    moved.train(resume_from_checkpoint=True)
    assert moved.state.best_model_checkpoint == str(tmp_path / "after" / best)


def test_older_checkpoints_stay_until_the_new_one_is_complete(tmp_path, monkeypatch):
    seen = []

    def record(checkpoint):
        seen.append((checkpoint.name, latest_complete_checkpoint(tmp_path).name))
        remove_checkpoint(checkpoint)

    monkeypatch.setattr(checkpoints, "remove_checkpoint", record)
    tiny_trainer(tmp_path, max_steps=9, save_total_limit=1).train()
    assert seen == [("checkpoint-3", "checkpoint-6"), ("checkpoint-6", "checkpoint-9")]


def test_checkpoint_is_written_again_from_nothing(folder, monkeypatch):
    (folder / "checkpoint-6" / "stale.txt").write_text("from a training that was killed")
    save, complete = Trainer._save, []

    def record(trainer, output, *args, **kwargs):
        complete.append((Path(output) / MARKER).exists())
        save(trainer, output, *args, **kwargs)

    monkeypatch.setattr(Trainer, "_save", record)
    tiny_trainer(folder, max_steps=9, save_total_limit=1).train(resume_from_checkpoint=folder / "checkpoint-3")
    assert complete == [False, False]
    # The checkpoint of 12 steps is not an older one.
    assert names(folder) == {"checkpoint-9", "checkpoint-12"}
    assert not (folder / "checkpoint-9" / "stale.txt").exists()


def test_save_strategy_best_marks_its_checkpoints(tmp_path):
    tiny_trainer(tmp_path, max_steps=6, **{**KEEP_WORST, "save_strategy": "best"}).train()
    assert latest_complete_checkpoint(tmp_path) is not None


class RandomStates(TrainerCallback):
    """Keeps torch's random state before and after the evaluation of the third step."""

    def __init__(self):
        self.states = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            self.states.append(torch.get_rng_state())

    def on_save(self, args, state, control, **kwargs):
        self.states.append(torch.get_rng_state())


def test_only_evaluations_within_a_training_keep_its_random_numbers(tmp_path):
    states = RandomStates()
    trainer = tiny_trainer(tmp_path, callbacks=[states], max_steps=3)
    trainer.train()
    before, after = states.states
    assert torch.equal(before, after)
    trainer.evaluate()
    assert not torch.equal(after, torch.get_rng_state())


def test_resume_after_the_last_step_gives_the_final_model(trained, tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(Trainer, "training_step", lambda *_, **__: steps.append(1))
    trainer = tiny_trainer(tmp_path, max_steps=9)
    trainer.train(resume_from_checkpoint=trained / "checkpoint-9")
    assert trainer.state.global_step == 9 and not steps and not names(tmp_path)
    assert same_tensors(trainer.model.state_dict(), load_file(trained / "checkpoint-9" / "model.safetensors"))
    # The trainer can go on as usual.
    assert len(trainer.get_train_dataloader()) == 6


def test_resume_true_takes_the_latest_complete_checkpoint_or_none(folder):
    (folder / "checkpoint-12" / MARKER).unlink()
    trainer = tiny_trainer(folder, max_steps=12)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 12 and is_complete(folder / "checkpoint-12")
    for path in folder.glob(f"*/{MARKER}"):
        path.unlink()
    trainer = tiny_trainer(folder, max_steps=1)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 1
    # Those without a marker may be a stock Trainer's, so they stay.
    assert names(folder) >= {"checkpoint-3", "checkpoint-12"}
