"""Run an evaluation: load a model and a data set, measure, and report."""

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedModel

from dart_hf.data.batches import evenly_spread
from dart_hf.data.held_out import HELD_OUT_FILE, select_held_out
from dart_hf.data.image_data import ImageData, load_image_data
from dart_hf.environment import command_line, machine
from dart_hf.evaluation.classification import evaluate_classifier, problem_type_of
from dart_hf.evaluation.report import draw_metrics, table
from dart_hf.files import absolute_source, atomic_write, weights_sha256
from dart_hf.hub.loading import load_model
from dart_hf.visualization import checked_picture_path, save_figure

# A model's own rule for scores -> why "image" replaces it unless the user asks for the rule.
REPLACED_RULES = {
    "batch": "Score normalisation is 'image' instead of the model's own 'batch', whose answers depend on the other "
    "images of a batch. 'image' computes what 'batch' computes for single images.",
    "running": "Score normalisation is 'image' instead of 'running': the model has no running statistics yet.",
}


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
    report: Callable[[str], None] = print,
    progress: bool = False,
) -> dict[str, Any]:
    """Load a model and a data set, evaluate, and report.

    Args:
        source: The model, as for [`load_model`].
        data, subset, split: The images, as for [`load_image_data`]; `split` is its `evaluation_split`.
        held_out: The share of the training images that the model's training held out. The evaluation uses exactly these
            images, which `held_out.json` in the model's folder records.
        limit: Use at most this many images, evenly spread over the data set.
        budgets, batch_size, score_normalization, skip_unreadable, workers, progress: As for [`evaluate_classifier`].
        output: JSON file for the results.
        plot: Image file for a plot of the metrics over the number of tokens, in the format that its name ends in.
        report: Called with each line of output.

    Returns:
        The fields of [`Evaluation`]; `model` and `data` (`source`, `subset`, `split`), as absolute paths if they are
        local; `weights_sha256`, see [`weights_sha256`], or None if there are no local safetensors files; `processor`,
        `threads`, `command` and `versions`.

    Raises:
        ValueError: An argument is out of range; the data has no such split, no images, or other labels than the model;
            the held-out images are not known or not all in the data; or see [`evaluate_classifier`].
        OSError: Model, data or an image cannot be read, or a file cannot be written.
        ImportError: `plot` is given and matplotlib is not installed.
    """
    if plot is not None:
        checked_picture_path(plot)
    if output is not None:
        _check_output_file(Path(output))
    if held_out:
        images, loaded = _held_out_images(Path(source), data, subset, split, held_out)
    else:
        loaded = load_image_data(data, subset, train_split=None, evaluation_split=split)
        images = loaded.evaluation
    digest = weights_sha256(Path(source)) if any(Path(source).glob("model*.safetensors")) else None
    model, image_processor = load_model(source)
    _check_task(model, loaded)
    images = evenly_spread(images, limit)
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
        report(REPLACED_RULES[own])
    where = machine(evaluation.device)
    results = {
        "model": absolute_source(os.fspath(source)),
        "weights_sha256": digest,
        "data": {
            "source": absolute_source(os.fspath(data)),
            "subset": subset,
            "split": "held out of train" if held_out else split or loaded.evaluation_split,
        },
        **asdict(evaluation),
        "budgets": [budget.to_dict() for budget in evaluation.budgets],
        "processor": where["gpu"] or where["processor"],
        "threads": where["threads"],
        "command": command_line(),
        "versions": where["packages"],
    }
    for line in table(results):
        report(line)
    if output is not None:
        with atomic_write(Path(output)) as unfinished:
            unfinished.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        report(f"Wrote {output}")
    if plot is not None:
        report(f"Wrote {save_figure(draw_metrics(results), plot)}")
    return results


def parse_budgets(text: str) -> list[int]:
    """`"121,196"` -> `[121, 196]`.

    Raises:
        ValueError: A part between the commas is no whole number of at least 1.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("[0-9]+", part) and int(part) for part in parts):
        raise ValueError(f"num_patches must be whole numbers of at least 1 with commas between, got {text!r}.")
    return [int(part) for part in parts]


def _held_out_images(
    folder: Path, data: str | os.PathLike, subset: str | None, split: str | None, share: float
) -> tuple[datasets.Dataset, ImageData]:
    """The images that the training of the model in `folder` held out, and the data that they come from."""
    record = folder / HELD_OUT_FILE
    if not record.is_file():
        raise ValueError(
            f"held_out: the model's folder {str(folder)!r} has no {HELD_OUT_FILE}, so it is not known which images its "
            "training held out; give images of a split of their own."
        )
    record = json.loads(record.read_text(encoding="utf-8"))
    facts = folder / "training.json"
    facts = json.loads(facts.read_text(encoding="utf-8")).get("data", {}) if facts.is_file() else {}
    learned, held_out = facts.get("num_train_images"), facts.get("num_evaluation_images")
    if learned and held_out and math.ceil(share * (learned + held_out)) != held_out:
        raise ValueError(
            f"held_out={share} is not the share of the training, which held out {held_out} of {learned + held_out} "
            f"images, {held_out / (learned + held_out):.2g} of them."
        )
    loaded = load_image_data(data, subset, train_split=facts.get("train_split") or "train")
    if split is not None or loaded.evaluation_split is not None:
        raise ValueError(
            f"held_out is for data without a split to evaluate on; here there is {split or loaded.evaluation_split!r}."
        )
    return select_held_out(loaded.train, record), loaded


def _check_task(model: PreTrainedModel, data: ImageData) -> None:
    task = problem_type_of(model)
    if data.problem_type != task:
        raise ValueError(
            f"The model's task is {task!r}, and the labels of the data are for {data.problem_type!r}; give data with "
            "labels for the model's task."
        )


def _check_output_file(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"output: {path} is a folder; give a file.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"output: there is no folder {str(path.parent)!r}.")
