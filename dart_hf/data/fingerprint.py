"""Fingerprint: a short text by which a resumed training recognises its data."""

import hashlib
import json
import os
from typing import Any

import datasets

BATCH = 1000


def data_fingerprint(split: datasets.Dataset | datasets.IterableDataset | None) -> str | None:
    """A digest of a split's images and labels, in their order.

    It is cheap, because it reads no pixels: an image counts with its path below the folder that all paths of the split
    share, and with the size of its file. So it stays the same when the folder is moved, and changes when an image or a
    label is added, removed, replaced or renamed.

    Args:
        split: Columns `image` (undecoded or decoded) and `label`, as [`load_image_data`] gives them.

    Returns:
        Hexadecimal digits. None for None, and for a stream, because its rows cannot be listed.
    """
    if not isinstance(split, datasets.Dataset):
        return None
    split = split.cast_column("image", datasets.Image(decode=False))
    paths, sizes, labels = [], [], []
    # Arrow tables, so that the bytes of a parquet file's images are not copied.
    for table in split.with_format("arrow").iter(BATCH):
        images = table["image"].combine_chunks()
        paths += [path or "" for path in images.field("path").to_pylist()]
        sizes += [_length(content) for content in images.field("bytes")]
        labels += table["label"].to_pylist() if "label" in table.column_names else [None] * len(table)
    folders = {os.path.dirname(path) for path, size in zip(paths, sizes, strict=True) if size is None and path}
    root = os.path.commonpath(folders) if folders else ""
    digest = hashlib.sha256()
    for path, size, label in zip(paths, sizes, labels, strict=True):
        if size is None and path:
            path, size = os.path.relpath(path, root), os.path.getsize(path) if os.path.exists(path) else None
        digest.update(json.dumps([path, size, label]).encode())
    return digest.hexdigest()


def _length(content: Any) -> int | None:
    """The length of an Arrow scalar of bytes, without a copy."""
    return len(content.as_buffer()) if content.is_valid else None
