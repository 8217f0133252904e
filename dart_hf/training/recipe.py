"""Training through transformers' `Trainer`: a recipe, and the stock trainer that follows it."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_utils import PreTrainedModel
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dart_hf.data.augmentation import EpochCallback
from dart_hf.data.batch_mixing import MixImages
from dart_hf.data.collator import ImageClassificationCollator
from dart_hf.data.image_augmentation import training_transform
from dart_hf.data.seeded_rows import SeededRows, SeededStream
from dart_hf.data.sources import Split
from dart_hf.evaluation.metrics import classification_accuracy
from dart_hf.training.checkpoints import CompleteCheckpointCallback, RandomStateCallback
from dart_hf.training.distillation import DistillationLoss, Teacher
from dart_hf.training.ema import EmaCallback
from dart_hf.training.losses import soft_target_cross_entropy
from dart_hf.training.optimizer import layerwise_optimizer

EVALUATION_BATCH_SIZE = 90


@dataclass
class Recipe:
    """What a training does besides what `TrainingArguments` says. The defaults leave images and loss as they are.

    Label smoothing is `TrainingArguments.label_smoothing_factor`, weight decay `weight_decay`, and so on.
    """

    auto_augment: str | None = field(
        default=None, metadata={"help": "timm's policy, such as rand-m9-mstd0.5-inc1 (RandAugment as in DeiT)."}
    )
    random_erasing: float = field(default=0.0, metadata={"help": "Probability of erasing a rectangle."})
    crop_scale: float | None = field(
        default=None,
        metadata={"help": "Smallest share of the area in a random crop; 1 crops the largest central square."},
    )
    horizontal_flip: float = field(default=0.0, metadata={"help": "Probability of a mirror image."})
    color_jitter: float = field(default=0.0, metadata={"help": "Strength; without effect beside auto_augment."})
    repeated_augmentation: int = field(default=1, metadata={"help": "How often an image is in a batch."})
    mixup: float = field(default=0.0, metadata={"help": "Parameter of mixup's Beta distribution; 0 for none."})
    cutmix: float = field(default=0.0, metadata={"help": "Parameter of cutmix's Beta distribution; 0 for none."})
    ema_decay: float | None = field(
        default=None, metadata={"help": "Decay of averaged weights, which are evaluated and kept (DeiT: 0.99996)."}
    )
    layer_decay: float = field(
        default=1.0, metadata={"help": "Factor on the learning rate from each layer to the one before."}
    )
    scorer_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the scoring network; that of its layer without."}
    )
    teacher: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a transformers classifier, or timm/NAME, to distil from."}
    )
    distillation: Literal["soft", "hard"] = field(
        default="soft", metadata={"help": "Towards the teacher's probabilities, or its answer."}
    )
    distillation_alpha: float = field(default=0.5, metadata={"help": "Share of the distillation in the loss."})
    distillation_temperature: float = field(default=1.0, metadata={"help": "Of soft distillation."})

    @property
    def augments(self) -> bool:
        """Whether training images are prepared otherwise than images for evaluation."""
        return bool(
            self.auto_augment
            or self.random_erasing
            or self.crop_scale is not None
            or self.horizontal_flip
            or self.color_jitter
        )


class LossBar(ProgressCallback):
    """`Trainer`'s progress bar with the loss in it, and a line per evaluation instead of printed dicts."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is None or logs is None:
            return
        if "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.2f}")
        if "eval_accuracy" in logs:
            self.training_bar.write(f"step {state.global_step}: accuracy {logs['eval_accuracy']:.1%}")

    def close(self) -> None:
        """Leave the line of the bar, where a training breaks off."""
        for bar in (self.prediction_bar, self.training_bar):
            if bar is not None:
                bar.close()


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


