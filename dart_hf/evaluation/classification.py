"""Accuracy and speed of a classifier at several token budgets, in one pass over a data set."""

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from transformers import BaseImageProcessor, PreTrainedModel

from dart_hf.data.batches import evenly_spread, image_batches
from dart_hf.data.collator import IGNORED_LABEL, ImageClassificationCollator
from dart_hf.data.labels import class_names, match_labels
from dart_hf.data.sources import load_image_data
from dart_hf.environment import command_line, machine
from dart_hf.evaluation.metrics import TOP, Accuracy, TopKAccuracy, likeliest_classes
from dart_hf.files import absolute_source, atomic_write, weights_sha256
from dart_hf.hub.loading import load_model
from dart_hf.visualization import checked_picture_path, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCORE_NORMALIZATIONS = ("running", "image", "batch")
# Rules of a model in whose place "image" stands unless the user asks for them, and why.
REPLACED_RULES = {
    "batch": "Score normalisation 'image' in place of the model's own, 'batch', under which answers depend on the "
    "other images of a batch. It computes what 'batch' does when images come one at a time.",
    "running": "Score normalisation 'image' in place of 'running': the model has no running statistics yet.",
}


@dataclass(frozen=True)
class BudgetResult:
    """What a model does with a number of tokens.

    Args:
        num_patches: The number.
        top1: Share of images whose class is the model's first answer, 0 to 1.
        top5: Share of images whose class is among the first five; None of a model with five classes or fewer.
        images_per_second: Of the model's forward alone, see [`evaluate_classifier`]; None where no batch was full.
    """

    num_patches: int
    top1: float
    top5: float | None
    images_per_second: float | None


@dataclass(frozen=True)
class Evaluation:
    """The results of [`evaluate_classifier`].

    Args:
        num_images: How many images were classified.
        num_unreadable: How many could not be read and were left out.
        score_normalization: The rule that the scores were standardised by; None of a model that has equal regions
            whatever their scores.
        scorer_is_dead: Whether the scores are those of a scorer that never got weights.
        device, dtype: Where the model ran, and the type of its weights.
        batch_size: Images at a time.
        budgets: By number of tokens.
    """

    num_images: int
    num_unreadable: int
    score_normalization: str | None
    scorer_is_dead: bool
    device: str
    dtype: str
    batch_size: int
    budgets: list[BudgetResult]


@dataclass
class _Tally:
    """What is known of a budget during the pass."""

    accuracy: Accuracy = field(default_factory=Accuracy)
    top5_accuracy: TopKAccuracy = field(default_factory=TopKAccuracy)
    # Images and seconds of each batch.
    calls: list[tuple[int, float]] = field(default_factory=list)

    def add(self, logits: torch.Tensor, labels: torch.Tensor, seconds: float) -> None:
        classes = likeliest_classes(logits.float().cpu().numpy(), TOP)
        self.accuracy.add_batch(predictions=classes[:, 0], references=labels.numpy())
        if logits.shape[1] > TOP:
            self.top5_accuracy.add_batch(predictions=classes, references=labels.numpy())
        self.calls.append((len(labels), seconds))

    def result(self, num_patches: int, num_labels: int, batch_size: int) -> BudgetResult:
        top1 = self.accuracy.compute()["accuracy"]
        top5 = self.top5_accuracy.compute()[f"top{TOP}_accuracy"] if num_labels > TOP else None
        # A smaller batch at the end, or one without its unreadable images, says little about speed.
        full = [seconds for images, seconds in self.calls if images == batch_size]
        return BudgetResult(num_patches, top1, top5, batch_size * len(full) / sum(full) if full else None)


