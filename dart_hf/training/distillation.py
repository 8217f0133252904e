"""Distillation (DeiT, arXiv 2012.12877): a frozen teacher that a student learns from beside its labels."""

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import timm
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy, interpolate, kl_div
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel
from transformers.utils.generic import is_timm_local_checkpoint

from dart_hf.data.labels import class_names, match_labels, placeholders
from dart_hf.training.losses import (
    at_least_float32,
    image_cross_entropy,
    logits_of,
    mean_over_images,
    soft_target_cross_entropy,
)

# No preprocessing produces images of this side unless it leaves their size alone.
PROBE_SIDE = 333


class Teacher(nn.Module):
    """A frozen image classifier behind its own preprocessing: images (B, 3, H, W) from 0 to 1 -> logits (B, K).

    Of the preprocessing it keeps the input size and the arithmetic on colours. Images come augmented and cropped
    already, so those of another size are resized as a whole.

    Args:
        model: Takes pixel values, returns logits or outputs that have them.
        preprocess: Makes the pixel values (3, h, w) of one image, a PIL image.
        label_names: Of the K classes in order; `LABEL_<i>`, transformers' placeholder, where they have no names.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: Callable[[Image.Image], torch.Tensor],
        label_names: Sequence[str],
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.label_names = list(label_names)
        # Rescaling, normalising and swapping channels make an affine map of the colours, which four of them tell.
        probes = [preprocess(Image.new("RGB", (PROBE_SIDE,) * 2, name)) for name in ("black", "red", "lime", "blue")]
        height, width = probes[0].shape[1:]
        self.size = None if (height, width) == (PROBE_SIDE, PROBE_SIDE) else (height, width)
        black, *primaries = (probe[:, height // 2, width // 2].float() for probe in probes)
        self.register_buffer("offset", black[:, None, None])
        self.register_buffer("colors", torch.stack(primaries, dim=1) - black[:, None])

    @classmethod
    def load(cls, source: str | os.PathLike, dtype: torch.dtype | None = None) -> "Teacher":
        """Load a trained classifier.

        Args:
            source: `timm/<name>` for a pretrained timm model; a folder that timm saved, also as `local-dir:<folder>`;
                or the folder or Hub id of any image classifier of transformers, DART among them.
            dtype: Of its weights; as saved without it.

        Raises:
            OSError: The model or its image processor is missing or cannot be fetched.
            ValueError: There is no such timm model, or it is no classifier with trained weights.
        """
        source = os.fspath(source)
        if is_timm_local_checkpoint(source):
            source = f"local-dir:{source}"
        try:
            is_timm = source.startswith(("timm/", "local-dir:"))
            teacher = cls._load_timm(source.removeprefix("timm/")) if is_timm else cls._load_transformers(source)
        except OSError as error:
            raise OSError(f"teacher={source!r} cannot be loaded: {_first_line(error)}") from error
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"teacher={source!r} cannot be used: {_first_line(error)}") from error
        if dtype is not None:
            teacher.model.to(dtype)
        return teacher

    @classmethod
    def _load_timm(cls, name: str) -> "Teacher":
        model = timm.create_model(name, pretrained=True)
        if model.num_classes < 1:
            raise ValueError("it has no classifier.")
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
        names = model.pretrained_cfg.get("label_names") or placeholders(model.num_classes)
        return cls(model, transform, names)

    @classmethod
    def _load_transformers(cls, source: str) -> "Teacher":
        model, info = AutoModelForImageClassification.from_pretrained(
            source, output_loading_info=True, trust_remote_code=False
        )
        if info["missing_keys"]:
            raise ValueError(f"its checkpoint lacks weights ({', '.join(sorted(info['missing_keys'])[:3])}).")
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)

        def preprocess(image: Image.Image) -> torch.Tensor:
            return processor(image, return_tensors="pt")["pixel_values"][0]

        return cls(model, preprocess, class_names(model))

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) from 0 to 1 -> logits (B, K) in float32 at least."""
        if self.size is not None and images.shape[2:] != self.size:
            images = interpolate(images, self.size, mode="bicubic", antialias=True)
        pixel_values = torch.einsum("dc,bchw->bdhw", self.colors, images) + self.offset
        outputs = self.model(pixel_values.to(next(self.model.parameters()).dtype))
        return at_least_float32(outputs) if isinstance(outputs, torch.Tensor) else logits_of(outputs)


