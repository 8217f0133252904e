"""Averaged weights: what a training evaluates, saves beside its checkpoints, and ends with."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, broadcast
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from timm.utils import ModelEmaV3
from torch import nn

from dart_hf.files import atomic_write

EMA_FILE = "ema.safetensors"


class WeightAverage:
    """An exponential moving average of a model's weights.

    After every optimizer step `average = decay · average + (1 - decay) · weights`, for the buffers too (running
    statistics of scores and of BatchNorm). The average after the first step is the weights of that step.

    [`DartTrainer`] keeps one when its recipe has an `ema_decay`:

    - Each evaluation during the training runs on the average, so the best checkpoint is the one with the best average.
      The training goes on with the weights as trained.
    - Every checkpoint has the average in `ema.safetensors`, under the model's own names, and the weights as trained in
      `model.safetensors`. A resumed training goes on with both.
    - When the training ends, the model gets the average: of the best checkpoint with `load_best_model_at_end`, else the
      latest. So what is saved then is what was evaluated.

    All processes keep the same average. It is on the model's device and takes as much memory as the model.

    Args:
        model: The model, on its device, with its first weights.
        decay: Weight of the old average in the new one, in [0, 1). The default is DART's and DeiT's.
        warmup: Let the decay grow to its value as (1 + n) / (10 + n) in step n + 2 (the rule of TensorFlow's
            ExponentialMovingAverage). A short training then averages over about its last tenth, and not over its
            beginning. DeiT trains without.

    Raises:
        ValueError: `decay` is out of range; the weights are spread over processes (FSDP, DeepSpeed); or they are in
            half precision, which is too coarse for an average.
    """

    def __init__(self, model: nn.Module, decay: float = 0.99996, warmup: bool = True) -> None:
        check_decay(decay)
        _check_weights(model)
        self._model = model
        self._average = ModelEmaV3(model, decay, use_warmup=warmup, warmup_gamma=9, warmup_power=1)
        self._in_model = False

    def update(self, step: int) -> None:
        """Include the model's weights after optimizer step `step`, counted from 1."""
        self._average.update(self._model, step=step)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Give the model the average inside the block. Blocks may be nested."""
        if self._in_model:
            yield
            return
        self.give_to_model()
        self._in_model = True
        try:
            yield
        finally:
            self._exchange()
            self._in_model = False

    def give_to_model(self) -> None:
        """Give the model the average; the model's own weights are then kept here."""
        # Each process has its own batch statistics. DistributedDataParallel also takes the buffers of process 0.
        broadcast(list(self._average.module.buffers()))
        self._exchange()

    def _exchange(self) -> None:
        for average, weight in zip(
            self._average.module.state_dict().values(), self._model.state_dict().values(), strict=True
        ):
            trained = weight.clone()
            weight.copy_(average)
            average.copy_(trained)

    def save(self, checkpoint: Path) -> None:
        """Write the average into a checkpoint."""
        with atomic_write(checkpoint / EMA_FILE) as unfinished:
            save_model(self._average.module, os.fspath(unfinished), metadata={"format": "pt"})

    def load(self, checkpoint: str | os.PathLike) -> None:
        """Go on with the average of a checkpoint; raises as [`load_average`]."""
        load_average(self._average.module, checkpoint)


def check_decay(decay: float) -> None:
    """Raise a ValueError unless the decay of an average is in [0, 1)."""
    if not 0 <= decay < 1:
        raise ValueError(f"ema_decay must be at least 0 and below 1, got {decay}.")


def load_average(model: nn.Module, checkpoint: str | os.PathLike) -> None:
    """Give a model the average that a training with `ema_decay` left in a checkpoint.

    Raises:
        FileNotFoundError: The checkpoint has no average.
        ValueError: The average is damaged, or another model's.
    """
    path = Path(checkpoint) / EMA_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"The average of the weights, {path}, does not exist: resume a training that had ema_decay, or resume "
            "without ema_decay."
        )
    try:
        load_model(model, path)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"The average of the weights, {path}, is damaged or another model's.") from error


def _check_weights(model: nn.Module) -> None:
    distributed = AcceleratorState().distributed_type
    if distributed in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"ema_decay needs all weights in every process, and {distributed.value} spreads them; train with DDP."
        )
    coarse = {str(weight.dtype) for weight in model.parameters() if weight.dtype.itemsize < 4}
    if coarse:
        raise ValueError(
            f"ema_decay needs weights in float32, got {', '.join(sorted(coarse))}: load the model with "
            "dtype=torch.float32 and train with bf16=True or fp16=True."
        )
