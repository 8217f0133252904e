"""Losses for `Trainer`'s `compute_loss_func`: means over the images of the whole batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

# What `Trainer` and torch's cross entropy take for "no label".
IGNORED = -100


def soft_target_cross_entropy(
    outputs: Mapping[str, Any] | Sequence[Any],
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Cross entropy against class indices or target probabilities; a `compute_loss_func` of `Trainer`.

    transformers' own loss takes float labels for independent yes-or-no answers (binary cross entropy per class), which
    the targets of mixup, cutmix and label smoothing are not. With this one, `Trainer` trains on such targets and
    evaluates on class indices. It then ignores `label_smoothing_factor`: smooth the targets themselves. (transformers
    before 5.6 divides any accumulated loss once too often; `trainer.accelerator.gradient_accumulation_steps = 1` stops
    that.)

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
    logits = logits_of(outputs)
    return mean_over_images(image_cross_entropy(logits, labels), labels, num_items_in_batch)


def logits_of(outputs: Mapping[str, Any] | Sequence[Any]) -> torch.Tensor:
    """The logits (B, K) that a classifier returned, in float32 at least."""
    return at_least_float32(outputs["logits"] if isinstance(outputs, Mapping) else outputs[0])


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in float32, or as it is if that is more precise."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def image_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Logits (B, K) and labels as in [`soft_target_cross_entropy`] -> (B,), whatever it may be for those ignored."""
    if labels is None:
        raise ValueError("A batch must have labels, got none.")
    expected = logits.shape if labels.is_floating_point() else logits.shape[:1]
    if labels.shape != expected:
        raise ValueError(
            f"labels must have shape {tuple(logits.shape[:1])} (integers) or {tuple(logits.shape)} (floating point) "
            f"for logits of shape {tuple(logits.shape)}, got {tuple(labels.shape)} in {labels.dtype}."
        )
    targets = labels.to(logits.dtype) if labels.is_floating_point() else labels.long()
    return cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")


def mean_over_images(
    losses: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Losses of images (B,) -> their part of the mean over the whole batch; 0 where no image counts.

    `labels` and `num_items_in_batch` are those of [`soft_target_cross_entropy`].
    """
    soft = labels.is_floating_point()
    counted = labels.ne(IGNORED).all(dim=1) if soft else labels.ne(IGNORED)
    if num_items_in_batch is None:
        num_images = counted.sum()
    else:
        # Under nn.DataParallel there is one entry per device, and `Trainer` scales the loss so that their sum is right.
        num_items = torch.as_tensor(num_items_in_batch, device=losses.device).sum()
        num_images = num_items / labels.shape[1] if soft else num_items
    return torch.where(counted, losses, 0).sum() / num_images.clamp(min=1)
