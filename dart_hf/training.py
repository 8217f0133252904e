"""Training through transformers' `Trainer`."""

import os
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_utils import PreTrainedModel
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dart_hf.data import ImageClassificationCollator
from dart_hf.metrics import classification_accuracy

EVALUATION_BATCH_SIZE = 90


class LossBar(ProgressCallback):
    """`Trainer`'s progress bar with the loss in it, instead of a printed dict per log entry."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.2f}")


class RunningScoresCallback(TrainerCallback):
    """Turns a model's score normalisation from "batch" to "running" when its training begins.

    A converted checkpoint starts with the published rule, "batch". In training both compute the same; what changes is
    that the trained model's predictions no longer depend on the other images of their batch.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        if model.config.score_normalization == "batch":
            model.config.score_normalization = "running"


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
) -> Trainer:
    """Train an image classifier with `Trainer` for a number of steps.

    Args:
        model, image_processor: The classifier and what prepares its images.
        train, test: Data sets with columns `image` and `label`.
        output: The trainer's folder; nothing is saved there unless `arguments` asks for it.
        steps: How many batches to learn from.
        batch_size: Images per step and device.
        learning_rate: Its peak: it grows over the first tenth of the steps, then falls to zero as a cosine.
        seed: Of the order of the images.
        progress: Shows how far the training is; a [`LossBar`] without it.
        arguments: Other fields of `TrainingArguments`.

    Returns:
        The trainer, trained; its `evaluate()` gives `eval_loss` and `eval_accuracy` on `test`.

    Raises:
        ValueError: A label is out of range, or `steps` or `batch_size` is below 1.
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
        # The collator prepares the images, so they must reach it.
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        **arguments,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=os.fspath(output), **settings),
        data_collator=ImageClassificationCollator(image_processor, model.config.num_labels),
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=classification_accuracy,
    )
    for stock in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(stock)
    trainer.add_callback(progress or LossBar())
    trainer.add_callback(RunningScoresCallback())
    trainer.train()
    return trainer
