"""Checkpoints that survive a killed training: a checkpoint is complete, or it is not used.

`Trainer` writes `checkpoint-N` file by file, so a training that is killed meanwhile leaves an incomplete one.
[`DartTrainer`] marks a checkpoint once everything is in it: `complete.json` has the names and sizes of all files and is
written last. It deletes older checkpoints only then.

This is guaranteed when the process is killed. When the machine loses power, it is as good as the file system: files and
folders are flushed (fsync) before a checkpoint counts as complete.
"""

import json
import os
import re
import shutil
from pathlib import Path

from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dart_hf.files import atomic_write, flush_to_disk
from dart_hf.modeling.modeling_dartified import DartifiedPreTrainedModel

MARKER = "complete.json"


def latest_complete_checkpoint(folder: str | os.PathLike) -> Path | None:
    """The complete checkpoint with the most steps in a trainer's output folder, or None. Only reads."""
    return max(filter(is_complete, _checkpoints(folder)), key=_step, default=None)


def is_complete(checkpoint: Path) -> bool:
    """Tell if a checkpoint was marked as complete and still has all its files in full size."""
    try:
        sizes = json.loads((checkpoint / MARKER).read_text())["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def remove_incomplete_checkpoints(folder: str | os.PathLike) -> list[Path]:
    """Delete every `checkpoint-N` that was never complete, and return them. For one process, before a training.

    A checkpoint that was complete and has lost a file since stays. The checkpoints of a stock `Trainer` are never
    marked, so all of them would go.
    """
    incomplete = [checkpoint for checkpoint in _checkpoints(folder) if not (checkpoint / MARKER).exists()]
    for checkpoint in incomplete:
        remove_checkpoint(checkpoint)
    return incomplete


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint, its mark first: the process may be killed before the rest is deleted."""
    (checkpoint / MARKER).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def mark_complete(checkpoint: Path) -> None:
    """Flush the files of a checkpoint, then mark it as complete in one step."""
    contents = list(checkpoint.rglob("*"))
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in contents if path.is_file()}
    for path in (*contents, checkpoint.parent, checkpoint):
        flush_to_disk(path)
    with atomic_write(checkpoint / MARKER) as unfinished:
        unfinished.write_text(json.dumps({"files": sizes}, indent=2) + "\n")
    flush_to_disk(checkpoint)


def remove_older_checkpoints(newest: Path, limit: int | None, best: str | None = None) -> None:
    """Keep `limit` complete checkpoints up to `newest`: that one, the best, and the latest before it.

    Checkpoints of later steps stay: they belong to a training that was resumed from an earlier checkpoint, and will be
    written again. None keeps all.
    """
    if limit is None:
        return
    # By name: a resumed training may know its folder by another path.
    kept = {newest.name, Path(best or "").name}
    complete = [path for path in _checkpoints(newest.parent) if _step(path) <= _step(newest) and is_complete(path)]
    removable = [path for path in complete if path.name not in kept]
    for checkpoint in removable[: max(len(complete) - limit, 0)]:
        remove_checkpoint(checkpoint)


def is_last(checkpoint: str | os.PathLike, args: TrainingArguments) -> bool:
    """Tell if a training with these arguments has nothing left to do after this checkpoint."""
    state = load_state(checkpoint)
    if args.max_steps > 0:
        return state.global_step >= args.max_steps
    return state.epoch >= args.num_train_epochs


def load_state(checkpoint: str | os.PathLike) -> TrainerState:
    """`Trainer`'s state in a checkpoint."""
    return TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))


def load_renamed_weights(model: nn.Module, checkpoint: str | os.PathLike) -> None:
    """Load a dartified model's weights from a checkpoint; any other model stays as it is.

    transformers saves the weights of some encoders under older names. Its `from_pretrained` translates them, but
    `Trainer` does not, and would keep the weights that the model had before.
    """
    if isinstance(model, DartifiedPreTrainedModel):
        saved = type(model).from_pretrained(checkpoint).state_dict()
        model.load_state_dict({name: saved[name] for name in model.state_dict()})


def _checkpoints(folder: str | os.PathLike) -> list[Path]:
    """The checkpoints in a folder, sorted by their steps."""
    found = (path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir())
    return sorted((path for path in found if re.fullmatch(r"\d+", path.name.rpartition("-")[2])), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
