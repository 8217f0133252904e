"""Mixup, cutmix and label smoothing of a training batch."""

import torch
from torch import nn
from torchvision.transforms import v2


class MixImages:
    """Mixup (arXiv 1710.09412) or cutmix (arXiv 1905.04899) of a batch by torchvision, and smoothed targets.

    Args:
        num_labels: Number of classes.
        mixup, cutmix: Parameters of their Beta distributions; 0 turns one off. With both, half of the batches get each
            on average.
        label_smoothing: Share of each target that is spread over all classes.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, num_labels: int, mixup: float = 0.0, cutmix: float = 0.0, label_smoothing: float = 0.0) -> None:
        for name, value in (("mixup", mixup), ("cutmix", cutmix)):
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}.")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}.")
        self.num_labels = num_labels
        self.label_smoothing = label_smoothing
        mixes = [
            kind(alpha=alpha, num_classes=num_labels)
            for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix))
            if alpha
        ]
        self.mix = v2.RandomChoice(mixes) if mixes else None

    def __call__(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix images (B, C, H, W) with their neighbours; labels (B,) become targets (B, num_labels) in float32."""
        if self.mix is None:
            targets = nn.functional.one_hot(labels, self.num_labels).float()
        else:
            pixel_values, targets = self.mix(pixel_values, labels)
        return pixel_values, targets * (1 - self.label_smoothing) + self.label_smoothing / self.num_labels
