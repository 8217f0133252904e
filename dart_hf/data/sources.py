"""Sources: a folder, a file or a data set on the Hub -> its splits."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import datasets
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import HTTPError

from dart_hf.data.folders import SPLIT_NAMES, folder_contents, load_folder, load_metadata_folder
from dart_hf.hub_errors import hub_reason

Split = datasets.Dataset | datasets.IterableDataset

# The end of a file's name -> the name of the builder of `datasets` that reads it.
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
# `datasets.load_from_disk` reads a folder that has one of these files.
SAVED_DATA_SET = ("dataset_dict.json", "state.json")


def load_splits(source: str | os.PathLike, subset: str | None = None, streaming: bool = False) -> Mapping[str, Split]:
    """The splits of a source by their names.

    Args:
        source: An image folder (see [`load_folder`]), one with a metadata file or other files that `datasets`
            recognises, a folder that `save_to_disk` wrote, a file, or a data set's id on the Hub. A folder comes before
            a data set or a builder of `datasets` of the same name.
        subset: The configuration of the data set, if it has several.
        streaming: Read rows only as they are needed. It makes no difference for image folders and saved data
            sets, whose rows are read as they are needed anyway.

    Raises:
        OSError: The source does not exist or could not be downloaded.
        ValueError: The source has no data that can be read.
    """
    name, path = os.fspath(source), Path(source)
    if path.is_file() and path.suffix not in BUILDERS:
        raise ValueError(
            f"data: {name!r} is a file of unknown kind; accepted are folders, ids on the Hub, and files "
            f"{', '.join(BUILDERS)}."
        )
    if not path.exists() and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise FileNotFoundError(f"data: there is no folder {name!r}.")
    try:
        if path.is_file():
            return datasets.load_dataset(BUILDERS[path.suffix], data_files=name, streaming=streaming)
        if path.is_dir():
            return _local_splits(path, subset, streaming)
        return datasets.load_dataset(name, subset, streaming=streaming)
    except (datasets.data_files.EmptyDatasetError, datasets.exceptions.DataFilesNotFoundError) as error:
        raise no_images(name) from error
    except (OSError, HTTPError) as error:
        if path.exists():
            raise
        # datasets does not keep the Hub's answer in this error.
        advice = "; 'hf auth login' opens those that you may read" if isinstance(error, DatasetNotFoundError) else ""
        raise OSError(
            f"data: there is no folder {name!r}, and the Hub did not give such a data set: {hub_reason(error)}{advice}."
        ) from error
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if str(error).startswith("data: "):
            raise
        raise ValueError(f"data: {name!r} could not be read: {hub_reason(error.__cause__ or error)}.") from error


def _local_splits(path: Path, subset: str | None, streaming: bool) -> Mapping[str, Split]:
    if any((path / file).is_file() for file in SAVED_DATA_SET):
        saved = datasets.load_from_disk(os.fspath(path))
        return saved if isinstance(saved, dict) else {"train": saved}
    contents = folder_contents(path) if subset is None else None
    if contents is not None and contents.has_metadata:
        return load_metadata_folder(contents)
    if contents is not None and contents.images:
        return load_folder(contents)
    # An absolute path cannot be mistaken for the name of a builder.
    return datasets.load_dataset(os.path.abspath(path), subset, streaming=streaming)


def no_images(name: str) -> ValueError:
    """The error for a folder without images."""
    return ValueError(
        f"data: the folder {name!r} has no images; expected are {name}/CLASS/IMAGE or {name}/train/CLASS/IMAGE."
    )


def select_split(splits: Mapping[str, Split], name: str, source: str | os.PathLike) -> Split:
    """A split by its name or its folder's (`Testing`), or a part of one in `datasets`' slice notation.

    Raises:
        ValueError: There is no such split or part.
    """
    base, _, part = name.partition("[")
    key = base if base in splits else SPLIT_NAMES.get(base.casefold())
    if key not in splits:
        raise ValueError(f"data: {str(source)!r} has no split {base!r}; it has {quoted(splits)}.")
    split = splits[key]
    if not part:
        return split
    if isinstance(split, datasets.IterableDataset):
        raise ValueError(f"data: a stream has no parts, got {name!r}; give {base!r}.")
    try:
        instruction = datasets.ReadInstruction.from_spec(f"{key}[{part}").to_absolute({key: len(split)})[0]
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"data: {name!r} is not a part of a split; a valid one is '{base}[:1000]': {error}."
        ) from error
    return split.select(range(instruction.from_ or 0, len(split) if instruction.to is None else instruction.to))


def quoted(names: Iterable[str]) -> str:
    """Names for a message: 'a', 'b'."""
    return ", ".join(map(repr, names))
