"""Distillation (DeiT, arXiv 2012.12877): a student learns from its labels and from a frozen teacher."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel

from dart_hf.data.labels import class_names, match_labels
from dart_hf.training.losses import at_least_float32, image_cross_entropy, logits_of, mean_over_images
from dart_hf.training.teacher import Teacher


class DistillationLoss:
    """Labels and a teacher in one loss: `(1 - alpha) * L(labels) + alpha * L(teacher)`.

    Both parts are means over the images of the whole batch, as in [`soft_target_cross_entropy`]. A student with a
    distillation head learns from the labels through the class token, and from the teacher through that head.

    [`DartTrainer`] uses it in training steps when its recipe has a `teacher`, and evaluates on the labels alone.

    Args:
        teacher: Moved to the student's device when it is first needed.
        student: The model that trains.
        image_mean, image_std: What the student's image processor normalises with, per channel.
        kind: `"soft"`: Kullback-Leibler divergence from the teacher's probabilities at `temperature`, times the square
            of the temperature (equation 2; the authors' code divides by the number of classes too). `"hard"`: cross
            entropy against the teacher's answer (equation 3).
        alpha: Weight of the teacher, from 0 to 1.
        temperature: Temperature of `"soft"`, above 0.

    Raises:
        ValueError: An argument is out of range, or student and teacher have different labels.
    """

    def __init__(
        self,
        teacher: Teacher,
        student: PreTrainedModel,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        kind: Literal["soft", "hard"] = "soft",
        alpha: float = 0.5,
        temperature: float = 1.0,
    ) -> None:
        if kind not in ("soft", "hard"):
            raise ValueError(f"kind must be 'soft' or 'hard', got {kind!r}.")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be from 0 to 1, got {alpha}.")
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature}.")
        for name, values in (("image_mean", image_mean), ("image_std", image_std)):
            if len(values) != 3:
                raise ValueError(f"{name} must have 3 values because a teacher reads RGB images, got {values}.")
        self.teacher = teacher
        self.kind = kind
        self.alpha = alpha
        self.temperature = temperature
        self._mean = torch.tensor(image_mean)[:, None, None]
        self._std = torch.tensor(image_std)[:, None, None]
        self._label_order = label_order(student, teacher)

    def __call__(
        self,
        outputs: Mapping[str, Any],
        labels: torch.Tensor,
        pixel_values: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The loss of a training step.

        Args:
            outputs: What the student returned for `pixel_values`.
            pixel_values: (B, 3, H, W), normalised for the student.
            labels, num_items_in_batch: As in [`soft_target_cross_entropy`].
        """
        class_logits, distilled_logits = self._heads(outputs)
        losses = (1 - self.alpha) * image_cross_entropy(class_logits, labels)
        losses = losses + self.alpha * self._teacher_losses(distilled_logits, self._ask_teacher(pixel_values))
        return mean_over_images(losses, labels, num_items_in_batch)

    @staticmethod
    def _heads(outputs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits that learn from the labels, and the logits that learn from the teacher."""
        if outputs.get("distillation_logits") is None:
            logits = logits_of(outputs)
            return logits, logits
        return at_least_float32(outputs["cls_logits"]), at_least_float32(outputs["distillation_logits"])

    def _ask_teacher(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The student's pixel values (B, 3, H, W) -> the teacher's logits (B, K), in the student's order of labels."""
        device = pixel_values.device
        if self._mean.device != device or self.teacher.offset.device != device:
            self.teacher.to(device)
            self._mean, self._std = self._mean.to(device), self._std.to(device)
        logits = self.teacher(pixel_values.float() * self._std + self._mean)
        return logits[:, self._label_order]

    def _teacher_losses(self, logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
        """Logits (B, K) of both -> (B,)."""
        if self.kind == "hard":
            return cross_entropy(logits, teacher_logits.argmax(dim=1), reduction="none")
        student, teacher = ((each / self.temperature).log_softmax(dim=1) for each in (logits, teacher_logits))
        return self.temperature**2 * kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)


def label_order(student: PreTrainedModel, teacher: Teacher) -> list[int]:
    """The index of each label of the student among the teacher's labels, see [`match_labels`].

    Raises:
        ValueError: They have different numbers of labels, or both have names and the names differ.
    """
    names = class_names(student)
    if len(names) != len(teacher.label_names):
        raise ValueError(
            f"The teacher must have the student's {len(names)} labels, got one with {len(teacher.label_names)}."
        )
    try:
        return match_labels(names, teacher.label_names)
    except ValueError as error:
        raise ValueError(f"The teacher must have the student's labels: {error}") from error
