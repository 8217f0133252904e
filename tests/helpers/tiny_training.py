"""A training of a second: a DART with dropout and drop path, a few coloured pictures, and a `DartTrainer`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import TrainerCallback, TrainingArguments, set_seed

from dart_hf import DartConfig, DartForImageClassification, DartImageProcessor
from dart_hf.training import DartTrainer, Recipe

SIDE = 24
NUM_LABELS = 3


# A classifier with every kind of state: random numbers, running statistics of scores, BatchNorm.
TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.2,
    "hidden_dropout_prob": 0.1,
    "drop_path_rate": 0.3,
    "image_size": SIDE,
    "patch_size": 8,
    "num_patches": 6,
    "scorer": "conv",
}


# The training ends with the "best" model; the greatest loss counts as best, so that it is not the last model.
KEEP_WORST = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}


def tiny_dart(**settings: Any) -> DartForImageClassification:
    set_seed(0)
    return DartForImageClassification(DartConfig(**{**TINY, "num_labels": NUM_LABELS, **settings}))


def still_dart(**settings: Any) -> DartForImageClassification:
    """A model that computes the same in training whatever the batch: without dropout and without a scorer."""
    return tiny_dart(**{"partition": "uniform", "hidden_dropout_prob": 0.0, "drop_path_rate": 0.0, **settings})


def tiny_pictures(count: int) -> list[dict[str, Any]]:
    """Rows of an image of noise around a colour, and the number of that colour."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(count):
        pixels = generator.integers(0, 160, (SIDE, SIDE, 3))
        pixels[..., number % NUM_LABELS] += 60
        rows.append({"image": Image.fromarray(pixels.astype(np.uint8)), "label": number % NUM_LABELS})
    return rows


def write_photos(root: Path, train: int = 22, test: int = 6) -> Path:
    """Write the pictures to `root`/SPLIT/LABEL/NUMBER.png; return `root`."""
    for split, count in (("train", train), ("test", test)):
        for number, row in enumerate(tiny_pictures(count)):
            path = root / split / str(row["label"]) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            row["image"].save(path)
    return root


def tiny_processor() -> DartImageProcessor:
    return DartImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE)


def tiny_arguments(output: Path, **arguments: Any) -> TrainingArguments:
    """Arguments for 22 pictures in batches of 4, so 6 steps an epoch, saved after every third."""
    settings: dict[str, Any] = {
        "max_steps": 20,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.05,
        "lr_scheduler_type": "cosine",
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_steps": 3,
        "logging_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        **arguments,
    }
    return TrainingArguments(output, **settings)


def tiny_trainer(
    output: Path,
    recipe: Recipe | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    model: DartForImageClassification | None = None,
    rows: list[dict[str, Any]] | None = None,
    **arguments: Any,
) -> DartTrainer:
    """A trainer on 22 pictures, or on `rows`, that evaluates the first six and prints nothing."""
    rows = rows or tiny_pictures(22)
    trainer = DartTrainer(
        model or tiny_dart(),
        tiny_arguments(output, **arguments),
        train_dataset=rows,
        eval_dataset=rows[:6],
        processing_class=tiny_processor(),
        callbacks=callbacks,
        recipe=recipe,
    )
    trainer.show_progress(None)
    return trainer


def same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts are the same, bit for bit."""
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
