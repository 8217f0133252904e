"""Checkpoints of a `Trainer` that survive the training being killed: complete or not taken, and exact to resume from.

`Trainer` writes `checkpoint-N` file by file, so that a training that is killed meanwhile leaves a part of one. With

```python
trainer = Trainer(..., callbacks=[RandomStateCallback(), EmaCallback(), CompleteCheckpointCallback()])
remove_incomplete_checkpoints(args.output_dir)
resume_training(trainer, latest_complete_checkpoint(args.output_dir))
```

a training comes to the same final weights wherever and however often it is killed: bit for bit on a CPU with as many
threads. Its augmentation must not draw from the global random numbers, but be seeded by epoch and row: a batch is made
before the step that precedes it is over, and again after a resume.

That much is guaranteed when the process is killed. When the machine loses power, it is a best effort, as good as the
file system: files and folders are flushed (fsync) before a checkpoint counts as complete.
"""

import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, TrainOutput

from dart_hf.files import atomic_write, flush_to_disk

MARKER = "complete.json"


# --- reading ----------------------------------------------------------------------------------------------------------


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Where `Trainer` keeps the checkpoint of the step that it is at."""
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def latest_complete_checkpoint(folder: str | os.PathLike) -> Path | None:
    """The checkpoint of the most steps in a `Trainer`'s output folder, of those that are complete; None without any.

    Complete is what [`CompleteCheckpointCallback`] has marked and whose files are still there in full size. Reads only.
    """
    return max(filter(is_complete, _checkpoints(folder)), key=_step, default=None)


def remove_incomplete_checkpoints(folder: str | os.PathLike) -> list[Path]:
    """Delete every `checkpoint-N` that was never complete, and return which. For one process, before a training.

    One that was, and has lost a file since, stays. A `Trainer` without [`CompleteCheckpointCallback`] leaves none that
    was: all of its checkpoints would go.
    """
    incomplete = [checkpoint for checkpoint in _checkpoints(folder) if not (checkpoint / MARKER).exists()]
    for checkpoint in incomplete:
        _remove(checkpoint)
    return incomplete


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint has been marked as complete, and all files that it had then are there in full size."""
    try:
        sizes = json.loads((checkpoint / MARKER).read_text())["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _checkpoints(folder: str | os.PathLike) -> list[Path]:
    """The checkpoints in a folder, by their steps."""
    found = (path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir())
    return sorted((path for path in found if re.fullmatch(r"\d+", path.name.rpartition("-")[2])), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


# --- writing ----------------------------------------------------------------------------------------------------------


def _mark_complete(checkpoint: Path) -> None:
    """Flush the files of a checkpoint, then mark it, all at once."""
    contents = list(checkpoint.rglob("*"))
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in contents if path.is_file()}
    for path in (*contents, checkpoint.parent, checkpoint):
        flush_to_disk(path)
    with atomic_write(checkpoint / MARKER) as unfinished:
        unfinished.write_text(json.dumps({"files": sizes}, indent=2) + "\n")
    flush_to_disk(checkpoint)


def _remove(checkpoint: Path) -> None:
    # Half deleted, it must not count as complete.
    (checkpoint / MARKER).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


# --- training ---------------------------------------------------------------------------------------------------------


class CompleteCheckpointCallback(TrainerCallback):
    """Marks each checkpoint as complete once everything is in it, and deletes older ones only then.

    The marker, `complete.json`, has the names and sizes of all files and is written last. Of several processes each
    waits for the others to have written. A folder in which a killed training left part of the same checkpoint is
    emptied before it is written again.

    It must come after the callbacks that write into checkpoints, such as [`EmaCallback`], so best as the last one.

    Args:
        total_limit: How many complete checkpoints to keep: the best, if `Trainer` knows one, and the latest, at least
            one. `save_total_limit` of the training arguments by default, which is then taken from `Trainer`, because
            `Trainer` would delete the older ones before the new one is complete. None there too keeps all.

    Raises:
        ValueError: `total_limit` is below 1.
    """

    def __init__(self, total_limit: int | None = None) -> None:
        if total_limit is not None and total_limit < 1:
            raise ValueError(f"total_limit must be at least 1, or None to keep all checkpoints, got {total_limit}.")
        self.total_limit = total_limit

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # `Trainer` keeps all where its own limit is 0 or less.
        if self.total_limit is None and (args.save_total_limit or 0) > 0:
            self.total_limit = args.save_total_limit
        args.save_total_limit = None
        if state.best_model_checkpoint is not None:
            # The output folder may have moved since.
            state.best_model_checkpoint = os.path.join(args.output_dir, Path(state.best_model_checkpoint).name)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Saving the best is decided after the evaluation, when nobody asks the callbacks any more.
        if control.should_save or (control.should_evaluate and args.save_strategy == SaveStrategy.BEST):
            self._empty_folder(args, state)

    on_epoch_end = on_step_end

    def _empty_folder(self, args: TrainingArguments, state: TrainerState) -> None:
        checkpoint = checkpoint_folder(args, state)
        if args.should_save and checkpoint.exists():
            _remove(checkpoint)
        PartialState().wait_for_everyone()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()
        if args.should_save:
            _mark_complete(checkpoint_folder(args, state))
            self._remove_older(args, state)

    def _remove_older(self, args: TrainingArguments, state: TrainerState) -> None:
        if self.total_limit is None:
            return
        # By name: a resumed training may have been given its folder by another path.
        kept = {checkpoint_folder(args, state).name, Path(state.best_model_checkpoint or "").name}
        # Later ones are left from a training that this one has taken back, and will write over.
        complete = [path for path in _checkpoints(args.output_dir) if _step(path) <= state.global_step]
        complete = [path for path in complete if is_complete(path)]
        removable = [path for path in complete if path.name not in kept]
        for checkpoint in removable[: max(len(complete) - self.total_limit, 0)]:
            _remove(checkpoint)


class RandomStateCallback(TrainerCallback):
    """Leaves training's random numbers as they were before an evaluation.

    An evaluation draws some: the seed of its data loader's workers, at least. A training that resumes from a checkpoint
    saved before the evaluation of the same step (`save_strategy="steps"` with `eval_strategy="epoch"`) does not
    evaluate again, so that its dropout would differ from then on.
    """

    def __init__(self) -> None:
        self._state: tuple[Any, ...] | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_evaluate:
            device = torch.get_device_module(args.device).get_rng_state() if args.device.type != "cpu" else None
            self._state = (random.getstate(), np.random.get_state(), torch.get_rng_state(), device)

    on_epoch_end = on_step_end

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._state = None  # Not for an evaluation that somebody else starts later.

    on_train_end = on_step_begin

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._state is None:
            return
        python, numpy, cpu, device = self._state
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if device is not None:
            torch.get_device_module(args.device).set_rng_state(device)


def resume_training(trainer: Trainer, checkpoint: str | os.PathLike | None) -> TrainOutput:
    """`trainer.train`, from a checkpoint or, without one, from the start.

    Where the checkpoint is already the last, nothing is trained: the trainer gets its weights and its callbacks run.
    `Trainer` alone would take one step too many from there if `max_steps` was reached within an epoch.
    """
    # Memory of PyTorch's own alignment, on which the last bits of a product can depend; loaded weights have another.
    for tensor in (*trainer.model.parameters(), *trainer.model.buffers()):
        tensor.data = tensor.data.clone()
    if checkpoint is None:
        return trainer.train()
    state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
    if trainer.args.max_steps > 0:
        finished = state.global_step >= trainer.args.max_steps
    else:
        finished = state.epoch >= trainer.args.num_train_epochs
    if not finished:
        return trainer.train(resume_from_checkpoint=os.fspath(checkpoint))
    # With epochs of one step there are as many epochs as steps behind it, and none ahead.
    trainer.get_train_dataloader = lambda: [{}]
    try:
        return trainer.train(resume_from_checkpoint=os.fspath(checkpoint))
    finally:
        del trainer.get_train_dataloader
