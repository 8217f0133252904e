"""Columns: which column of a data set holds the images, and which the labels."""

import os
from pathlib import Path
from typing import Any

import datasets

from dart_hf.data.sources import Split, no_images, quoted

LABEL_COLUMNS = ("label", "labels")
IMAGE_COLUMNS = ("image", "img", "images")
# A stream that does not tell its features tells them with this many rows.
FEATURE_ROWS = 5


def image_and_label(
    split: Split,
    image_column: str | None,
    label_column: str | None,
    source: str | os.PathLike,
    needs_labels: bool = True,
) -> Split:
    """The columns `image`, undecoded, and `label` of a split. Without needs_labels, `label` only if it is clear.

    Args:
        split: The rows.
        image_column, label_column: The names of the columns; without them the only column that can be meant.
        source: The name of the data for messages.
        needs_labels: Refuse missing labels.

    Raises:
        ValueError: There is no such column, or several are possible.
    """
    features = features_of(split)
    if image_column is None and not _image_columns(features) and Path(source).is_dir():
        raise no_images(str(source))
    images = _only_column("image", image_column, _image_columns(features), features, source)
    labels = _only_label_column(label_column, images, features, source, needs_labels)
    if not split.features:
        split = split.cast(features)
    # First, because a stream would decode the images in every later step.
    split = split.cast_column(images, datasets.Image(decode=False))
    columns = {"image": images} if labels is None else {"image": images, "label": labels}
    split = split.select_columns(list(columns.values()))
    return split.rename_columns({column: role for role, column in columns.items() if column != role})


def features_of(split: Split) -> datasets.Features:
    """The types of a split's columns. If a stream does not tell them, they are those of its first rows."""
    if split.features:
        return split.features
    return datasets.Dataset.from_list(list(split.take(FEATURE_ROWS))).features


def element_type(feature: Any) -> Any:
    """The type of the elements of a column of lists; None for another column."""
    return getattr(feature, "feature", None)


def _image_columns(features: datasets.Features) -> list[str]:
    """The columns of images. pandas and Polars write images as plain bytes, so then the name decides."""
    typed = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    return typed or [name for name in IMAGE_COLUMNS if _holds_bytes(features.get(name))]


def _holds_bytes(feature: Any) -> bool:
    if isinstance(feature, dict):
        feature = feature.get("bytes")
    return isinstance(feature, datasets.Value) and "binary" in feature.dtype


def _only_label_column(
    given: str | None, images: str, features: datasets.Features, source: str | os.PathLike, needs_labels: bool
) -> str | None:
    candidates = [
        name
        for name, feature in features.items()
        if isinstance(feature, datasets.ClassLabel) or isinstance(element_type(feature), datasets.ClassLabel)
    ] or [name for name in LABEL_COLUMNS if name in features]
    if given is None and not needs_labels and len(candidates) != 1:
        return None
    if given is None and not candidates and list(features) == [images]:
        raise ValueError(
            f"data: the images of {str(source)!r} have no labels: expected are at least two classes, one folder for "
            "each, or a column of labels."
        )
    return _only_column("label", given, candidates, features, source)


def _only_column(
    role: str, given: str | None, candidates: list[str], features: datasets.Features, source: str | os.PathLike
) -> str:
    """The given column, or the only candidate."""
    if given is not None and given not in features:
        raise ValueError(f"{role}_column: {str(source)!r} has no column {given!r}; it has {quoted(features)}.")
    if given is None and len(candidates) != 1:
        found = f"several columns could hold it ({quoted(candidates)})" if candidates else "none is recognised"
        raise ValueError(
            f"{role}_column: say which column of {str(source)!r} holds the {role}: {found}; it has {quoted(features)}."
        )
    return given or candidates[0]
