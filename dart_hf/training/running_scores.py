"""The score normalisation of a model that is trained."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modeling_utils import PreTrainedModel


class RunningScoresCallback(TrainerCallback):
    """Turns a model's score normalisation from "batch" to "running" when its training begins.

    A converted checkpoint starts with the published rule, "batch". Both rules compute the same in training. The trained
    model's predictions then no longer depend on the other images of their batch. [`DartTrainer`] has this callback
    already; a stock `Trainer` needs it.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        if getattr(model.config, "score_normalization", None) == "batch":
            model.config.score_normalization = "running"
