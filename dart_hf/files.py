"""Output files and folders that appear complete or not at all, and the weight files of a saved model."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def absolute_source(source: str) -> str:
    """Return the full path of a local source, and any other name (an id on the Hub) unchanged."""
    return str(Path(source).resolve()) if Path(source).exists() else source


def check_output_folder(output: Path) -> None:
    """Raise a FileExistsError unless `output` does not exist or is an empty folder."""
    if output.is_dir() and any(output.iterdir()):
        raise FileExistsError(f"output: the folder {output} is not empty; give a new one or empty it.")
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"output: {output} is a file; give a folder.")


@contextmanager
def atomic_folder(output: Path) -> Iterator[Path]:
    """Give a new folder next to `output` to fill; it becomes `output` at the end, or is deleted after an error."""
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
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; it becomes `path` at the end in one step, or is deleted after an error."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        yield unfinished
        flush_to_disk(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Write a file's contents, or a folder's list of entries, from the system's cache to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_model_files(source: Path, target: Path) -> None:
    """Move the files of a saved model into another folder on the same disk, and replace files of the same name.

    `config.json` is deleted first and moved last, so a half-replaced folder does not load as a model.
    """
    (target / "config.json").unlink(missing_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, target / path.name)
    source.rmdir()


def weights_sha256(folder: Path) -> str:
    """Compute the SHA-256 of a model's weights: of its `model*.safetensors` files, joined in the order of their names.

    Raises:
        FileNotFoundError: The folder has no such file.
    """
    paths = sorted(folder.glob("model*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"The folder {folder} holds no weights: it has no model.safetensors.")
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()
