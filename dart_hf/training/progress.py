"""Progress of a training: a bar on a terminal, a few lines in a log file."""

import sys
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

# Lines of each kind that a log file gets for a whole training.
NUM_LINES = 10
# The metric to show, by its key in an evaluation's log.
SHOWN_METRICS = {
    "eval_accuracy": "accuracy {:.1%}",
    "eval_mean_average_precision": "mean average precision {:.1%}",
    "eval_mean_absolute_error": "mean absolute error {:.4g}",
}


def progress_callback() -> "LossBar | LossLines":
    """[`LossBar`] if the error output is a terminal, else [`LossLines`]."""
    return LossBar() if sys.stderr.isatty() else LossLines()


def metric_text(metrics: dict[str, float]) -> str | None:
    """The main metric of an evaluation for a reader, such as "accuracy 56.1%"; None if there is none."""
    return next((text.format(metrics[name]) for name, text in SHOWN_METRICS.items() if name in metrics), None)


class LossBar(ProgressCallback):
    """`Trainer`'s progress bar with the loss in it, and a line for each evaluation instead of printed dicts."""

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
        if metric := metric_text(logs):
            self.training_bar.write(f"step {state.global_step}: {metric}")

    def close(self) -> None:
        """Leave the line of the bar when a training breaks off."""
        for bar in (self.prediction_bar, self.training_bar):
            if bar is not None:
                bar.close()


class LossLines(TrainerCallback):
    """About ten lines with the loss, and as many with the metric, for a whole training."""

    def __init__(self) -> None:
        self._printed = {"loss": 0, "metric": 0}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        kind = "loss" if "loss" in logs else "metric"
        text = f"loss {float(logs['loss']):.2f}" if "loss" in logs else metric_text(logs)
        part = NUM_LINES * state.global_step // max(state.max_steps, 1)
        if text is not None and part > self._printed[kind]:
            self._printed[kind] = part
            print(f"step {state.global_step} of {state.max_steps}: {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing to do: lines end by themselves."""
