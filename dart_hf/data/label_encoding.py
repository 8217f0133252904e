"""Label encoding: a column of labels -> the task that they stand for, the names of the classes, and class numbers."""

import ast
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from transformers.utils import logging

from dart_hf.data.columns import element_type, features_of
from dart_hf.data.labels import placeholders
from dart_hf.data.sources import Split, quoted

logger = logging.get_logger(__name__)

BATCH = 10_000
MOST_NAMED = 5


@dataclass(frozen=True)
class LabelEncoding:
    """The meaning of the labels of a data set.

    Args:
        problem_type: transformers' name of the task, see [`ImageData`].
        names: The classes; in a regression transformers' placeholders.
        numbers: What a label in the column is -> its class number; None if the column has class numbers or values.
        lists_as_text: The lists of a multi-label column are text, as in a CSV file.
    """

    problem_type: str
    names: list[str]
    numbers: dict[Any, int] | None = None
    lists_as_text: bool = False


def label_encoding(
    splits: Sequence[Split], class_names: Sequence[str] | None, source: str | os.PathLike
) -> LabelEncoding:
    """Find out what the column `label` holds.

    One text or integer for each image is its class; a list of them is the set of its classes (multi-label); a floating
    point number, or a list of them, is what a regression learns. Text can be a list too, as in a CSV file:
    `["cat", "dog"]`. The classes are the values that occur in any of the splits, sorted.

    Args:
        splits: Splits with a column `label`.
        class_names: The classes in the order of their numbers, if the data does not tell them.
        source: The name of the data for messages.

    Raises:
        ValueError: The labels are of another type; some are missing or negative; the splits have different classes; or
            a stream does not tell its classes.
    """
    feature = features_of(splits[0])["label"]
    element = element_type(feature)
    several = element is not None
    scalar = element if several else feature
    classes = "multi_label_classification" if several else "single_label_classification"
    if isinstance(scalar, datasets.ClassLabel):
        return LabelEncoding(classes, _shared_names(splits, several, class_names, source))
    kind = scalar.dtype if isinstance(scalar, datasets.Value) else None
    if kind is None or not kind.startswith(("string", "large_string", "int", "uint", "bool", "float")):
        raise ValueError(
            f"label_column: the labels of {str(source)!r} are of type {feature}; accepted are text, integers, floating "
            "point numbers, and lists of them."
        )
    if kind.startswith("float"):
        return LabelEncoding("regression", _regression_names(splits, several, class_names, source))
    if class_names is None and isinstance(splits[0], datasets.IterableDataset):
        raise ValueError(
            f"class_names: the stream {str(source)!r} does not tell its classes; give their names in the order of "
            "their numbers."
        )
    text = "string" in kind
    values = set() if isinstance(splits[0], datasets.IterableDataset) else _distinct(splits, several, source)
    if text and not several and values and all(_list_in_text(value) is not None for value in values):
        values = {each for value in values for each in _list_in_text(value)}
        classes, lists_as_text = "multi_label_classification", True
    else:
        lists_as_text = False
    if not text and not isinstance(next(iter(values), False), bool) and min(values, default=0) < 0:
        raise ValueError(
            f"label_column: the labels of {str(source)!r} include {min(values)}, which cannot be a class; leave out "
            "the images without labels."
        )
    if class_names is not None and not text:
        return LabelEncoding(classes, list(class_names), {False: 0, True: 1} if kind.startswith("bool") else None)
    if class_names is not None and (unknown := sorted(values - set(class_names))):
        raise ValueError(
            f"class_names: the labels of {str(source)!r} include {quoted(unknown[:MOST_NAMED])}, not among the classes "
            f"{quoted(class_names)}."
        )
    names = list(class_names) if class_names is not None else [str(value) for value in sorted(values)]
    numbers = dict(zip(names if class_names is not None else sorted(values), range(len(names)), strict=True))
    return LabelEncoding(classes, names, numbers, lists_as_text)


def encode_labels(split: Split, encoding: LabelEncoding) -> Split:
    """The split with class numbers in its column `label`. A label of no class stays as it is."""
    numbers = encoding.numbers
    if numbers is None:
        return split

    def number(label: Any) -> Any:
        if encoding.lists_as_text:
            label = _list_in_text(label)
        if isinstance(label, list):
            return [numbers.get(each, each) for each in label]
        return numbers.get(label, label)

    if isinstance(split, datasets.IterableDataset):
        return split.map(lambda row: {"label": number(row["label"])}, remove_columns=["label"])
    labels = [number(label) for label in _labels(split)]
    # Not `map`, which would write the images of a parquet file to the disk once more.
    return split.remove_columns("label").add_column("label", labels)


