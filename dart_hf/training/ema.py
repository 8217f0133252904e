"""Averaged weights: what a training evaluates, saves beside its checkpoints, and ends with."""

import os
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, broadcast
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from timm.utils import ModelEmaV3
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modeling_utils import PreTrainedModel

from dart_hf.files import atomic_write
from dart_hf.training.checkpoints import MARKER, checkpoint_folder

EMA_FILE = "ema.safetensors"


class EmaCallback(TrainerCallback):
    """Keeps an exponential moving average of the weights, and lets `Trainer` evaluate and return it.

    After every optimiser step `average = decay · average + (1 - decay) · weights`, for the buffers too (running
    statistics of scores and of BatchNorm); the first step's average is its weights.

    - Each evaluation that `Trainer` schedules runs on the average, so that the best checkpoint is the one with the best
      average. Training goes on with the weights as trained.
    - Every checkpoint has the average in `ema.safetensors`, under the model's own names, and the weights as trained in
      `model.safetensors`. A resumed training goes on with both.
    - When training ends, the model is the average: of the best checkpoint with `load_best_model_at_end`, else the
      latest. What is saved then is what was evaluated.

    Several processes keep the same average. It is on the model's device, and takes as much memory as the model.

    Args:
        decay: The average's share of the new average, in [0, 1). The default is DART's and DeiT's.
        warmup: Lets the decay grow to that as (1 + n) / (10 + n) in step n + 2 (the rule of TensorFlow's
            ExponentialMovingAverage), so that a short training averages over its last tenth or so, and not over its
            beginning. DeiT trains without.
        resume_from: The checkpoint whose average to go on with; by default that of the step to resume from, in the
            output folder.

    Raises:
        ValueError: `decay` is out of range; the weights are spread over processes (FSDP, DeepSpeed), or in half
            precision, which is too coarse for an average; an average does not fit the model; an evaluation is not one
            that `Trainer` scheduled, on one data set; or [`CompleteCheckpointCallback`] comes before this.
        FileNotFoundError: The checkpoint to resume from has no average.
    """

    def __init__(
        self, decay: float = 0.99996, warmup: bool = True, resume_from: str | os.PathLike | None = None
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {decay}.")
        self.decay = decay
        self.warmup = warmup
        self.resume_from = resume_from
        self._average: ModelEmaV3 | None = None
        # Whether the model has the average and the average the weights as trained.
        self._exchanged = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        _check_weights(model)
        if self._exchanged and state.global_step == 0:
            self._exchange(model)  # The last training broke off in an evaluation.
        self._exchanged = False
        self._average = ModelEmaV3(model, self.decay, use_warmup=self.warmup, warmup_gamma=9, warmup_power=1)
        if state.global_step > 0:
            load_average(self._average.module, self.resume_from or checkpoint_folder(args, state))
        if args.eval_on_start:
            self._exchange(model)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        # Gradients that overflow in half precision are not applied.
        if not getattr(optimizer, "step_was_skipped", False):
            self._average.update(model, step=state.global_step + 1)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        if control.should_evaluate:
            self._exchange(model)

    on_epoch_end = on_step_end

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        if self._average is None:
            return  # Not in a training.
        if not self._exchanged:
            raise ValueError(
                "EmaCallback was not asked to average for this evaluation: eval_dataset must be one data set, not a "
                "dictionary, and in training only eval_strategy and callbacks before EmaCallback may start one."
            )
        self._exchange(model)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.should_save:
            checkpoint = checkpoint_folder(args, state)
            if (checkpoint / MARKER).exists():
                raise ValueError(
                    f"{checkpoint} is already complete: give CompleteCheckpointCallback after EmaCallback."
                )
            with atomic_write(checkpoint / EMA_FILE) as unfinished:
                save_model(self._average.module, os.fspath(unfinished), metadata={"format": "pt"})

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            load_average(model, state.best_model_checkpoint)
        else:
            self._exchange(model)
        self._average, self._exchanged = None, False

    def _exchange(self, model: nn.Module) -> None:
        """Give the model the average, and the average the model's weights; again, and all is as before."""
        if not self._exchanged:
            # Each process has its own batch statistics; DistributedDataParallel too takes process 0's buffers.
            broadcast(list(self._average.module.buffers()))
        for average, weight in zip(
            self._average.module.state_dict().values(), model.state_dict().values(), strict=True
        ):
            trained = weight.clone()
            weight.copy_(average)
            average.copy_(trained)
        self._exchanged = not self._exchanged


def load_average(model: nn.Module, checkpoint: str | os.PathLike) -> None:
    """Give a model the average that [`EmaCallback`] left in a checkpoint.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, or another model's.
    """
    path = Path(checkpoint) / EMA_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"The average of the weights, {path}, does not exist: resume a training that had EmaCallback and name its "
            "checkpoint, EmaCallback(resume_from=...), or resume without EmaCallback."
        )
    try:
        load_model(model, path)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"The average of the weights, {path}, is damaged or another model's.") from error


def _check_weights(model: nn.Module) -> None:
    distributed = AcceleratorState().distributed_type
    if distributed in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"EmaCallback needs all weights in every process, and {distributed.value} spreads them; train with DDP."
        )
    coarse = {str(weight.dtype) for weight in model.parameters() if weight.dtype.itemsize < 4}
    if coarse:
        raise ValueError(
            f"EmaCallback needs weights in float32, got {', '.join(sorted(coarse))}: load the model with "
            "dtype=torch.float32 and train with bf16=True or fp16=True."
        )
