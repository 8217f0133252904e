"""Train an image classifier in one call, as the quick start does."""

import os
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainingArguments
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_utils import PreTrainedModel

from dart_hf.training.progress import progress_callback
from dart_hf.training.trainer import DartTrainer

EVALUATION_BATCH_SIZE = 90


def train_classifier(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    train: Dataset,
    test: Dataset,
    output: str | os.PathLike,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    seed: int = 0,
    progress: TrainerCallback | None = None,
    **arguments: Any,
) -> DartTrainer:
    """Train an image classifier for a number of steps.

    Args:
        model, image_processor: The classifier and its image processor.
        train, test: Data sets with columns `image` and `label`.
        output: The trainer's folder; nothing is saved there unless `arguments` asks for it.
        steps: Number of batches to learn from.
        batch_size: Images per step and device.
        learning_rate: The highest learning rate: it grows over the first tenth of the steps, then falls to zero as a
            cosine.
        seed: Seed of the order of the images.
        progress: Shows the progress; without it a bar on a terminal, and a few lines elsewhere.
        arguments: Other fields of `TrainingArguments`.

    Returns:
        The trainer, trained; its `evaluate()` gives `eval_loss` and `eval_accuracy` on `test`.

    Raises:
        ValueError: A label is out of range, `steps` or `batch_size` is below 1, or the scorer has no weights.
    """
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    settings = {
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": EVALUATION_BATCH_SIZE,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": steps // 10,
        "weight_decay": 0.05,
        "seed": seed,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
        **arguments,
    }
    trainer = DartTrainer(
        model,
        TrainingArguments(output_dir=os.fspath(output), **settings),
        train_dataset=train,
        eval_dataset=test,
        processing_class=image_processor,
    )
    trainer.show_progress(progress or progress_callback())
    trainer.train()
    return trainer
