"""Losses for `Trainer`'s `compute_loss_func`: each is the mean over the images of the whole batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from dart_hf.data.collator import IGNORED_LABEL, is_labelled


def soft_target_cross_entropy(
    outputs: Mapping[str, Any] | Sequence[Any],
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Cross entropy against class indices or target probabilities; a `compute_loss_func` of `Trainer`.

    transformers' own loss treats float labels as independent yes-or-no answers (binary cross entropy per class). The
    targets of mixup, cutmix and label smoothing are something else: probabilities of one answer. With this loss,
    `Trainer` trains on such targets and evaluates on class indices. It ignores `label_smoothing_factor`: smooth the
    targets instead.

    Args:
        outputs: What an image classifier returns without labels; its `logits` (B, K) are used.
        labels: (B,) class indices, or (B, K) floating point target probabilities. An image does not count if its label,
            or its whole row, is -100.
        num_items_in_batch: `Trainer`'s count of the label elements other than -100 in the whole batch: all steps of a
            gradient accumulation, which must have labels of one kind, and all processes. Without it the images of
            `labels` are the whole batch.

    Returns:
        The sum over the images of `labels`, divided by the number of images of the whole batch; in float32 at least.

    Raises:
        ValueError: There are no labels, or not one or K per image.
    """
    losses = image_cross_entropy(logits_of(outputs), labels)
    return mean_over_images(losses, labels, num_items_in_batch)


def multi_label_cross_entropy(
    outputs: Mapping[str, Any] | Sequence[Any],
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Binary cross entropy per class, as transformers computes it for `multi_label_classification`.

    Arguments and result as in [`soft_target_cross_entropy`], with `labels` (B, K) from 0 to 1.

    Raises:
        ValueError: `labels` has another shape than the logits.
    """
    logits = logits_of(outputs)
    _check_shape(labels, logits.shape, "multi-label classification")
    losses = binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").mean(dim=1)
    return mean_over_images(losses, labels, num_items_in_batch)


def mean_squared_error(
    outputs: Mapping[str, Any] | Sequence[Any],
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Squared error, as transformers computes it for `regression`.

    Arguments and result as in [`soft_target_cross_entropy`], with `labels` (B, K), or (B,) where K is 1. An image does
    not count if its label is NaN.

    Raises:
        ValueError: `labels` has not K numbers per image.
    """
    logits = logits_of(outputs)
    targets = labels[:, None] if labels is not None and labels.ndim == 1 else labels
    _check_shape(targets, logits.shape, "regression")
    # NaN would spread through the gradient even where the loss does not count.
    losses = mse_loss(logits, targets.nan_to_num().to(logits.dtype), reduction="none").mean(dim=1)
    return mean_over_images(losses, labels, num_items_in_batch)


# `problem_type` of a configuration -> the loss. transformers writes None until it has seen labels.
LOSSES: dict[str | None, Callable[..., torch.Tensor]] = {
    None: soft_target_cross_entropy,
    "single_label_classification": soft_target_cross_entropy,
    "multi_label_classification": multi_label_cross_entropy,
    "regression": mean_squared_error,
}


def logits_of(outputs: Mapping[str, Any] | Sequence[Any]) -> torch.Tensor:
    """The logits (B, K) that a classifier returned, in float32 at least."""
    return at_least_float32(outputs["logits"] if isinstance(outputs, Mapping) else outputs[0])


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in float32, or unchanged if it is more precise."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def image_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Logits (B, K) and labels as in [`soft_target_cross_entropy`] -> (B,). Ignored images may have any value."""
    if labels is None:
        raise ValueError("A batch must have labels, got none.")
    expected = logits.shape if labels.is_floating_point() else logits.shape[:1]
    if labels.shape != expected:
        raise ValueError(
            f"labels must have shape {tuple(logits.shape[:1])} (integers) or {tuple(logits.shape)} (floating point) "
            f"for logits of shape {tuple(logits.shape)}, got {tuple(labels.shape)} in {labels.dtype}."
        )
    targets = labels.to(logits.dtype) if labels.is_floating_point() else labels.long()
    return cross_entropy(logits, targets, ignore_index=IGNORED_LABEL, reduction="none")


def mean_over_images(
    losses: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Losses of images (B,) -> their part of the mean over the whole batch; 0 where no image counts.

    `labels` and `num_items_in_batch` are those of [`soft_target_cross_entropy`].
    """
    counted = is_labelled(labels)
    if num_items_in_batch is None:
        num_images = counted.sum()
    else:
        # Under nn.DataParallel there is one entry per device, and `Trainer` scales the loss so that their sum is right.
        num_items = torch.as_tensor(num_items_in_batch, device=losses.device).sum()
        num_images = num_items / labels.shape[1] if labels.ndim == 2 else num_items
    return torch.where(counted, losses, 0).sum() / num_images.clamp(min=1)


def _check_shape(labels: torch.Tensor | None, expected: torch.Size, task: str) -> None:
    if labels is None:
        raise ValueError("A batch must have labels, got none.")
    if labels.shape != expected or not labels.is_floating_point():
        raise ValueError(
            f"labels for {task} must be floating point of shape {tuple(expected)}, got {tuple(labels.shape)} in "
            f"{labels.dtype}."
        )
