"""Image folders: ROOT/CLASS/…/IMAGE or ROOT/SPLIT/CLASS/…/IMAGE -> splits of image files and class names.

The folders of the first level are splits only if all of them have a split's name; otherwise they are classes. Neither
the names of files nor those of deeper folders decide anything. `datasets`' own imagefolder looks for "train", "test"
and the like in all of these names.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import datasets
import PIL.Image
from transformers.utils import logging

logger = logging.get_logger(__name__)

# The names of a split in any capitals -> what `datasets` calls it.
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# Formats that PIL recognises, but whose pixels it reads only with another program, if at all.
FORMATS_WITHOUT_PIXELS = ("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF")
# What operating systems and editors leave in folders.
HIDDEN_PREFIXES = (".", "__MACOSX")
MOST_KINDS = 5


@dataclass(frozen=True)
class FolderContents:
    """The files below a folder, in the order of their paths.

    Args:
        root: The folder.
        images: Paths of the image files, relative to `root`.
        has_metadata: There is a metadata file. It tells the labels instead of the folders' names.
        other_files: How many other files there are, by the end of their names.
    """

    root: Path
    images: list[Path]
    has_metadata: bool
    other_files: Counter[str]

    @property
    def split_folders(self) -> dict[str, str]:
        """The folders of the first level and the split that each is; empty if they are classes.

        Raises:
            ValueError: Two of the folders are the same split.
        """
        folders = sorted({path.parts[0] for path in self.images if len(path.parts) > 1})
        splits = {folder: SPLIT_NAMES.get(folder.casefold()) for folder in folders}
        if None in splits.values():
            return {}
        for name, count in Counter(splits.values()).items():
            if count > 1:
                both = " and ".join(repr(folder) for folder in folders if splits[folder] == name)
                raise ValueError(
                    f"data: the folders {both} in {str(self.root)!r} are all the split {name!r}; keep one."
                )
        return splits


def folder_contents(root: Path) -> FolderContents:
    """List the files below a folder. Links to files and folders are followed, hidden files and folders are left out."""
    readable = image_suffixes()
    images, others, has_metadata = [], Counter(), False
    for path in _files(root, Path(), [os.path.realpath(root)]):
        if path.name in METADATA_FILES:
            has_metadata = True
        elif path.suffix.lower() in readable:
            images.append(path)
        else:
            others[path.suffix.lower() or "without an ending"] += 1
    return FolderContents(root, images, has_metadata, others)


def image_suffixes() -> set[str]:
    """The ends of the names of image files that the installed PIL reads, such as ".png"."""
    return {
        suffix
        for suffix, kind in PIL.Image.registered_extensions().items()
        if kind in PIL.Image.OPEN and kind not in FORMATS_WITHOUT_PIXELS
    }


def load_folder(contents: FolderContents) -> Mapping[str, datasets.Dataset]:
    """The splits of an image folder: columns `image` (undecoded) and `label` (the name of the class).

    The images are not copied. If no image lies in a class folder, the splits have no column `label`. Files of other
    kinds, and images outside the class folders, are left out with a warning.

    Raises:
        ValueError: Two folders are the same split.
    """
    split_folders = contents.split_folders
    if contents.other_files:
        kinds = [f"{count} {kind}" for kind, count in contents.other_files.most_common(MOST_KINDS)]
        more = ", …" if len(contents.other_files) > MOST_KINDS else ""
        logger.warning(
            f"data: {contents.other_files.total():,} files in {str(contents.root)!r} are left out, because they are of "
            f"no image type that can be read here ({', '.join(kinds)}{more})."
        )
    rows: dict[str, list[tuple[str | None, Path]]] = {split: [] for split in SPLIT_NAMES.values()}
    for path in contents.images:
        # Without splits, an image beside the class folders has no class; with splits, neither has one beside these.
        split = split_folders.get(path.parts[0]) if len(path.parts) > 1 else None
        inner = path.parts[1:] if split else path.parts
        rows[split or "train"].append((inner[0] if len(inner) > 1 else None, path))
    loose = [path for split in rows.values() for label, path in split if label is None]
    labelled = len(loose) < len(contents.images)
    if labelled and loose:
        logger.warning(
            f"data: {len(loose):,} images in {str(contents.root)!r} are left out, because they lie in no class folder, "
            f"such as {loose[0].as_posix()!r}."
        )
        rows = {split: [row for row in entries if row[0] is not None] for split, entries in rows.items()}
    return {split: _dataset(contents.root, entries, split) for split, entries in rows.items() if entries}


def load_metadata_folder(contents: FolderContents) -> Mapping[str, datasets.Dataset]:
    """The splits of a folder whose metadata files tell the labels, as `datasets` reads these files.

    `datasets` would put every row of a metadata file beside the split folders into every split.

    Raises:
        ValueError, DatasetsError: The metadata cannot be read.
    """
    split_folders, root = contents.split_folders, os.path.abspath(contents.root)
    data = datasets.load_dataset("imagefolder", data_dir=root, data_files=["**"], split="train")
    if not split_folders:
        return {"train": data}
    rows: dict[str, list[int]] = {split: [] for split in SPLIT_NAMES.values()}
    column = next(name for name, feature in data.features.items() if isinstance(feature, datasets.Image))
    for row, entry in enumerate(data.select_columns(column).cast_column(column, datasets.Image(decode=False))):
        first = Path(os.path.relpath(entry[column]["path"], root)).parts[0]
        rows[split_folders.get(first, "train")].append(row)
    return {split: data.select(numbers) for split, numbers in rows.items() if numbers}


def _dataset(root: Path, rows: Iterable[tuple[str | None, Path]], split: str) -> datasets.Dataset:
    # os.path.abspath keeps links, so that paths show the names that the user gave.
    columns = {"image": [os.path.abspath(root / path) for _, path in rows], "label": [label for label, _ in rows]}
    data = datasets.Dataset.from_dict(columns, split=datasets.Split(split))
    if columns["label"][0] is None:
        data = data.remove_columns("label")
    return data.cast_column("image", datasets.Image(decode=False))


def _files(root: Path, folder: Path, real_parents: list[str]) -> Iterator[Path]:
    """The files below `root / folder`, relative to `root`; `real_parents` stops links that lead in a circle."""
    for entry in sorted(os.scandir(root / folder), key=lambda entry: entry.name):
        if entry.name.startswith(HIDDEN_PREFIXES):
            continue
        path = folder / entry.name
        if entry.is_dir():
            real = os.path.realpath(entry.path)
            if real not in real_parents:
                yield from _files(root, path, [*real_parents, real])
        else:
            yield path
