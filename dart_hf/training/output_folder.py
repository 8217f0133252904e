"""The output folder of `dart-hf train`: what a run leaves there, and when a new run may write to it."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer

from dart_hf.data.fingerprint import data_fingerprint
from dart_hf.data.held_out import HELD_OUT_FILE, held_out_record
from dart_hf.data.image_data import ImageData
from dart_hf.files import atomic_write, move_model_files
from dart_hf.training.checkpoints import MARKER, latest_complete_checkpoint

COMMAND = "dart-hf train"
SETTINGS_FILE = "train_settings.json"
FACTS_FILE = "training.json"
EVALUATION_FILE = "evaluation.json"


def own_settings(output: Path) -> dict[str, Any] | None:
    """The settings that a run of this command left in its output folder; None without such a run."""
    try:
        return json.loads((output / SETTINGS_FILE).read_text())[COMMAND]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def check_output(output: Path, resume: bool) -> None:
    """Raise an error if a run would overwrite something of another one, or cannot resume in this folder.

    Raises:
        OSError: The output is a file, a folder in use, or holds no run to resume.
        ValueError: The run to resume has lost its checkpoints.
    """
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"output: {output} is a file; give a folder.")
    begun = own_settings(output) is not None
    marked = any((path / MARKER).exists() for path in output.glob("checkpoint-*"))
    finished = (output / "config.json").exists()
    if resume:
        if not begun:
            raise FileNotFoundError(f"resume: the folder {str(output)!r} holds no training of this command.")
        if latest_complete_checkpoint(output) is None and (marked or finished):
            raise ValueError(
                f"resume: the training in {str(output)!r} has no complete checkpoint to go on from; begin it in a new "
                "folder."
            )
    elif output.exists() and any(output.iterdir()) and (not begun or marked or finished):
        hint = ", or resume=True (--resume) to go on" if begun else ""
        raise FileExistsError(f"output: the folder {output} is not empty; give a new one{hint}.")


def begin_run(output: Path, given: Mapping[str, Any], data: ImageData) -> None:
    """Write the settings and the identity of the data, which a resumed run reads."""
    output.mkdir(parents=True, exist_ok=True)
    contents = {COMMAND: given, "data": _identity(data)}
    with atomic_write(output / SETTINGS_FILE) as unfinished:
        unfinished.write_text(json.dumps(contents, indent=2) + "\n")


def check_same_data(output: Path, data: ImageData) -> None:
    """Raise a ValueError unless a run's data is the data that it began with, as far as its folder tells."""
    try:
        before = json.loads((output / SETTINGS_FILE).read_text())["data"]
    except (OSError, ValueError, LookupError, TypeError):
        return
    now = _identity(data)
    if now["class_names"] != before["class_names"]:
        raise ValueError(
            f"resume: the data has the classes {_few(now['class_names'])}, and the training began with "
            f"{_few(before['class_names'])}; begin it in a new folder, or restore the data."
        )
    for split, what in (("train", "training images"), ("evaluation", "images to evaluate with")):
        if None not in (now[split], before[split]) and now[split] != before[split]:
            raise ValueError(
                f"resume: the {what} or their labels are not those that the training began with; begin it in a new "
                "folder, or restore the data."
            )


def _identity(data: ImageData) -> dict[str, Any]:
    return {
        "class_names": list(data.label_names),
        "train": data_fingerprint(data.train),
        "evaluation": data_fingerprint(data.evaluation),
    }


def _few(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def save_model(trainer: Trainer, output: Path, facts: Mapping[str, Any], data: ImageData) -> None:
    """Replace the folder's model with the trained one.

    Every process takes part, because the weights may be spread over them.
    """
    unfinished = output / ".unfinished"
    if trainer.is_world_process_zero():
        shutil.rmtree(unfinished, ignore_errors=True)
    trainer.save_model(str(unfinished))
    if not trainer.is_world_process_zero():
        return
    # Pickled settings, which nobody needs.
    (unfinished / "training_args.bin").unlink(missing_ok=True)
    (unfinished / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n")
    # These two belong to the model that is replaced.
    for name in (EVALUATION_FILE, HELD_OUT_FILE):
        (output / name).unlink(missing_ok=True)
    if data.evaluation is not None and data.evaluation_split is None:
        (unfinished / HELD_OUT_FILE).write_text(json.dumps(held_out_record(data.evaluation), indent=2) + "\n")
    move_model_files(unfinished, output)


def write_facts(output: Path, facts: Mapping[str, Any]) -> None:
    """Replace the facts of the training beside its model."""
    with atomic_write(output / FACTS_FILE) as unfinished:
        unfinished.write_text(json.dumps(facts, indent=2) + "\n")


def read_facts(output: Path) -> dict[str, Any] | None:
    """The facts of the training whose model the folder holds; None without one."""
    try:
        return json.loads((output / FACTS_FILE).read_text()) if (output / "config.json").exists() else None
    except (OSError, ValueError):
        return None
