"""Score statistics: logits -> standardised logits, so that the scores of all images have the same range."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

STANDARDIZATION_EPSILON = 1e-8
STATISTICS_MOMENTUM = 0.1


class ScoreStatistics(nn.Module):
    """Standardises logits with the mean and standard deviation of the batch, of past batches, or of each image."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(()))
        self.register_buffer("running_var", torch.ones(()))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self._batch_checked = False
        self._running_checked = False

    def forward(self, logits: Tensor, normalization: str) -> Tensor:
        """Standardise logits.

        Args:
            logits: (B, G, G).
            normalization: `"running"`, `"image"` or `"batch"`; see [`RegionConfig`].

        Returns:
            (B, G, G). An image with constant, infinite or NaN logits gets zeros and enters no statistics.
        """
        # Squares beyond this bound overflow when they are summed. A NaN fails every comparison.
        bound = torch.finfo(logits.dtype).max ** 0.25
        lowest, highest = logits.detach().amin(dim=(1, 2)), logits.detach().amax(dim=(1, 2))
        usable = ((lowest < highest) & (lowest > -bound) & (highest < bound))[:, None, None]
        logits = torch.where(usable, logits, 0)

        if normalization == "image":
            mean, variance = image_moments(logits)
        elif self.training:
            mean, variance, count = batch_moments(logits, usable, _sum_over_processes)
            self._track(mean.detach(), variance.detach(), count > 0)
        elif normalization == "batch":
            self._warn_of_neighbours(logits.shape[0])
            mean, variance, _ = batch_moments(logits, usable)
        else:
            self._warn_of_missing_statistics()
            mean, variance = self._running_moments(logits)
        # The smallest normal number keeps the root's gradient finite.
        deviation = variance.clamp(min=torch.finfo(variance.dtype).tiny).sqrt()
        return torch.where(usable, (logits - mean) / (deviation + STANDARDIZATION_EPSILON), 0)

    def _track(self, mean: Tensor, variance: Tensor, any_usable: Tensor) -> None:
        # The first batch replaces the initial values, which describe nothing.
        momentum = torch.where(self.num_batches_tracked > 0, STATISTICS_MOMENTUM, 1.0) * any_usable
        momentum = momentum.view(()).to(self.running_mean.dtype)
        self.running_mean.lerp_(mean.view(()).to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.view(()).to(self.running_var.dtype), momentum)
        self.num_batches_tracked.add_(any_usable.view(()))

    def _running_moments(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        tracked = self.num_batches_tracked > 0
        mean, variance = image_moments(logits)
        mean = torch.where(tracked, self.running_mean.to(mean.dtype), mean)
        return mean, torch.where(tracked, self.running_var.to(variance.dtype), variance)

    def _warn_of_neighbours(self, batch_size: int) -> None:
        if not torch.compiler.is_compiling() and batch_size > 1 and not self._batch_checked:
            self._batch_checked = True
            logger.warning(
                "score_normalization='batch' (the published rule) makes an image's prediction depend on the other "
                "images of its batch. Set model.config.score_normalization to 'image', or fine-tune with 'running'."
            )

    def _warn_of_missing_statistics(self) -> None:
        # Once per model: reading the counter waits for the device. A compiled model would be compiled again after it.
        if not (torch.compiler.is_compiling() or self._running_checked or self.num_batches_tracked.is_meta):
            self._running_checked = True
            if self.num_batches_tracked.item() == 0:
                logger.warning(
                    "score_normalization='running' has no statistics before the first training step. Until then each "
                    "image is standardised by its own."
                )


def image_moments(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of each image: (B, G, G) -> (B, 1, 1), (B, 1, 1)."""
    mean = logits.mean(dim=(1, 2), keepdim=True)
    squares = (logits - mean).square().sum(dim=(1, 2), keepdim=True)
    return mean, squares / max(logits[0].numel() - 1, 1)


def batch_moments(
    logits: Tensor, usable: Tensor, sum_over_processes: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, unbiased variance and number of the usable images' cells, each (1, 1, 1).

    Args:
        logits: (B, G, G), zero where not usable.
        usable: (B, 1, 1), bool.
        sum_over_processes: Sums a tensor over all processes. By default there is one process.
    """
    count = (usable.sum() * logits[0].numel()).to(logits.dtype).view(1, 1, 1)
    count, total = sum_over_processes(torch.stack([count, logits.sum().view(1, 1, 1)]))
    mean = total / count.clamp(min=1)
    squares = torch.where(usable, (logits - mean).square(), 0).sum().view(1, 1, 1)
    return mean, sum_over_processes(squares) / (count - 1).clamp(min=1), count


def _sum_over_processes(tensor: Tensor) -> Tensor:
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        return _AllReduceSum.apply(tensor)
    return tensor


class _AllReduceSum(torch.autograd.Function):
    """The sum over all processes, with its gradient. torch's own is deprecated."""

    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        distributed.all_reduce(tensor)
        return tensor

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return _AllReduceSum.apply(gradient)
