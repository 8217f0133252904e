"""DartTrainer: transformers' `Trainer` with all that a DART classifier needs in place."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_utils import PreTrainedModel
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput
from transformers.utils import logging

from dart_hf.data.collator import ImageClassificationCollator
from dart_hf.data.seeded_rows import SeededRows, SeededStream
from dart_hf.evaluation.metrics import compute_metrics_for
from dart_hf.training.checkpoints import (
    is_last,
    latest_complete_checkpoint,
    load_renamed_weights,
    mark_complete,
    remove_checkpoint,
    remove_incomplete_checkpoints,
    remove_older_checkpoints,
)
from dart_hf.training.distillation import DistillationLoss
from dart_hf.training.ema import WeightAverage, check_decay, load_average
from dart_hf.training.epoch_callback import EpochCallback
from dart_hf.training.losses import LOSSES
from dart_hf.training.optimizer import build_optimizer
from dart_hf.training.recipe import Recipe
from dart_hf.training.running_scores import RunningScoresCallback
from dart_hf.training.teacher import Teacher
from dart_hf.training.unchanged import unchanged_random_state, unchanged_weights

logger = logging.get_logger(__name__)


class DartTrainer(Trainer):
    """transformers' `Trainer` for DART image classifiers, on data sets with columns `image` and `label`.

    ```python
    trainer = DartTrainer(model, args, train_dataset=train, eval_dataset=test, processing_class=image_processor)
    trainer.train()
    ```

    It differs from a stock `Trainer` in this:

    - [`ImageClassificationCollator`] prepares the images, so `remove_unused_columns` is turned off. The augmentation of
      an image depends on the seed, the epoch and the row alone.
    - The loss follows the model's `problem_type` and takes soft targets (mixup, cutmix, label smoothing). In training
      it can include a teacher. The metrics follow `problem_type` too.
    - Biases, norms, tokens and the position table do not decay; learning rates can depend on the depth.
    - A converted model's score normalisation turns from "batch" to "running".
    - Every evaluation leaves the training's random numbers alone, and runs on the averaged weights if there are any.
    - Checkpoints are complete or not used. A training that is killed anywhere and resumed comes to the same weights,
      bit for bit on a CPU with as many threads.
    - `bf16_full_eval` and `fp16_full_eval` do not change the model's weights.

    Args:
        model, args, train_dataset, eval_dataset, ...: As for `Trainer`. `processing_class` is the model's image
            processor. Your own `data_collator`, `compute_loss_func`, `compute_metrics` or optimizer replaces ours.
        recipe: Augmentation, soft targets, averaging, learning rates by depth, and distillation. By default none of
            these. With your own `data_collator` the recipe's settings of images have no effect.
        teacher: The teacher of a distillation, instead of the one that `recipe.teacher` names.

    Raises:
        ValueError: There is no image processor; a setting of the recipe is out of range or does not suit the model's
            `problem_type`; the model's scorer has no weights; or the teacher has other classes.
        OSError: The teacher cannot be downloaded or read.
    """

    # `compute_loss` divides by the images of all accumulated batches.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: BaseImageProcessor | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_loss_func: Callable[..., torch.Tensor] | None = None,
        compute_metrics: Callable[..., dict[str, float]] | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        recipe: Recipe | None = None,
        teacher: Teacher | None = None,
        **settings: Any,
    ) -> None:
        self.recipe = recipe or Recipe()
        if self.recipe.ema_decay is not None:
            check_decay(self.recipe.ema_decay)
        self._average: WeightAverage | None = None
        self._resumed_from: str | None = None
        self._checkpoint_limit: int | None = None
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            # Ours come first, so that other callbacks see the final weights when the training ends.
            callbacks=[RunningScoresCallback(), EpochCallback(), _TrainingEvents(self), *(callbacks or [])],
            **settings,
        )
        if train_dataset is not None and hasattr(self.model, "require_scorer_weights"):
            self.model.require_scorer_weights()
        if data_collator is None:
            self.data_collator = self._collator()
            self.args.remove_unused_columns = False
        elif self.args.label_smoothing_factor and compute_loss_func is None and not getattr(data_collator, "mix", None):
            logger.warning("label_smoothing_factor has no effect with your own data_collator; smooth its labels there.")
        if isinstance(self.data_collator, ImageClassificationCollator):
            self.train_dataset = self._seeded(train_dataset)
        self._loss = self._loss_of_problem()
        self._distillation = self._distillation_loss(teacher)
        if compute_metrics is None:
            self.compute_metrics = compute_metrics_for(self.model.config.problem_type)

    # Data

    def _collator(self) -> ImageClassificationCollator:
        if not isinstance(self.processing_class, BaseImageProcessor):
            raise ValueError(
                "DartTrainer needs the model's image processor as processing_class, got "
                f"{type(self.processing_class).__name__}."
            )
        config = self.model.config
        return ImageClassificationCollator(
            self.processing_class,
            config.num_labels,
            transform=self.recipe.transform(self.processing_class),
            mix=self.recipe.mix(config.num_labels, self.args.label_smoothing_factor),
            skip_unreadable=self.recipe.skip_unreadable,
            problem_type=config.problem_type or "single_label_classification",
        )

    def _seeded(self, rows: Any) -> Any:
        """The training rows, each with the number that decides its augmentation."""
        if rows is None or isinstance(rows, (SeededRows, SeededStream)):
            return rows
        seeded = SeededStream if isinstance(rows, IterableDataset) else SeededRows
        return seeded(rows, self.args.seed, self.recipe.repeated_augmentation)

    def get_train_dataloader(self) -> DataLoader:
        if self._resumed_from is not None and is_last(self._resumed_from, self.args):
            # Nothing is left to train. `Trainer` alone would take one step too many if the training ended within an
            # epoch. With epochs of one step it has as many epochs as steps behind it, and none ahead.
            return [{}]
        return super().get_train_dataloader()

    # Loss

    def _loss_of_problem(self) -> Callable[..., torch.Tensor]:
        problem = self.model.config.problem_type
        if problem not in LOSSES:
            accepted = ", ".join(name for name in LOSSES if name)
            raise ValueError(f"problem_type must be one of {accepted}, got {problem!r}.")
        return LOSSES[problem]

    def _distillation_loss(self, teacher: Teacher | None) -> DistillationLoss | None:
        recipe = self.recipe
        if teacher is None and recipe.teacher is None:
            return None
        if self.model.config.problem_type not in (None, "single_label_classification"):
            raise ValueError(f"A teacher needs one class for each image, not {self.model.config.problem_type}.")
        if teacher is None:
            # The loss runs outside of autocast, so the teacher gets its precision here.
            precision = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
            teacher = Teacher.load(recipe.teacher, precision)
        return DistillationLoss(
            teacher,
            self.model,
            image_mean=self.processing_class.image_mean,
            image_std=self.processing_class.image_std,
            kind=recipe.distillation,
            alpha=recipe.distillation_alpha,
            temperature=recipe.distillation_temperature,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The mean loss over the images: of the whole batch in training, of `inputs` in evaluation."""
        if self.compute_loss_func is not None or "labels" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        if not model.training:
            loss = self._loss(outputs, labels)
        else:
            if self._distillation is None:
                loss = self._loss(outputs, labels, num_items_in_batch)
            else:
                loss = self._distillation(outputs, labels, inputs["pixel_values"], num_items_in_batch)
            if self.args.average_tokens_across_devices and num_items_in_batch is not None:
                # The gradients of all devices are averaged, and the loss is divided by the images of all devices.
                loss = loss * (self.accelerator.num_processes if self.args.n_gpu <= 1 else self.args.n_gpu)
        return (loss, outputs) if return_outputs else loss

    # Optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            self.optimizer = build_optimizer(
                self.model if model is None else model,
                self.args,
                self.recipe.layer_decay,
                self.recipe.scorer_learning_rate,
            )
        return super().create_optimizer(model)

    # Training

    def train(
        self, resume_from_checkpoint: str | os.PathLike | bool | None = None, *arguments: Any, **settings: Any
    ) -> TrainOutput:
        """Train, from the start or from a checkpoint.

        Args:
            resume_from_checkpoint: A checkpoint's folder, or True for the latest complete checkpoint in the output
                folder; incomplete ones are then deleted. Without a complete one the training starts from the beginning.
                If nothing is left to train, the model gets the final weights.
            arguments, settings: As for `Trainer.train`.
        """
        checkpoint = resume_from_checkpoint or None
        if checkpoint is True:
            checkpoint = latest_complete_checkpoint(self.args.output_dir)
            if checkpoint is None:
                logger.warning(
                    f"{self.args.output_dir} has no complete checkpoint: training starts from the beginning."
                )
            elif self.is_world_process_zero():
                remove_incomplete_checkpoints(self.args.output_dir)
        self._resumed_from = None if checkpoint is None else os.fspath(checkpoint)
        if self._resumed_from is not None:
            load_renamed_weights(self.model, self._resumed_from)
        # Loaded weights may be aligned in memory differently from new ones, and the last bits of a product can depend
        # on that.
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            tensor.data = tensor.data.clone()
        # `Trainer` would delete older checkpoints before the new one is complete. Its 0 keeps all.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._checkpoint_limit = limit if (limit or 0) > 0 else None
        try:
            return super().train(self._resumed_from, *arguments, **settings)
        finally:
            self.args.save_total_limit = limit
            self._average = self._resumed_from = None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        checkpoint = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save and checkpoint.exists():
            remove_checkpoint(checkpoint)  # An incomplete one of a killed training.
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        if self._average is not None and self.args.should_save:
            self._average.save(checkpoint)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(checkpoint)
            remove_older_checkpoints(checkpoint, self._checkpoint_limit, self.state.best_model_checkpoint)

    def _begin_training(self) -> None:
        """Called when the model and its state are ready to train."""
        if self.state.best_global_step and self.state.best_model_checkpoint is None:
            # The output folder was moved since; `Trainer` has its old path.
            best = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            self.state.best_model_checkpoint = os.fspath(best) if best.exists() else None
        if self.recipe.ema_decay is not None:
            self._average = WeightAverage(self.model, self.recipe.ema_decay)
            if self._resumed_from is not None:
                self._average.load(self._resumed_from)

    def _end_optimizer_step(self) -> None:
        """Called after each optimizer step that was not skipped."""
        if self._average is not None:
            self._average.update(self.state.global_step + 1)

    def _end_training(self) -> None:
        """Called when the model has its final weights."""
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            load_renamed_weights(self.model, self.state.best_model_checkpoint)
        if self._average is None:
            return
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            load_average(self.model, self.state.best_model_checkpoint)
        else:
            self._average.give_to_model()
        self._average = None

    # Evaluation

    def evaluate(self, *arguments: Any, **settings: Any) -> dict[str, float]:
        """As `Trainer.evaluate`. In a training it runs on the averaged weights, if there are any."""
        if not self.is_in_train:
            return super().evaluate(*arguments, **settings)
        with unchanged_random_state(self.args.device), self._averaged_weights():
            return super().evaluate(*arguments, **settings)

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        if self._average is None:
            yield
        else:
            with self._average.in_model():
                yield

    def evaluation_loop(self, *arguments: Any, **settings: Any) -> EvalLoopOutput:
        half_precision = self.args.bf16_full_eval or self.args.fp16_full_eval
        with unchanged_weights(self.model) if half_precision and not self.is_in_train else nullcontext():
            return super().evaluation_loop(*arguments, **settings)

    # Progress

    def show_progress(self, progress: TrainerCallback | None) -> None:
        """Show the progress with this callback instead of `Trainer`'s own bar or printed dicts; None shows nothing."""
        for stock in (ProgressCallback, PrinterCallback):
            self.remove_callback(stock)
        if progress is not None:
            self.add_callback(progress)


class _TrainingEvents(TrainerCallback):
    """Tells a trainer about its own training."""

    def __init__(self, trainer: DartTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._begin_training()

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        # Gradients that overflow in half precision are not applied.
        if not getattr(optimizer, "step_was_skipped", False):
            self.trainer._end_optimizer_step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._end_training()