def classification_trainer(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    train: Split,
    evaluation: Split | None,
    arguments: TrainingArguments,
    recipe: Recipe | None = None,
    skip_unreadable: bool = False,
    progress: TrainerCallback | None = None,
) -> Trainer:
    """A stock `Trainer` for an image classifier, made of the pieces that a recipe asks for.

    Args:
        model, image_processor: The classifier and what prepares its images.
        train, evaluation: Data sets with columns `image` and `label`.
        arguments: With `remove_unused_columns=False`, because the collator needs the images.
        recipe: Without it, images are prepared as for evaluation and nothing is averaged or distilled.
        skip_unreadable: See [`ImageClassificationCollator`].
        progress: Shows how far the training is.

    Raises:
        ValueError: A setting of the recipe is out of range; the model's scorer has no weights; or the teacher tells
            other classes apart.
        OSError: The teacher could not be had.
    """
    recipe = recipe or Recipe()
    model.require_scorer_weights()
    rows = SeededStream if isinstance(train, torch.utils.data.IterableDataset) else SeededRows
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows(train, arguments.seed, recipe.repeated_augmentation),
        eval_dataset=evaluation,
        data_collator=ImageClassificationCollator(
            image_processor,
            model.config.num_labels,
            transform=_transform(recipe, image_processor),
            mix=_mix(recipe, arguments.label_smoothing_factor, model.config.num_labels),
            skip_unreadable=skip_unreadable,
        ),
        processing_class=image_processor,
        compute_loss_func=_loss(recipe, arguments, model, image_processor),
        compute_metrics=classification_accuracy,
        optimizer_cls_and_kwargs=layerwise_optimizer(
            arguments, layer_decay=recipe.layer_decay, scorer_learning_rate=recipe.scorer_learning_rate
        ),
    )
    # Before 5.6 transformers left accelerate to divide the loss by the accumulation steps once more.
    trainer.accelerator.gradient_accumulation_steps = 1
    for stock in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(stock)
    if progress is not None:
        trainer.add_callback(progress)
    trainer.add_callback(RunningScoresCallback())
    trainer.add_callback(EpochCallback())
    trainer.add_callback(RandomStateCallback())
    if recipe.ema_decay is not None:
        trainer.add_callback(EmaCallback(recipe.ema_decay))
    # Last, because it declares complete what the others have saved.
    trainer.add_callback(CompleteCheckpointCallback())
    return trainer


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
        # The collator prepares the images, so they must reach it.
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        **arguments,
    }
    arguments = TrainingArguments(output_dir=os.fspath(output), **settings)
    trainer = classification_trainer(model, image_processor, train, test, arguments, progress=progress or LossBar())
    trainer.train()
    return trainer


def _transform(recipe: Recipe, image_processor: BaseImageProcessor) -> Callable[..., torch.Tensor] | None:
    if not recipe.augments:
        return None
    return training_transform(
        image_processor,
        auto_augment=recipe.auto_augment,
        random_erasing=recipe.random_erasing,
        crop_scale=1.0 if recipe.crop_scale is None else recipe.crop_scale,
        horizontal_flip=recipe.horizontal_flip,
        color_jitter=recipe.color_jitter,
    )


def _mix(recipe: Recipe, label_smoothing: float, num_labels: int) -> MixImages | None:
    """Label smoothing is done here, because `Trainer` leaves it out where it has a loss function."""
    if not (recipe.mixup or recipe.cutmix or label_smoothing):
        return None
    return MixImages(num_labels, recipe.mixup, recipe.cutmix, label_smoothing)


def _loss(
    recipe: Recipe, arguments: TrainingArguments, model: PreTrainedModel, image_processor: BaseImageProcessor
) -> Callable[..., torch.Tensor]:
    if recipe.teacher is None:
        return soft_target_cross_entropy
    # The loss is computed outside of autocast, which would have done this for the teacher.
    precision = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    return DistillationLoss(
        Teacher.load(recipe.teacher, precision),
        model,
        kind=recipe.distillation,
        alpha=recipe.distillation_alpha,
        temperature=recipe.distillation_temperature,
        image_mean=image_processor.image_mean,
        image_std=image_processor.image_std,
    )
