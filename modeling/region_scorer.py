"""Scorer: pixel values -> scores. A trunk, a head, and the standardisation of its logits."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate
from transformers import initialization as init
from transformers.utils import logging
from transformers.utils.generic import maybe_autocast

from .configuration_region import SCORERS_WITHOUT_TRUNK, RegionConfig
from .score_statistics import ScoreStatistics
from .scorer_trunk import build_trunk, run_frozen
from .scorer_weights import download_trunk_weights, read_state_dict, select_trunk_weights

logger = logging.get_logger(__name__)

# (B, C, H, W) and a number of layers -> a map (B, D, G, G).
Look = Callable[[Tensor, int], Tensor]

HEAD_HIDDEN_SIZE = 96
# Scorers without pretrained weights, and why.
WITHOUT_WEIGHTS = {
    "conv": "it is trained with the model",
    "detail": "it computes the local contrast",
    "encoder": "it reads the model's own first layers",
}
DEAD_SCORER = (
    "The scorer is dead: its trunk {scorer!r} is frozen and has random weights, so the regions do not follow the "
    "image; load a checkpoint, call model.load_pretrained_scorer(), or let it train with model.freeze_scorer(False)."
)


class RegionScorer(nn.Module):
    """Scores every cell of a G×G grid over the image: the higher the score, the smaller the regions there.

    The scorer stays in float32 at least when the model around it is cast to half precision or runs under autocast:
    rounding errors of half precision in the scores would move region edges by tens of pixels.
    """

    def __init__(self, config: RegionConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk, num_features = build_trunk(config)
        if config.scorer == "detail":
            self.head: nn.Module = DetailHead()
        elif config.scorer_head == "v1":
            hidden_size = num_features if config.scorer.startswith("mobilenet") else HEAD_HIDDEN_SIZE
            self.head = PerCellHead(num_features, hidden_size)
        else:
            self.head = ChannelGateHead(num_features)
        self.statistics = ScoreStatistics()
        # 1 if the trunk's weights were loaded or trained, else 0. A buffer, so that a checkpoint keeps it.
        self.register_buffer("trunk_loaded", torch.tensor(0))
        self._trunk_checked = False
        self._built_on_meta = self.trunk_loaded.is_meta
        self.register_load_state_dict_pre_hook(adopt_running_rule)
        self.set_frozen(config.scorer_frozen)
        # The model may be built in half precision: `_apply` raises it.
        self.to(next(self.head.parameters()).dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RegionScorer":
        """Move or cast the scorer, as torch does for every module, but to no precision below float32."""

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.is_floating_point() and moved.dtype.itemsize < 4:
                return tensor.to(moved.device, torch.promote_types(tensor.dtype, torch.float32))
            return moved

        return super()._apply(keep_precision, recurse)

    def set_frozen(self, frozen: bool) -> None:
        """Keep the trunk in evaluation mode and without gradient, or let it train; no effect without a trunk."""
        self.config.scorer_frozen = frozen or self.config.scorer in SCORERS_WITHOUT_TRUNK
        self.trunk.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> "RegionScorer":
        super().train(mode)
        if self.config.scorer_frozen:
            self.trunk.eval()
        return self

    def forward(self, pixel_values: Tensor, look: Look | None = None) -> Tensor:
        """(B, C, H, W) -> scores (B, G, G) in float32 at least.

        An image whose logits are constant, infinite or NaN gets constant scores. When a trunk trains, its BatchNorm
        sees zeros in place of an image with infinite or NaN pixels.

        Args:
            pixel_values: Floating point, normalised.
            look: The model's method [`RegionPreTrainedModel.look`]. Only `scorer="encoder"` reads it. The scorer keeps
                no reference to the model, whose part it is.

        Raises:
            ValueError: `scorer="encoder"` without `look`.
        """
        # Once per model, because reading the flag waits for the device.
        if not torch.compiler.is_compiling() and not self._trunk_checked:
            self._trunk_checked = True
            self.warn_if_dead()
        with maybe_autocast(pixel_values.device.type, enabled=False):
            # A replica of nn.DataParallel has no parameters.
            weight = next(self.trunk.parameters(), self.statistics.running_mean)
            pixel_values = pixel_values.to(weight.dtype)
            if self.config.scorer == "encoder":
                if look is None:
                    raise ValueError("scorer='encoder' needs the model's method `look` as an argument, got None.")
                pixel_values = look(pixel_values, self.config.scorer_layers)
            features, finite = self.features(pixel_values)
            logits = torch.where(finite, self.head(features), torch.nan)
            # FSDP's mixed precision casts the weights without asking the module.
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            grid = (self.config.score_grid_size, self.config.score_grid_size)
            if logits.shape[1:] != grid:
                logits = interpolate(logits[:, None], grid, mode="bilinear", align_corners=False)[:, 0]
            return self.head.squash(self.statistics(logits, self.config.score_normalization))

    def features(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> the trunk's map (B, F, h, w), and whether it is finite for each image, (B, 1, 1).

        Where it is not, zeros replace the map, or the image if the trunk trains: a NaN would reach the head's weights
        through the gradient, and the other images through BatchNorm.
        """
        if self.config.scorer_frozen:
            with torch.no_grad():
                features, finite = zero_unless_finite(run_frozen(self.trunk, pixel_values))
        elif self.training:
            self.trunk_loaded.fill_(1)
            pixel_values, finite = zero_unless_finite(pixel_values)
            features = self.trunk(pixel_values)
        else:
            features, finite = zero_unless_finite(self.trunk(pixel_values))
        return features, finite[..., 0]

    def load_pretrained_trunk(self, source: str | Path | None = None) -> None:
        """Give the trunk ImageNet weights.

        Args:
            source: A local `.safetensors` file or pickled state dict (read without executing code) of the whole
                torchvision or timm model, or of the trunk alone. By default the library downloads its own weights.

        Raises:
            FileNotFoundError: `source` does not exist.
            OSError: The download failed.
            ValueError: "conv", "detail" and "encoder" have no pretrained weights; or a tensor of the file is missing
                or has another shape.
        """
        name = self.config.scorer
        if name in WITHOUT_WEIGHTS:
            raise ValueError(f"scorer={name!r} has no pretrained weights: {WITHOUT_WEIGHTS[name]}.")
        expected = self.trunk.state_dict()
        if source is not None:
            weights = select_trunk_weights(read_state_dict(Path(source)), name, expected, str(source))
        else:
            try:
                weights = download_trunk_weights(self.config, expected)
            except OSError as error:
                raise OSError(
                    f"The ImageNet weights of scorer={name!r} could not be downloaded ({error}); give a local file: "
                    "model.load_pretrained_scorer('weights.pth')."
                ) from error
        self.trunk.load_state_dict(weights)
        self.trunk_loaded.fill_(1)

    def initialize_trunk(self) -> None:
        """Initialise a trunk that was built without memory as its own library does. Loaded weights stay."""
        if self._built_on_meta:
            fresh = build_trunk(self.config)[0]
            # All tensors: a state dict lacks the buffers that a trunk computes.
            for tensors in (nn.Module.parameters, nn.Module.buffers):
                for tensor, value in zip(tensors(self.trunk), tensors(fresh), strict=True):
                    init.copy_(tensor, value)

    def warn_if_dead(self) -> None:
        """Log a warning if the trunk is frozen without ever having got weights."""
        if not self.trunk_loaded.is_meta and self.is_dead:
            logger.warning(DEAD_SCORER.format(scorer=self.config.scorer))

    @property
    def is_dead(self) -> bool:
        """True if the trunk is frozen and never got weights. A scorer without a trunk is never dead."""
        has_trunk = self.config.scorer not in SCORERS_WITHOUT_TRUNK
        return has_trunk and bool(self.config.scorer_frozen) and self.trunk_loaded.item() == 0


