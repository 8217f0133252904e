"""Class table: how many images each class has in each split, as text."""

from collections import Counter
from collections.abc import Iterator

import datasets

from dart_hf.data.image_data import ImageData
from dart_hf.data.sources import Split

MOST_CLASSES = 20


def class_table(data: ImageData) -> Iterator[str]:
    """Lines that show the number of images of each class in each split; of a regression, the range of the values.

    With more than twenty classes the table has those with the fewest training images. Streams are not counted.
    """
    splits = {"train": data.train, data.evaluation_split or "held out": data.evaluation}
    counted = {name: split for name, split in splits.items() if isinstance(split, datasets.Dataset)}
    if not counted or not data.label_names:
        return
    if data.problem_type == "regression":
        yield from _value_ranges(counted)
        return
    counts = {name: _class_counts(split) for name, split in counted.items()}
    numbers = sorted(range(len(data.label_names)), key=lambda number: next(iter(counts.values()))[number])
    shown = sorted(numbers[:MOST_CLASSES])
    rows = [(data.label_names[number], *(f"{count[number]:,}" for count in counts.values())) for number in shown]
    rows.append(("images", *(f"{len(split):,}" for split in counted.values())))
    yield from _aligned([("class", *counted), *rows])
    if len(numbers) > len(shown):
        yield f"{len(numbers) - len(shown):,} classes with more images are not shown."


def _class_counts(split: Split) -> Counter[int]:
    counts: Counter[int] = Counter()
    for label in split["label"][:]:
        counts.update(label if isinstance(label, list) else [label])
    return counts


def _value_ranges(splits: dict[str, Split]) -> Iterator[str]:
    rows = []
    for name, split in splits.items():
        values = [value for label in split["label"][:] for value in (label if isinstance(label, list) else [label])]
        rows.append((name, f"{len(split):,}", f"{min(values):g}", f"{max(values):g}"))
    yield from _aligned([("split", "images", "smallest", "largest"), *rows])


def _aligned(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        yield "  ".join([first.ljust(widths[0]), *cells])
