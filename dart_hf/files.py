"""Output files and folders that appear complete or not at all, and the weights that a folder holds."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_unused(output: Path) -> None:
    """Raise a FileExistsError unless `output` does not exist or is an empty folder."""
    if output.is_dir() and any(output.iterdir()):
        raise FileExistsError(f"output: the folder {output} is not empty; give a new one or empty it.")
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"output: {output} is a file; give a folder.")


@contextmanager
def complete_folder(output: Path) -> Iterator[Path]:
    """A folder to fill next to `output`, which then takes its place, or vanishes if filling it fails."""
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.parent / f".{output.name}.{uuid.uuid4().hex}"
    unfinished.mkdir()
    try:
        yield unfinished
        if output.exists():
            output.rmdir()
        os.replace(unfinished, output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Another name to write to; what is there then becomes the file `path`, flushed, in one step."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        yield unfinished
        flush(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have a file's contents, or a folder's entries, written to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_model(source: Path, target: Path) -> None:
    """Move the files of a saved model to another folder in the same place, over those there.

    In between, the target has no `config.json` and so is no model.
    """
    (target / "config.json").unlink(missing_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, target / path.name)
    source.rmdir()