def adopt_running_rule(scorer: RegionScorer, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Turn "batch" to "running" when a model without running statistics is given some.

    The training of a converted model does the same. A LoRA adapter has the statistics of its training but no
    configuration, so nothing else tells that they are to be used.
    """
    tracked = [key for key in state_dict if key.startswith(f"{prefix}statistics.") and key.endswith("batches_tracked")]
    new = not scorer.statistics.num_batches_tracked.is_meta and scorer.statistics.num_batches_tracked == 0
    if scorer.config.score_normalization == "batch" and new and any(state_dict[key] > 0 for key in tracked):
        scorer.config.score_normalization = "running"


class PerCellHead(nn.Module):
    """v1: a logit per cell from that cell's features."""

    def __init__(self, num_features: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(num_features, hidden_size)
        self.fc2 = nn.Linear(hidden_size, 1)

    def forward(self, features: Tensor) -> Tensor:
        """(B, F, h, w) -> logits (B, h, w)."""
        return self.fc2(gelu(self.fc1(features.permute(0, 2, 3, 1)))).squeeze(-1)

    @staticmethod
    def squash(standardized: Tensor) -> Tensor:
        """Standardised logits -> scores in (0.1, 1.1)."""
        return standardized.sigmoid() + 0.1


class ChannelGateHead(nn.Module):
    """v2: the sum of the features over the channels, each weighted by a gate computed from the whole image."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(num_features, HEAD_HIDDEN_SIZE)
        self.fc2 = nn.Linear(HEAD_HIDDEN_SIZE, num_features)

    def forward(self, features: Tensor) -> Tensor:
        """(B, F, h, w) -> logits (B, h, w)."""
        gate = self.fc2(gelu(self.fc1(features.mean(dim=(2, 3))))).sigmoid()
        return (features * gate[:, :, None, None]).sum(dim=1)

    @staticmethod
    def squash(standardized: Tensor) -> Tensor:
        """Standardised logits -> scores in (0, 1)."""
        return (2 * standardized).sigmoid()


class DetailHead(nn.Module):
    """The contrast of each cell is its logit. What is learned comes after the standardisation."""

    def __init__(self) -> None:
        super().__init__()
        self.squash = GainAndOffset()

    def forward(self, contrast: Tensor) -> Tensor:
        """(B, 1, G, G) -> logits (B, G, G)."""
        return contrast.squeeze(1)


class GainAndOffset(nn.Module):
    """Standardised logits, times a gain, plus an offset -> scores in (0.1, 1.1)."""

    def __init__(self) -> None:
        super().__init__()
        # Of one element, because FSDP shards no scalar.
        self.gain = nn.Parameter(torch.ones(1))
        self.offset = nn.Parameter(torch.zeros(1))

    def forward(self, standardized: Tensor) -> Tensor:
        return PerCellHead.squash(standardized * self.gain + self.offset)


def zero_unless_finite(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Replace images with infinite or NaN values by zeros. Also returns a mask (B, 1, 1, 1) of the finite images."""
    finite = tensor.detach().sum(dim=(1, 2, 3), dtype=torch.float32, keepdim=True).isfinite()
    return torch.where(finite, tensor, 0), finite
