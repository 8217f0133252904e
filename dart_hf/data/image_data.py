"""Image data: the images to learn from and to evaluate with, their labels and their classes."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import datasets

from dart_hf.data.columns import image_and_label
from dart_hf.data.label_encoding import check_classes, encode_labels, label_encoding
from dart_hf.data.sources import Split, load_splits, quoted, select_split

EVALUATION_SPLITS = ("validation", "valid", "val", "dev", "test")


@dataclass(frozen=True)
class ImageData:
    """Images to learn from and to evaluate with.

    Args:
        train, evaluation: Columns `image` (undecoded) and, if labels were asked for or are clear, `label` (by
            `problem_type`); None if there is no such split.
        label_names: The classes.
        evaluation_split: The name of `evaluation` in the source; None if it was held out of `train`.
        problem_type: transformers' name of the task: "single_label_classification" (`label` is an index into
            `label_names`), "multi_label_classification" (a list of indices) or "regression" (a number or a list of
            numbers; `label_names` are transformers' placeholders).
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
    """Load labelled images from a folder, a file or the Hub.

    Args:
        source: A folder ROOT/CLASS/…/IMAGE or ROOT/SPLIT/CLASS/…/IMAGE, see [`load_folder`]; a folder with a metadata
            file, with parquet or with other files that `datasets` recognises; one that `save_to_disk` wrote; a
            `.parquet`, `.arrow` or `.tar` (webdataset) file; or a data set's id on the Hub.
        subset: The data set's configuration, if it has several.
        train_split: Split to learn from, also in `datasets`' slice notation (`train[:1000]`); None for none.
        evaluation_split: Split to evaluate with. By default the first of "validation", "valid", "val", "dev", "test"
            that there is.
        image_column, label_column: Column names. By default the only column of images, and of class labels.
        class_names: The classes in the order of their numbers, if the data set does not tell them.
        held_out: Share of the training images to evaluate with if there is no split for that; not for streams.
        streaming: Read rows as they are needed instead of first downloading everything.
        needs_labels: Refuse images without labels.

    Raises:
        OSError: The source does not exist or could not be downloaded.
        ValueError: It has no images, no such split or column, labels that are none, or fewer than two classes.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must be at least 0 and below 1, got {held_out}.")
    splits = load_splits(source, subset, streaming)
    if evaluation_split is None:
        learned = (train_split or "").partition("[")[0]
        evaluation_split = next((name for name in EVALUATION_SPLITS if name in splits and name != learned), None)
    names = [train_split, evaluation_split]
    if not any(names):
        raise ValueError(
            f"data: {str(source)!r} has none of the splits {quoted(EVALUATION_SPLITS)} to evaluate with; it has "
            f"{quoted(splits)}: name one (--split), or take the images that the training held out (--held-out)."
        )
    train, evaluation = (
        None
        if name is None
        else image_and_label(select_split(splits, name, source), image_column, label_column, source, needs_labels)
        for name in names
    )
    present = [split for split in (train, evaluation) if split is not None]
    problem_type, label_names = "single_label_classification", []
    if all("label" in (split.column_names or ()) for split in present):
        encoding = label_encoding(present, class_names, source)
        problem_type, label_names = encoding.problem_type, encoding.names
        train, evaluation = (None if split is None else encode_labels(split, encoding) for split in (train, evaluation))
        if needs_labels:
            check_classes(train, evaluation, encoding, source, evaluation_split)
    if needs_labels and problem_type != "regression" and len(label_names) < 2:
        raise ValueError(
            f"data: {str(source)!r} has one class, {label_names[0]!r}; a classifier needs at least two."
            if label_names
            else f"data: {str(source)!r} has no classes."
        )
    if evaluation is None and held_out and isinstance(train, datasets.Dataset):
        parts = train.train_test_split(test_size=held_out, seed=0)
        train, evaluation = parts["train"], parts["test"]
    if streaming:
        train, evaluation = (
            split.to_iterable_dataset() if isinstance(split, datasets.Dataset) else split
            for split in (train, evaluation)
        )
    return ImageData(train, evaluation, label_names, evaluation_split, problem_type)
