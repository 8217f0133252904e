"""Held-out images: which images a training evaluated with, so that a later evaluation takes exactly these.

An image is recognised by its file's contents. So the record survives a moved or renamed folder and added images.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import datasets

HELD_OUT_FILE = "held_out.json"


def held_out_record(split: datasets.Dataset) -> dict[str, Any]:
    """Describe the images of a split for `held_out.json`: the size and the SHA-256 of each image's file.

    Args:
        split: Column `image`, undecoded as [`load_image_data`] gives it or decoded.

    Returns:
        `{"images": [{"bytes": size, "sha256": digest}, ...]}` in the order of the rows, without missing files.

    Raises:
        OSError: A file cannot be read.
    """
    return {"images": [{"bytes": size, "sha256": digest()} for _, size, digest in _contents(split)]}


def select_held_out(split: datasets.Dataset, record: Mapping[str, Any]) -> datasets.Dataset:
    """The rows of a split that a record names, in the order of the split.

    Args:
        split: The images that the training was given, held-out ones and others, as [`load_image_data`] gives them.
        record: What [`held_out_record`] returned.

    Raises:
        ValueError: The record is none, or an image that it names is not in the split.
        OSError: A file cannot be read.
    """
    try:
        wanted = Counter(image["sha256"] for image in record["images"])
        sizes = {image["bytes"] for image in record["images"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{HELD_OUT_FILE} has no record of held-out images.") from error
    found = []
    for row, size, digest in _contents(split):
        # A file of another size needs no reading.
        if size in sizes and wanted[key := digest()] > 0:
            wanted[key] -= 1
            found.append(row)
    if missing := wanted.total():
        raise ValueError(
            f"{missing} of the {len(record['images'])} images that the training held out are not in the data, so its "
            "held-out images cannot be told from those that it learned from; give the data of the training."
        )
    return split.select(found)


def _contents(split: datasets.Dataset) -> Iterator[tuple[int, int, Callable[[], str]]]:
    """The row, the size in bytes and a function that gives the SHA-256 of each image's file that exists."""
    images = split.select_columns("image").cast_column("image", datasets.Image(decode=False))
    for number, row in enumerate(images):
        image = row["image"] or {"path": None, "bytes": None}
        path, content = image["path"], image["bytes"]
        if content is not None:
            yield number, len(content), lambda content=content: hashlib.sha256(content).hexdigest()
        elif path is not None and os.path.exists(path):
            yield number, os.path.getsize(path), lambda path=path: _file_digest(path)


def _file_digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
