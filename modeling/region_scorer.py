"""Scorer: pixel values -> scores. A convolutional trunk, a head, and a standardisation."""

from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import gelu, interpolate
from transformers.utils import logging
from transformers.utils.generic import maybe_autocast

from .configuration_region import RegionConfig
from .score_statistics import ScoreStatistics
from .scorer_trunk import build_trunk, run_frozen
from .scorer_weights import download_trunk_weights, read_state_dict, select_trunk_weights

logger = logging.get_logger(__name__)

HEAD_HIDDEN_SIZE = 96


class RegionScorer(nn.Module):
    """Scores every cell of a G×G grid over the image: the higher, the smaller the regions there.

    It stays in float32 at least when the model around it is cast to half precision or runs under autocast: the noise
    of half precision in the scores would move region edges by tens of pixels.
    """

    def __init__(self, config: RegionConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk, num_features = build_trunk(config)
        if config.scorer_head == "v1":
            hidden_size = num_features if config.scorer.startswith("mobilenet") else HEAD_HIDDEN_SIZE
            self.head: nn.Module = PerCellHead(num_features, hidden_size)
        else:
            self.head = ChannelGateHead(num_features)
        self.statistics = ScoreStatistics()
        # Whether the trunk holds weights that were loaded or trained: 0 or 1, in a buffer, so that a checkpoint tells.
        self.register_buffer("trunk_loaded", torch.tensor(0))
        self._trunk_checked = False
        self._built_on_meta = next(self.trunk.parameters()).is_meta
        # transformers' initialisation would overwrite what the trunk's own library does.
        for module in self.trunk.modules():
            module._is_hf_initialized = True
        self.set_frozen(config.scorer_frozen)
        # Where the model is built in half precision.
        self.to(torch.promote_types(self.head.fc1.weight.dtype, torch.float32))

    def set_frozen(self, frozen: bool) -> None:
        """Keep the trunk in evaluation mode and without gradient, or let it train."""
        self.config.scorer_frozen = frozen
        self.trunk.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> "RegionScorer":
        super().train(mode)
        if self.config.scorer_frozen:
            self.trunk.eval()
        return self

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> scores (B, G, G) in float32 at least.

        An image whose logits are constant, infinite or NaN gets constant scores. In training, one with infinite or NaN
        pixels counts as a grey image in the BatchNorm of a trunk that is not frozen.
        """
        self._warn_of_dead_trunk()
        with maybe_autocast(pixel_values.device.type, enabled=False):
            # A replica of nn.DataParallel has no parameters() to ask.
            weight = next(self.trunk.parameters(), self.statistics.running_mean)
            features, finite = self.features(pixel_values.to(weight.dtype))
            logits = torch.where(finite, self.head(features), torch.nan)
            # FSDP's mixed precision casts the weights all the same.
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            grid_size = self.config.score_grid_size
            if logits.shape[1:] != (grid_size, grid_size):
                grid = (grid_size, grid_size)
                logits = interpolate(logits[:, None], grid, mode="bilinear", align_corners=False)[:, 0]
            return self.head.squash(self.statistics(logits, self.config.score_normalization))

    def features(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, C, H, W) -> the trunk's map (B, F, h, w), and which images it is finite for, (B, 1, 1).

        Where it is not, zeros take the place of the map, or, if the trunk trains, of the image: a NaN would spread
        through the head's gradient to its weights, and through BatchNorm to the other images.
        """
        if self.config.scorer_frozen:
            features, finite = zero_unless_finite(run_frozen(self.trunk, self.config.scorer, pixel_values))
        elif self.training:
            self.trunk_loaded.fill_(1)
            pixel_values, finite = zero_unless_finite(pixel_values)
            features = self.trunk(pixel_values)
        else:
            features, finite = zero_unless_finite(self.trunk(pixel_values))
        return features, finite[..., 0]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "RegionScorer":
        def keep_precision(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if moved.is_floating_point() and moved.dtype.itemsize < 4:
                return tensor.to(device=moved.device)
            return moved

        return super()._apply(keep_precision, recurse)

    def load_pretrained_trunk(self, source: str | Path | None = None) -> None:
        """Give the trunk ImageNet weights.

        Args:
            source: A local `.safetensors` file or pickled state dict (read without executing anything) of the whole
                torchvision or timm model, or of the trunk alone. Without it the library downloads its default weights.

        Raises:
            FileNotFoundError: `source` does not exist.
            OSError: The download failed.
            ValueError: The "conv" trunk has no pretrained weights; or the file lacks a tensor, or has it in another
                shape.
        """
        name = self.config.scorer
        if name == "conv":
            raise ValueError("scorer='conv' has no pretrained weights: it is trained with the model.")
        if source is not None:
            weights = select_trunk_weights(read_state_dict(Path(source)), name, self.trunk.state_dict(), str(source))
        else:
            try:
                weights = download_trunk_weights(self.config, self.trunk.state_dict())
            except OSError as error:
                raise OSError(
                    f"The ImageNet weights of scorer={name!r} could not be downloaded ({error}); give a local file: "
                    "model.load_pretrained_scorer('weights.pth')."
                ) from error
        self.trunk.load_state_dict(weights)
        self.trunk_loaded.fill_(1)

    def initialize_trunk(self) -> None:
        """Leave a trunk as its own library makes it, or make it so where it was built without memory."""
        if self._built_on_meta:
            tensors = self.trunk.state_dict(keep_vars=True)
            self.initialize_missing_weights(
                {name for name, tensor in tensors.items() if not getattr(tensor, "_is_hf_initialized", False)}
            )

    @torch.no_grad()
    def initialize_missing_weights(self, missing: Collection[str]) -> None:
        """Initialise as the trunk's own library does what no checkpoint has given the trunk.

        Args:
            missing: Names of the trunk's tensors that were not loaded.
        """
        persistent = self.trunk.state_dict()
        # Computed when the trunk is built, and lost where it was built without memory.
        computed = [name for name, _ in self.trunk.named_buffers() if name not in persistent]
        if not missing and not (computed and self._built_on_meta):
            return
        fresh = build_trunk(self.config)[0]
        initial = fresh.state_dict()
        for name in missing:
            persistent[name].copy_(initial[name])
        for name in computed:
            self.trunk.get_buffer(name).copy_(fresh.get_buffer(name))
        if missing:
            # Whatever the checkpoint says of the trunk that it was saved from: this one lacks weights.
            self.trunk_loaded.zero_()

    def _warn_of_dead_trunk(self) -> None:
        # Once per model: reading the flag waits for the device.
        if torch.compiler.is_compiling() or self._trunk_checked or self.trunk_loaded.is_meta:
            return
        self._trunk_checked = True
        if self.is_dead:
            logger.warning(DEAD_SCORER.format(scorer=self.config.scorer))

    @property
    def is_dead(self) -> bool:
        """Whether the trunk is frozen without ever having got weights."""
        return bool(self.config.scorer_frozen) and self.trunk_loaded.item() == 0


DEAD_SCORER = (
    "The scorer is dead: its trunk {scorer!r} is frozen and has random weights, so the regions do not follow the "
    "image; load a checkpoint, call model.load_pretrained_scorer(), or let it train with model.freeze_scorer(False)."
)


class PerCellHead(nn.Module):
    """v1: a logit per cell from that cell's features."""

    def __init__(self, num_features: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(num_features, hidden_size)
        self.fc2 = nn.Linear(hidden_size, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, F, h, w) -> logits (B, h, w)."""
        return self.fc2(gelu(self.fc1(features.permute(0, 2, 3, 1)))).squeeze(-1)

    @staticmethod
    def squash(standardized: torch.Tensor) -> torch.Tensor:
        """Standardised logits -> scores in (0.1, 1.1)."""
        return standardized.sigmoid() + 0.1


class ChannelGateHead(nn.Module):
    """v2: the features summed over the channels, each weighted by a gate that the whole image decides on."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(num_features, HEAD_HIDDEN_SIZE)
        self.fc2 = nn.Linear(HEAD_HIDDEN_SIZE, num_features)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, F, h, w) -> logits (B, h, w)."""
        gate = self.fc2(gelu(self.fc1(features.mean(dim=(2, 3))))).sigmoid()
        return (features * gate[:, :, None, None]).sum(dim=1)

    @staticmethod
    def squash(standardized: torch.Tensor) -> torch.Tensor:
        """Standardised logits -> scores in (0, 1)."""
        return (2 * standardized).sigmoid()


def zero_unless_finite(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, C, H, W) with zeros for an image that is not finite throughout; and which ones are, (B, 1, 1, 1)."""
    finite = tensor.detach().sum(dim=(1, 2, 3), dtype=torch.float32, keepdim=True).isfinite()
    return torch.where(finite, tensor, 0), finite
