"""Sources: a folder, a file or a data set on the Hub -> rows of an undecoded image and a label."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import HTTPError
from transformers.utils import logging

from dart_hf.hub_errors import hub_reason

logger = logging.get_logger(__name__)

Split = datasets.Dataset | datasets.IterableDataset

EVALUATION_SPLITS = ("validation", "valid", "val", "dev", "test")
LABEL_COLUMNS = ("label", "labels")
# datasets' builders for files by the end of their names; folders and Hub ids tell it themselves.
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}


@dataclass(frozen=True)
class ImageData:
    """Images to learn from and to evaluate with.

    Args:
        train, evaluation: Columns `image` (undecoded) and, unless they were not asked for, `label` (an index into
            `label_names`); None where there is no such split.
        label_names: The classes.
        evaluation_split: What `evaluation` is called in the source; None where it was held out of `train`.
        problem_type: transformers' name of the task: "single_label_classification", "multi_label_classification"
            (`label` is a list of indices) or "regression" (`label` is a number or a list of numbers; `label_names` are
            transformers' placeholders).
    """

    train: Split | None
    evaluation: Split | None
    label_names: list[str]
    evaluation_split: str | None
    problem_type: str = "single_label_classification"


def load_image_data(
    source: str | os.PathLike,
    subset: str | None = None,
    train_split: str | None = "train",
    evaluation_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    class_names: Sequence[str] | None = None,
    held_out: float = 0.0,
    streaming: bool = False,
    needs_labels: bool = True,
) -> ImageData:
    """Load labelled images from anything that `datasets` reads.

    Args:
        source: A folder of images in one folder per class (`datasets`' imagefolder, with or without `train`,
            `validation`, `test` above them), a folder of parquet or other files that `datasets` recognises, one that
            `save_to_disk` wrote, a `.parquet`, `.arrow` or `.tar` (webdataset) file, or a data set's id on the
            Hub.
        subset: The data set's configuration, where it has several.
        train_split: Split to learn from, also in `datasets`' slice notation (`train[:1000]`); None for none.
        evaluation_split: Split to evaluate with; without it the first there is of "validation", "valid", "val", "dev",
            "test".
        image_column, label_column: Column names; without them the only column of images, and of class labels.
        class_names: The classes in the order of their numbers, where the data set does not know them.
        held_out: Share of the training images to evaluate with where there is no split for that; not for streams.
        streaming: Whether to read rows as they are needed instead of first downloading everything.
        needs_labels: Whether images without labels are refused.

    Raises:
        OSError: The source does not exist or could not be had.
        ValueError: It has no images, no such split or column, or fewer than two classes.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must be at least 0 and below 1, got {held_out}.")
    splits = _splits(source, subset, streaming)
    if evaluation_split is None:
        learned = (train_split or "").partition("[")[0]
        evaluation_split = next((name for name in EVALUATION_SPLITS if name in splits and name != learned), None)
    train, evaluation = (
        None if name is None else _select_split(splits, name, source) for name in (train_split, evaluation_split)
    )
    if train is None and evaluation is None:
        raise ValueError(
            f"data: {str(source)!r} has none of the splits {', '.join(map(repr, EVALUATION_SPLITS))} to evaluate with; "
            f"it has {_named(splits)}: name one (--split), or take what train held out (--held-out 0.1)."
        )
    present = [split for split in (train, evaluation) if split is not None]
    columns = _columns(present[0], image_column, label_column, source, needs_labels)
    label_names = _label_names(present, columns["label"], class_names, source) if "label" in columns else []
    if needs_labels and len(label_names) < 2:
        raise ValueError(
            f"data: {str(source)!r} has one class, {label_names[0]!r}; a classifier needs at least two."
            if label_names
            else f"data: {str(source)!r} has no classes."
        )
    train, evaluation = (
        None if split is None else _prepared(split, columns, label_names) for split in (train, evaluation)
    )
    for split, name in ((train, train_split), (evaluation, evaluation_split)):
        if needs_labels and isinstance(split, datasets.Dataset):
            _check_labels(split, label_names, name, source)
    if evaluation is None and held_out and not streaming:
        parts = train.train_test_split(test_size=held_out, seed=0)
        train, evaluation = parts["train"], parts["test"]
    return ImageData(train, evaluation, label_names, evaluation_split)


def _splits(source: str | os.PathLike, subset: str | None, streaming: bool) -> Mapping[str, Split]:
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
        if path.is_dir() and any((path / mark).is_file() for mark in ("dataset_dict.json", "state.json")):
            saved = datasets.load_from_disk(name)
            saved = saved if isinstance(saved, dict) else {"train": saved}
            return {key: split.to_iterable_dataset() for key, split in saved.items()} if streaming else saved
        return datasets.load_dataset(name, subset, streaming=streaming)
    except (datasets.data_files.EmptyDatasetError, datasets.exceptions.DataFilesNotFoundError) as error:
        raise _no_images(name) from error
    except (OSError, HTTPError) as error:
        if path.exists():
            raise
        # Of what the Hub said, datasets keeps nothing in this case.
        advice = "; 'hf auth login' opens those that you may read" if isinstance(error, DatasetNotFoundError) else ""
        raise OSError(
            f"data: there is no folder {name!r}, and no such data set could be had from the Hub: {hub_reason(error)}"
            f"{advice}."
        ) from error
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"data: {name!r} could not be read: {hub_reason(error.__cause__ or error)}.") from error


