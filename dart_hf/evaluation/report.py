"""The results of an evaluation as a table and as a plot."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MISSING = "–"


@dataclass(frozen=True)
class Column:
    """A metric in the table and in the plot.

    Args:
        key: Its name in the results of a budget.
        title: Its name in the table.
        format: Value -> text.
        colour: Of its line in the plot; None if it is not plotted.
    """

    key: str
    title: str
    format: Callable[[float], str] = "{:.2%}".format
    colour: str | None = None


# Task -> the columns of the table, besides tokens and speed.
COLUMNS = {
    "single_label_classification": (
        Column("top1", "top-1", colour="#d95f02"),
        Column("top5", "top-5", colour="#1b9e77"),
    ),
    "multi_label_classification": (
        Column("mean_average_precision", "mAP", colour="#d95f02"),
        Column("f1", "F1", colour="#1b9e77"),
    ),
    "regression": (
        Column("mean_absolute_error", "mean absolute error", "{:.4g}".format, colour="#d95f02"),
        Column("mean_squared_error", "mean squared error", "{:.4g}".format),
    ),
}
AXIS_LABELS = {
    "single_label_classification": "accuracy (%)",
    "multi_label_classification": "mAP and F1 (%)",
    "regression": "mean absolute error",
}


def table(results: dict[str, Any]) -> Iterator[str]:
    """The results of [`run_evaluation`] as lines of text."""
    data, rule = results["data"], results["score_normalization"]
    yield (
        f"{results['num_images']:,} images of {data['source']} ({data['split']}); {results['processor']}, "
        f"{results['dtype']}, batch {results['batch_size']}; "
        f"{f'score normalisation {rule!r}' if rule else 'equal regions'}"
    )
    if results["scorer_is_dead"]:
        yield "The scorer has no weights: these are results of regions that do not follow the image."
    if results["num_unreadable"]:
        yield f"{results['num_unreadable']:,} more could not be read and are left out."
    columns = (
        Column("num_patches", "tokens", str),
        *COLUMNS[results["problem_type"]],
        Column("images_per_second", "images/s", "{:.1f}".format),
    )
    yield "  ".join(f"{column.title:>8}" for column in columns)
    for budget in results["budgets"]:
        cells = (_cell(column, budget) for column in columns)
        yield "  ".join(f"{cell:>{max(8, len(column.title))}}" for column, cell in zip(columns, cells, strict=True))
    if any(budget["images_per_second"] is None for budget in results["budgets"]):
        yield f"No speed: there was no full batch of {results['batch_size']} images."


def _cell(column: Column, budget: dict[str, Any]) -> str:
    value = budget[column.key]
    return MISSING if value is None else column.format(value)


def draw_metrics(results: dict[str, Any]) -> "Figure":
    """Plot the metrics of [`run_evaluation`] over the number of tokens, with the speed at each."""
    from matplotlib.figure import Figure

    task = results["problem_type"]
    budgets = sorted(results["budgets"], key=lambda budget: budget["num_patches"])
    columns = [column for column in COLUMNS[task] if column.colour and budgets[0][column.key] is not None]
    scale = 1 if task == "regression" else 100
    tokens = [budget["num_patches"] for budget in budgets]
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    # The legend then has the order of the lines, the highest first.
    for column in reversed(columns):
        values = [scale * budget[column.key] for budget in budgets]
        axes.plot(tokens, values, marker="o", color=column.colour, label=column.title)
    for budget in budgets:
        place = {"xytext": (0, -14), "textcoords": "offset points", "ha": "center"}
        speed = _cell(Column("images_per_second", "", "{:.1f}".format), budget)
        point = (budget["num_patches"], scale * budget[columns[0].key])
        axes.annotate(f"{speed} images/s", point, fontsize=8, **place)
    axes.margins(0.15)
    axes.set_xticks(tokens)
    axes.set_xlabel("tokens")
    axes.set_ylabel(AXIS_LABELS[task])
    axes.set_title(
        f"{Path(results['model']).name}, {results['num_images']:,} images of {Path(results['data']['source']).name}"
    )
    axes.legend()
    return figure