def evaluate_classifier(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    data: datasets.Dataset,
    label_names: Sequence[str],
    budgets: Sequence[int] = (),
    batch_size: int = 32,
    score_normalization: str | None = None,
    skip_unreadable: bool = False,
    workers: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Classify a data set at every budget. Each batch is read once; the budgets take turns in who has it first.

    The speed is that of the model's forward over full batches that lie on its device, the device waited for before and
    after; reading, preparing and moving images is not in it. Every budget has one untimed call first. On a CPU,
    `workers` take the model's time: leave them at 0 where the speed matters.

    Args:
        model: A DART classifier; it is put in evaluation mode. Its answers are among all its classes, also where the
            data has only some of them.
        image_processor: Prepares the images.
        data: Columns `image` and `label`, an index into `label_names`.
        label_names: The data's classes; see [`match_labels`] for how they become the model's.
        budgets: Numbers of tokens; the model's own without any.
        batch_size: Images at a time.
        score_normalization: Rule for standardising scores: `"running"`, `"image"`, or `"batch"`, under which accuracy
            depends on the batch size and the order of the images. Without it the model's own. In place of `"batch"`
            that is `"image"`, which computes what `"batch"` gives when images come one at a time, as
            [`predict`] has them come; and so it is in place of `"running"` before there are any statistics. Not for a
            model with `partition="uniform"`, which does not look at its scores.
        skip_unreadable: Whether to leave out images that cannot be read, instead of raising.
        workers: Processes that read images besides this one.
        progress: Whether to show a progress bar on a terminal.

    Raises:
        ValueError: An argument is out of range, the labels do not match the model's, or there is no image, or none
            that can be read.
        OSError: An image cannot be read.
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("workers", workers, 0),
        *(("num_patches", budget, 1) for budget in budgets),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
    if model.config.problem_type not in (None, "single_label_classification"):
        raise ValueError(f"Accuracy needs one class for each image; the model's task is {model.config.problem_type!r}.")
    if not len(data):
        raise ValueError("There is nothing to evaluate: the data has no images.")
    budgets = list(dict.fromkeys(budgets)) or [model.config.num_patches]
    rule = _rule_of_scores(model, score_normalization)
    try:
        classes = torch.tensor(match_labels(label_names, class_names(model)))
    except ValueError as error:
        raise ValueError(f"The labels of the data do not match the model's: {error}") from error
    collate = ImageClassificationCollator(image_processor, len(label_names), skip_unreadable=skip_unreadable)

    model.eval()
    tallies = {budget: _Tally() for budget in budgets}
    num_unreadable = 0
    with _scores_standardized_by(model, rule), torch.inference_mode():
        for number, batch in enumerate(image_batches(data, collate, batch_size, workers, progress)):
            pixel_values, labels = batch["pixel_values"], batch["labels"]
            readable = labels != IGNORED_LABEL
            if not readable.all():
                num_unreadable += int((~readable).sum())
                pixel_values, labels = pixel_values[readable], labels[readable]
            if not len(labels):
                continue
            pixel_values = pixel_values.to(model.device)
            turn = number % len(budgets)
            for budget in (*budgets[turn:], *budgets[:turn]):
                if not tallies[budget].calls:
                    _try_budget(model, pixel_values, budget)
                logits, seconds = _timed_forward(model, pixel_values, budget)
                tallies[budget].add(logits, classes[labels], seconds)
    if num_unreadable == len(data):
        raise ValueError(f"There is nothing to evaluate: none of the {len(data)} images could be read.")
    return Evaluation(
        num_images=len(data) - num_unreadable,
        num_unreadable=num_unreadable,
        score_normalization=rule,
        scorer_is_dead=rule is not None and model.scorer.is_dead,
        device=model.device.type,
        dtype=str(model.dtype).removeprefix("torch."),
        batch_size=batch_size,
        budgets=[tallies[budget].result(budget, model.config.num_labels, batch_size) for budget in budgets],
    )


def _try_budget(model: PreTrainedModel, pixel_values: torch.Tensor, num_patches: int) -> None:
    """The untimed first call, in which it shows whether there is memory for so many tokens."""
    try:
        model(pixel_values, num_patches=num_patches)
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        raise ValueError(
            f"num_patches: {num_patches} tokens for each of {len(pixel_values)} images need more memory than there is; "
            "give fewer, or a smaller batch_size."
        ) from error


def _timed_forward(model: PreTrainedModel, pixel_values: torch.Tensor, num_patches: int) -> tuple[torch.Tensor, float]:
    """Logits, and the seconds that they took."""
    _wait_for(model.device)
    started = time.perf_counter()
    logits = model(pixel_values, num_patches=num_patches).logits
    _wait_for(model.device)
    return logits, time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


# Scores -----------------------------------------------------------------------------------------------------------


def _rule_of_scores(model: PreTrainedModel, asked: str | None) -> str | None:
    if asked not in (None, *SCORE_NORMALIZATIONS):
        raise ValueError(f"score_normalization must be one of {', '.join(SCORE_NORMALIZATIONS)}, got {asked!r}.")
    if model.config.partition == "uniform":
        if asked is not None:
            raise ValueError(
                f"score_normalization: a model with partition='uniform' does not look at its scores, got {asked!r}."
            )
        return None
    has_statistics = model.scorer.statistics.num_batches_tracked.item() > 0
    if asked == "running" and not has_statistics:
        raise ValueError(
            "score_normalization='running' needs statistics, and the model has none: 'dart-hf calibrate' takes them "
            "from images."
        )
    rule = asked or model.config.score_normalization
    replaced = rule == "batch" or (rule == "running" and not has_statistics)
    return "image" if asked is None and replaced else rule


@contextmanager
def _scores_standardized_by(model: PreTrainedModel, rule: str | None) -> Iterator[None]:
    before = model.config.score_normalization
    model.config.score_normalization = rule or before
    try:
        yield
    finally:
        model.config.score_normalization = before


# Reports ----------------------------------------------------------------------------------------------------------


def run_evaluation(
    source: str | os.PathLike,
    data: str | os.PathLike,
    budgets: Sequence[int] = (),
    subset: str | None = None,
    split: str | None = None,
    held_out: float = 0.0,
    limit: int | None = None,
    batch_size: int = 32,
    score_normalization: str | None = None,
    skip_unreadable: bool = False,
    workers: int = 0,
    output: str | os.PathLike | None = None,
    plot: str | os.PathLike | None = None,
    say: Callable[[str], None] = print,
    progress: bool = False,
) -> dict[str, Any]:
    """Load a model and a data set, evaluate, and report.

    Args:
        source: The model, as for [`load_model`].
        data, subset, split: The images, as for [`load_image_data`]; `split` is its `evaluation_split`.
        held_out: Use the share of the training images that a training with this `held_out` evaluated with.
        limit: Use this many images, evenly spread over the data set.
        budgets, batch_size, score_normalization, skip_unreadable, workers, progress: As for [`evaluate_classifier`].
        output: JSON file for what is returned.
        plot: Picture of the accuracies by number of tokens, in the format that its name ends in.
        say: Takes each line meant for the reader.

    Returns:
        The fields of [`Evaluation`]; `model` and `data` (`source`, `subset`, `split`), as full paths where they are
        here; `weights_sha256`, see [`weights_sha256`], None unless the model's safetensors files are here;
        `processor`, `threads`, `command` and `versions`.

    Raises:
        ValueError: An argument is out of range, the data has no such split, no images or other labels than the model,
            or see [`evaluate_classifier`].
        OSError: Model, data or an image cannot be had, or a file cannot be written.
    """
    if plot is not None:
        checked_picture_path(plot)
    if output is not None:
        _check_writable(Path(output))
    digest = weights_sha256(Path(source)) if any(Path(source).glob("model*.safetensors")) else None
    model, image_processor = load_model(source)
    if held_out:
        loaded = load_image_data(data, subset, held_out=held_out)
        if split is not None or loaded.evaluation_split is not None:
            raise ValueError(
                "held_out is for data without a split to evaluate with; here there is "
                f"{split or loaded.evaluation_split!r}."
            )
    else:
        loaded = load_image_data(data, subset, train_split=None, evaluation_split=split)
    images = evenly_spread(loaded.evaluation, limit)
    evaluation = evaluate_classifier(
        model,
        image_processor,
        images,
        loaded.label_names,
        budgets,
        batch_size,
        score_normalization,
        skip_unreadable,
        workers,
        progress,
    )
    own = model.config.score_normalization
    if score_normalization is None and evaluation.score_normalization not in (None, own):
        say(REPLACED_RULES[own])
    where = machine(evaluation.device)
    results = {
        "model": absolute_source(os.fspath(source)),
        "weights_sha256": digest,
        "data": {
            "source": absolute_source(os.fspath(data)),
            "subset": subset,
            "split": "held out of train" if held_out else split or str(images.split),
        },
        **asdict(evaluation),
        "processor": where["gpu"] or where["processor"],
        "threads": where["threads"],
        "command": command_line(),
        "versions": where["packages"],
    }
    for line in table(results):
        say(line)
    if output is not None:
        with atomic_write(Path(output)) as unfinished:
            unfinished.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        say(f"Wrote {output}")
    if plot is not None:
        say(f"Wrote {save_figure(draw_accuracy(results), plot)}")
    return results


def parse_budgets(text: str) -> list[int]:
    """`"121,196"` -> `[121, 196]`.

    Raises:
        ValueError: There is something else than whole numbers of at least 1 between the commas.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("[0-9]+", part) and int(part) for part in parts):
        raise ValueError(f"num_patches must be whole numbers of at least 1 with commas between, got {text!r}.")
    return [int(part) for part in parts]


def table(results: dict[str, Any]) -> Iterator[str]:
    """The results as lines of text."""
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
    yield "  ".join(f"{head:>8}" for head in ("tokens", "top-1", "top-5", "images/s"))
    for budget in results["budgets"]:
        top5 = "–" if budget["top5"] is None else f"{budget['top5']:.2%}"
        cells = (str(budget["num_patches"]), f"{budget['top1']:.2%}", top5, _speed(budget))
        yield "  ".join(f"{cell:>8}" for cell in cells)
    if any(budget["images_per_second"] is None for budget in results["budgets"]):
        yield f"No speed: there was no full batch of {results['batch_size']} images."


def _speed(budget: dict[str, Any]) -> str:
    speed = budget["images_per_second"]
    return "–" if speed is None else f"{speed:.1f}"


def draw_accuracy(results: dict[str, Any]) -> "Figure":
    """The accuracies by number of tokens, with the throughput at each."""
    from matplotlib.figure import Figure

    budgets = sorted(results["budgets"], key=lambda budget: budget["num_patches"])
    tokens = [budget["num_patches"] for budget in budgets]
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for key, name, colour in (("top5", "top-5", "#1b9e77"), ("top1", "top-1", "#d95f02")):
        if budgets[0][key] is not None:
            axes.plot(tokens, [100 * budget[key] for budget in budgets], marker="o", color=colour, label=name)
    for budget in budgets:
        place = {"xytext": (0, -14), "textcoords": "offset points", "ha": "center"}
        at = (budget["num_patches"], 100 * budget["top1"])
        axes.annotate(f"{_speed(budget)} images/s", at, fontsize=8, **place)
    axes.margins(0.15)
    axes.set_xticks(tokens)
    axes.set_xlabel("tokens")
    axes.set_ylabel("accuracy (%)")
    axes.set_title(
        f"{Path(results['model']).name}, {results['num_images']:,} images of {Path(results['data']['source']).name}"
    )
    axes.legend()
    return figure


def _check_writable(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"output: {path} is a folder; give a file.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"output: there is no folder {str(path.parent)!r}.")