def check_classes(
    train: Split | None,
    evaluation: Split | None,
    encoding: LabelEncoding,
    source: str | os.PathLike,
    evaluation_split: str | None,
) -> None:
    """Find labels of no class before hours of training, and warn of classes that only the evaluation has.

    Args:
        train, evaluation: The splits, encoded.
        encoding: Their labels.
        source, evaluation_split: The names of the data and of `evaluation`, for messages.

    Raises:
        ValueError: A label is none of the classes, such as the -1 of test images without labels.
    """
    if encoding.problem_type == "regression":
        return
    present = {}
    for role, name, split in (("train", "train", train), ("evaluation", evaluation_split, evaluation)):
        if not isinstance(split, datasets.Dataset):
            continue
        present[role] = _distinct([split], encoding.problem_type == "multi_label_classification", source)
        wrong = [label for label in present[role] if label not in range(len(encoding.names))]
        if wrong:
            raise ValueError(
                f"data: the split {name!r} of {str(source)!r} has label {wrong[0]!r}, not one of its "
                f"{len(encoding.names)} classes."
            )
    if len(present) == 2 and (unlearned := sorted(present["evaluation"] - present["train"])):
        named = quoted(encoding.names[number] for number in unlearned[:MOST_NAMED])
        more = ", …" if len(unlearned) > MOST_NAMED else ""
        logger.warning(
            f"data: only the evaluation images of {str(source)!r} have the class{'es' if len(unlearned) > 1 else ''} "
            f"{named}{more}; a model does not learn what is not among the training images."
        )


def _shared_names(
    splits: Sequence[Split], several: bool, given: Sequence[str] | None, source: str | os.PathLike
) -> list[str]:
    """The names of class labels, which must be the same in all splits and those that were given."""
    expected, *others = (
        (element_type(feature) if several else feature).names
        for feature in (features_of(split)["label"] for split in splits)
    )
    for other in [*others, *([list(given)] if given is not None else [])]:
        if other != expected:
            differing = sorted(set(other) ^ set(expected))
            only = f" (not in both: {quoted(differing[:MOST_NAMED])})" if differing else ""
            raise ValueError(
                f"data: the classes of {str(source)!r} are {quoted(expected)}, in this order, for all splits; got "
                f"{quoted(other)}{only}."
            )
    return list(expected)


def _regression_names(
    splits: Sequence[Split], several: bool, given: Sequence[str] | None, source: str | os.PathLike
) -> list[str]:
    """transformers' placeholders, or the given names, for the values of a regression."""
    sizes = set()
    for split in splits:
        if isinstance(split, datasets.IterableDataset):
            split = datasets.Dataset.from_list(list(split.take(1)))
        for label in _labels(split):
            values = label if several and label is not None else [label]
            if any(value is None or value != value for value in values):
                raise ValueError(f"label_column: an image of {str(source)!r} has no label; leave such images out.")
            sizes.add(len(values))
    if len(sizes) != 1 or sizes == {0}:
        raise ValueError(
            f"label_column: the labels of {str(source)!r} must be equally many numbers for each image, got "
            f"{', '.join(map(str, sorted(sizes)))}."
        )
    (size,) = sizes
    if given is not None and len(given) != size:
        raise ValueError(f"class_names: {str(source)!r} has {size} numbers for each image, got {len(given)} names.")
    return list(given) if given is not None else placeholders(size)


def _distinct(splits: Sequence[datasets.Dataset], several: bool, source: str | os.PathLike) -> set[Any]:
    """The classes that occur in the column `label` of splits."""
    if not several:
        values = {value for split in splits for value in split.unique("label")}
        if None in values:
            raise ValueError(f"label_column: an image of {str(source)!r} has no label; leave such images out.")
        return values
    values = set()
    for label in (label for split in splits for label in _labels(split)):
        if label is None or None in label:
            raise ValueError(f"label_column: an image of {str(source)!r} has no label; leave such images out.")
        if len(set(label)) < len(label):
            raise ValueError(
                f"label_column: an image of {str(source)!r} has the labels {label}, one of them twice; labels are the "
                "list of an image's classes, not zeros and ones."
            )
        values.update(label)
    return values


def _labels(split: datasets.Dataset) -> Iterator[Any]:
    for batch in split.select_columns("label").iter(BATCH):
        yield from batch["label"]


def _list_in_text(text: str) -> list[Any] | None:
    """The list that a text is, in JSON's or Python's notation; None if it is none."""
    if not text.lstrip().startswith("["):
        return None
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return None
    valid = isinstance(value, list) and all(isinstance(each, (str, int)) for each in value)
    return value if valid else None