def _no_images(name: str) -> ValueError:
    return ValueError(
        f"data: the folder {name!r} has no images; expected are {name}/CLASS/IMAGE or {name}/train/CLASS/IMAGE."
    )


def _select_split(splits: Mapping[str, Split], name: str, source: str | os.PathLike) -> Split:
    """A split by its name, or a part of one in `datasets`' slice notation."""
    base, _, part = name.partition("[")
    if base not in splits:
        raise ValueError(f"data: {str(source)!r} has no split {base!r}; it has {_named(splits)}.")
    split = splits[base]
    if not part:
        return split
    if isinstance(split, datasets.IterableDataset):
        raise ValueError(f"data: a stream has no parts, got {name!r}; give {base!r}.")
    try:
        instruction = datasets.ReadInstruction.from_spec(name).to_absolute({base: len(split)})[0]
    except (ValueError, AssertionError) as error:
        raise ValueError(f"data: {name!r} is no part of a split such as '{base}[:1000]': {error}.") from error
    return split.select(range(instruction.from_ or 0, len(split) if instruction.to is None else instruction.to))


def _columns(
    split: Split,
    image_column: str | None,
    label_column: str | None,
    source: str | os.PathLike,
    needs_labels: bool,
) -> dict[str, str]:
    """`image` and `label` -> the columns that hold them."""
    features = split.features or split._resolve_features().features

    def of_kind(kind: type) -> list[str]:
        return [name for name, feature in features.items() if isinstance(feature, kind)]

    def the_one(role: str, given: str | None, candidates: list[str]) -> str:
        if given is not None and given not in features:
            raise ValueError(f"{role}_column: {str(source)!r} has no column {given!r}; it has {_named(features)}.")
        if given is None and len(candidates) != 1:
            found = f"several columns could hold it ({_named(candidates)})" if candidates else "no column holds it"
            raise ValueError(
                f"{role}_column: say which column of {str(source)!r} holds the {role}: {found}; it has "
                f"{_named(features)}."
            )
        return given or candidates[0]

    if image_column is None and not of_kind(datasets.Image) and Path(source).is_dir():
        raise _no_images(str(source))
    images = the_one("image", image_column, of_kind(datasets.Image))
    candidates = of_kind(datasets.ClassLabel) or [name for name in LABEL_COLUMNS if name in features]
    if label_column is None and not candidates:
        if not needs_labels:
            return {"image": images}
        if list(features) == [images]:
            raise ValueError(
                f"data: the images of {str(source)!r} have no labels or one class: expected are at least two classes, "
                "one folder for each."
            )
    if not needs_labels and label_column is None and len(candidates) != 1:
        return {"image": images}
    return {"image": images, "label": the_one("label", label_column, candidates)}


def _label_names(splits: list[Split], column: str, given: Sequence[str] | None, source: str | os.PathLike) -> list[str]:
    feature = (splits[0].features or splits[0]._resolve_features().features)[column]
    if isinstance(feature, datasets.ClassLabel):
        for split in splits:
            other = (split.features or split._resolve_features().features)[column].names
            if other != (feature.names if given is None else list(given)):
                raise ValueError(
                    f"data: the classes of {str(source)!r} are {_named(feature.names)}, in this order, for all splits; "
                    f"got {_named(other if given is None else given)}."
                )
        return list(feature.names)
    if given is not None:
        return list(given)
    if isinstance(splits[0], datasets.IterableDataset):
        raise ValueError(
            f"class_names: the stream {str(source)!r} does not tell its classes; give their names in the order of "
            "their numbers."
        )
    values = sorted({value for split in splits for value in split.unique(column)})
    if all(isinstance(value, str) for value in values):
        return values
    if len(values) == 1:
        return [str(values[0])]
    if all(isinstance(value, Integral) and value >= 0 for value in values):
        return [str(index) for index in range(max(values) + 1)]
    raise ValueError(f"label_column: the labels in column {column!r} are neither names nor numbers from 0 on.")


def _prepared(split: Split, columns: Mapping[str, str], label_names: list[str]) -> Split:
    """The columns `image` and `label` alone, the image undecoded and the label a number."""
    # First, because a stream would decode what later steps see.
    split = split.cast_column(columns["image"], datasets.Image(decode=False))
    split = split.select_columns(list(columns.values()))
    split = split.rename_columns({column: role for role, column in columns.items() if column != role})
    features = split.features or split._resolve_features().features
    if "label" not in columns or isinstance(features["label"], datasets.ClassLabel):
        return split
    if features["label"].dtype == "string":
        numbers = {name: number for number, name in enumerate(label_names)}
        return split.map(lambda row: {"label": numbers.get(row["label"], row["label"])}, remove_columns=["label"])
    return split


def _check_labels(split: datasets.Dataset, label_names: list[str], name: str, source: str | os.PathLike) -> None:
    """Find a label of no class, such as the -1 of test images without labels, before hours of training."""
    wrong = [label for label in split.unique("label") if label not in range(len(label_names))]
    if wrong:
        raise ValueError(
            f"data: the split {name!r} of {str(source)!r} has label {wrong[0]!r}, which is none of its "
            f"{len(label_names)} classes."
        )


def _named(names: Mapping[str, Any] | Sequence[str]) -> str:
    return ", ".join(map(repr, names))
