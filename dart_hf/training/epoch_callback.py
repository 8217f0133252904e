"""The callback that tells a training data set its epoch."""

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class EpochCallback(TrainerCallback):
    """Tells [`SeededRows`] which epoch begins: accelerate does so only with several processes."""

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: torch.utils.data.DataLoader | None = None,
        **kwargs: Any,
    ) -> None:
        set_epoch = getattr(getattr(train_dataloader, "dataset", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(int(state.epoch))