class DistillationLoss:
    """Labels and a teacher in one loss; a `compute_loss_func` of `Trainer`.

    In training `(1 - alpha) * L(labels) + alpha * L(teacher)`, both as means over the images of the whole batch as in
    [`soft_target_cross_entropy`], which alone is the loss in evaluation, where the teacher does not run. A student with
    a distillation head learns from the labels through the class token and from the teacher through that head.

    A hook on the student keeps the pixel values of a training step until the loss needs them, because `Trainer` passes
    a loss none. `close()` takes it off; so does the end of this object's life. Copies of the student are without it.

    Args:
        teacher: Moved to the student's device when it is first needed.
        student: The model that `Trainer` gets.
        image_mean, image_std: What the student's image processor normalises with, per channel.
        kind: `"soft"`: Kullback-Leibler divergence from the teacher's probabilities at `temperature`, times its square
            (equation 2; the authors' code divides by the number of classes too). `"hard"`: cross entropy against the
            teacher's answer (equation 3).
        alpha: Weight of the teacher, from 0 to 1.
        temperature: Of `"soft"`, above 0.

    Raises:
        ValueError: An argument is out of range, or student and teacher have different labels.

    Example:

    ```python
    >>> distillation = DistillationLoss(
    ...     Teacher.load("timm/regnety_160.deit_in1k"), model, processor.image_mean, processor.image_std, kind="hard"
    ... )
    >>> trainer = Trainer(model, args, train_dataset=dataset, compute_loss_func=distillation)
    ```
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
        self.student = student
        self.kind = kind
        self.alpha = alpha
        self.temperature = temperature
        self._mean = torch.tensor(image_mean)[:, None, None]
        self._std = torch.tensor(image_std)[:, None, None]
        self._label_order = label_order(student, teacher)
        self._pixels = PixelMemory()
        hook = student.register_forward_pre_hook(self._pixels, with_kwargs=True)
        self._remove_hook = weakref.finalize(self, hook.remove)

    def close(self) -> None:
        """Take the hook off the student."""
        self._remove_hook()

    def __call__(
        self,
        outputs: Mapping[str, Any],
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The loss; arguments and result as in [`soft_target_cross_entropy`].

        Raises:
            ValueError: See [`soft_target_cross_entropy`].
            RuntimeError: The outputs are of a training step, but not of one whose images the student was seen to get.
        """
        pixel_values = self._pixels.take()
        if not outputs["logits"].requires_grad or not self.student.training:
            return soft_target_cross_entropy(outputs, labels, num_items_in_batch)
        if pixel_values is None or pixel_values.shape[0] != outputs["logits"].shape[0]:
            raise RuntimeError(
                "DistillationLoss did not see the images of this training step: give Trainer the student itself, and "
                "run one process per GPU (accelerate launch or torchrun)."
            )
        class_logits, distilled_logits = self._heads(outputs)
        losses = (1 - self.alpha) * image_cross_entropy(class_logits, labels)
        losses = losses + self.alpha * self._teacher_losses(distilled_logits, self._ask_teacher(pixel_values))
        return mean_over_images(losses, labels, num_items_in_batch)

    @staticmethod
    def _heads(outputs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits that the labels teach and those that the teacher does."""
        if outputs.get("distillation_logits") is None:
            logits = logits_of(outputs)
            return logits, logits
        return at_least_float32(outputs["cls_logits"]), at_least_float32(outputs["distillation_logits"])

    def _ask_teacher(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The student's pixel values (B, 3, H, W) -> the teacher's logits (B, K), the student's labels in order."""
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


class PixelMemory:
    """A forward pre-hook that keeps a model's `pixel_values` when it is called to train, until they are taken.

    Args:
        awake: Whether it keeps anything. The copies that come with copies of the model do not.
    """

    def __init__(self, awake: bool = True) -> None:
        self.awake = awake
        self.pixel_values: torch.Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.awake and module.training and torch.is_grad_enabled():
            self.pixel_values = args[0] if args else kwargs.get("pixel_values")

    def take(self) -> torch.Tensor | None:
        """The pixel values of the last call, once."""
        pixel_values, self.pixel_values = self.pixel_values, None
        return pixel_values

    def __reduce__(self) -> tuple[type["PixelMemory"], tuple[bool]]:
        return PixelMemory, (False,)


def label_order(student: PreTrainedModel, teacher: Teacher) -> list[int]:
    """For each label of the student its index in the teacher, see [`match_labels`].

    Raises:
        ValueError: They do not have the same number of labels, or both have names and not the same ones.
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


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
