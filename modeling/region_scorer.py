"""Scorer: pixel values -> scores. A convolutional trunk, a head, and a standardisation."""

from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import distributed, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.functional import gelu, interpolate
from transformers import initialization as init
from transformers.utils import logging

from .configuration_dart import RegionTokenizerConfig

logger = logging.get_logger(__name__)

STANDARDIZATION_EPSILON = 1e-8
STATISTICS_MOMENTUM = 0.1
HEAD_WIDTH = 96
CONV_TRUNK_WIDTHS = (24, 48, 72, 96)

# torchvision name -> the part that is the trunk; then per head how many of its layers are read (None: all) and how many
# channels the last of them has.
TORCHVISION_TRUNKS: dict[str, tuple[str, dict[str, tuple[int | None, int]]]] = {
    "mobilenet_v3_small": ("features", {"v1": (11, 96), "v2": (13, 576)}),
    "mobilenet_v3_large": ("features", {"v1": (15, 160), "v2": (17, 960)}),
    "efficientnet_b0": ("features", {"v1": (None, 1280), "v2": (None, 1280)}),
    "mnasnet1_0": ("layers", {"v1": (None, 1280), "v2": (None, 1280)}),
    "squeezenet1_1": ("features", {"v1": (None, 512), "v2": (None, 512)}),
}


class RegionScorer(nn.Module):
    """Scores every cell of a G×G grid over the image: the higher, the smaller the regions there."""

    def __init__(self, config: RegionTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk, num_features = build_trunk(config)
        if config.scorer_head == "v1":
            hidden_size = num_features if config.scorer.startswith("mobilenet") else HEAD_WIDTH
            self.head: nn.Module = PerCellHead(num_features, hidden_size)
        else:
            self.head = ChannelGateHead(num_features)
        self.statistics = ScoreStatistics()
        # Whether the trunk holds weights that were loaded or trained. A buffer, so that a checkpoint tells.
        self.register_buffer("trunk_loaded", torch.tensor(False))
        self._trunk_checked = False
        self._built_on_meta = next(self.trunk.parameters()).is_meta
        # transformers' initialisation would overwrite what the trunk's own library does.
        for module in self.trunk.modules():
            module._is_hf_initialized = True
        self.set_frozen(config.scorer_frozen)

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

        An image whose logits are constant, infinite or NaN gets constant scores.
        """
        self._warn_of_dead_trunk()
        if self.training:
            # A NaN would spread through BatchNorm to the other images, and through the head's gradient to the weights.
            finite = pixel_values.isfinite().all(dim=(1, 2, 3))[:, None, None]
            logits = self.head(self.features(torch.where(finite[..., None], pixel_values, 0)))
            logits = torch.where(finite, logits, torch.nan)
        else:
            logits = self.head(self.features(pixel_values))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        grid_size = self.config.score_grid_size
        if logits.shape[1:] != (grid_size, grid_size):
            logits = interpolate(logits[:, None], (grid_size, grid_size), mode="bilinear", align_corners=False)[:, 0]
        return self.head.squash(self.statistics(logits, self.config.score_normalization))

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> the trunk's map (B, F, h, w)."""
        if self.config.scorer_frozen:
            with torch.no_grad():
                return self.trunk(pixel_values)
        if self.training:
            self.trunk_loaded.fill_(True)
        return self.trunk(pixel_values)

    def load_pretrained_trunk(self, source: str | Path | None = None) -> None:
        """Give the trunk ImageNet weights.

        Args:
            source: A local `.safetensors` file or pickled state dict (read without executing anything) of the whole
                torchvision or timm model, or of the trunk alone. Without it the library downloads its default weights.

        Raises:
            FileNotFoundError: `source` does not exist.
            ValueError: The "conv" trunk has no pretrained weights; or the file lacks a tensor, or has it in another
                shape.
        """
        name = self.config.scorer
        if name == "conv":
            raise ValueError("scorer='conv' has no pretrained weights: it is trained with the model.")
        if source is not None:
            weights = self._select_trunk_weights(_read_state_dict(Path(source)), str(source))
        elif name.startswith("timm/"):
            weights = TimmTrunk(name.removeprefix("timm/"), self.config.num_channels, pretrained=True).state_dict()
        else:
            library = torchvision.models.get_model_weights(name).DEFAULT
            weights = self._select_trunk_weights(library.get_state_dict(progress=True, check_hash=True), str(library))
        self.trunk.load_state_dict(weights)
        self.trunk_loaded.fill_(True)

    def initialize_trunk(self) -> None:
        """Initialise what no checkpoint has given the trunk, as its own library does (for `_init_weights`)."""
        missing = [t for t in _tensors(self.trunk).values() if not getattr(t, "_is_hf_initialized", False)]
        if self._built_on_meta and missing:
            fresh, _ = build_trunk(self.config)
            for tensor, initial in zip(_tensors(self.trunk).values(), _tensors(fresh).values(), strict=True):
                init.copy_(tensor, initial.to(tensor.device))

    def _select_trunk_weights(self, state_dict: dict[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
        """The trunk's tensors out of a whole model's state dict."""
        part = TORCHVISION_TRUNKS[self.config.scorer][0] if self.config.scorer in TORCHVISION_TRUNKS else "model"
        # timm's feature extractors join module names with "_" where the whole model has ".".
        given = {key.removeprefix(f"{part}.").replace(".", "_"): value for key, value in state_dict.items()}
        selected = {}
        for key, expected in self.trunk.state_dict().items():
            value = given.get(key.removeprefix("model.").replace(".", "_"))
            if value is None:
                raise ValueError(f"{source} has no tensor {key!r} for scorer={self.config.scorer!r}.")
            if value.shape != expected.shape:
                raise ValueError(
                    f"{source} has tensor {key!r} in shape {tuple(value.shape)}; scorer={self.config.scorer!r} needs "
                    f"{tuple(expected.shape)}."
                )
            selected[key] = value
        return selected

    def _warn_of_dead_trunk(self) -> None:
        # Once per model: reading the flag waits for the device.
        if self._trunk_checked or torch.compiler.is_compiling() or self.trunk_loaded.is_meta:
            return
        self._trunk_checked = True
        if self.is_dead:
            logger.warning(f"The scorer is dead: {DEAD_SCORER.format(scorer=self.config.scorer)}")

    @property
    def is_dead(self) -> bool:
        """Whether the trunk is frozen without ever having got weights."""
        return self.config.scorer_frozen and not self.trunk_loaded.item()


DEAD_SCORER = (
    "its trunk {scorer!r} is frozen and has random weights, so the regions do not follow the image; call "
    "model.load_pretrained_scorer(), load a checkpoint, or set scorer_frozen=False."
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
        self.fc1 = nn.Linear(num_features, HEAD_WIDTH)
        self.fc2 = nn.Linear(HEAD_WIDTH, num_features)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, F, h, w) -> logits (B, h, w)."""
        gate = self.fc2(gelu(self.fc1(features.mean(dim=(2, 3))))).sigmoid()
        return (features * gate[:, :, None, None]).sum(dim=1)

    @staticmethod
    def squash(standardized: torch.Tensor) -> torch.Tensor:
        """Standardised logits -> scores in (0, 1)."""
        return (2 * standardized).sigmoid()


class ScoreStatistics(nn.Module):
    """Standardises logits by the mean and standard deviation of the batch, of all batches so far, or of each image.

    The running statistics stay in float32 at least when the model is cast to half precision.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(()))
        self.register_buffer("running_var", torch.ones(()))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self._warned = False

    def forward(self, logits: torch.Tensor, normalization: str) -> torch.Tensor:
        """Standardise.

        Args:
            logits: (B, G, G).
            normalization: `"running"`, `"image"` or `"batch"` (see [`RegionTokenizerConfig`]).

        Returns:
            (B, G, G); zero for an image whose logits are constant, infinite or NaN. Such an image enters no statistics.
        """
        # Squares beyond this bound overflow when they are summed. A NaN fails every comparison.
        bound = torch.finfo(logits.dtype).max ** 0.25
        lowest, highest = logits.detach().amin(dim=(1, 2)), logits.detach().amax(dim=(1, 2))
        usable = ((lowest < highest) & (lowest > -bound) & (highest < bound))[:, None, None]
        logits = torch.where(usable, logits, 0)

        if normalization == "image":
            mean, variance = image_moments(logits)
        elif self.training:
            mean, variance = batch_moments(logits, usable)
            self._track(mean.detach(), variance.detach(), usable.any())
        elif normalization == "batch":
            mean, variance = batch_moments(logits, usable)
            if logits.shape[0] > 1:
                self._warn_once(
                    "score_normalization='batch' (the published rule) makes an image's prediction depend on the other "
                    "images of its batch; set model.config.score_normalization to 'image', or fine-tune with 'running'."
                )
        else:
            mean, variance = self._running_moments(logits)
        # The smallest normal number keeps the root's gradient finite.
        deviation = variance.clamp(min=torch.finfo(variance.dtype).tiny).sqrt()
        return torch.where(usable, (logits - mean) / (deviation + STANDARDIZATION_EPSILON), 0)

    def _track(self, mean: torch.Tensor, variance: torch.Tensor, any_usable: torch.Tensor) -> None:
        # The first batch replaces the initial values, which describe nothing.
        momentum = torch.where(self.num_batches_tracked > 0, STATISTICS_MOMENTUM, 1.0) * any_usable
        momentum = momentum.to(self.running_mean.dtype)
        self.running_mean.lerp_(mean.view(()).to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.view(()).to(self.running_var.dtype), momentum)
        self.num_batches_tracked.add_(any_usable)

    def _running_moments(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._warned and not torch.compiler.is_compiling() and not self.num_batches_tracked.is_meta:
            # Once per model: reading the counter waits for the device.
            if self.num_batches_tracked.item() == 0:
                self._warn_once(
                    "score_normalization='running' has no statistics before the first training step: each image's own "
                    "are used."
                )
            self._warned = True
        tracked = self.num_batches_tracked > 0
        mean, variance = image_moments(logits)
        mean = torch.where(tracked, self.running_mean.to(mean.dtype), mean)
        return mean, torch.where(tracked, self.running_var.to(variance.dtype), variance)

    def _warn_once(self, message: str) -> None:
        if not self._warned and not torch.compiler.is_compiling():
            self._warned = True
            logger.warning(message)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "ScoreStatistics":
        def keep_precision(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if moved.is_floating_point() and moved.dtype.itemsize < 4:
                return tensor.to(device=moved.device)
            return moved

        return super()._apply(keep_precision, recurse)


def image_moments(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased variance of each image: (B, G, G) -> (B, 1, 1), (B, 1, 1)."""
    mean = logits.mean(dim=(1, 2), keepdim=True)
    squares = (logits - mean).square().sum(dim=(1, 2), keepdim=True)
    return mean, squares / max(logits[0].numel() - 1, 1)


def batch_moments(logits: torch.Tensor, usable: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased variance over the usable images' cells, of all processes while training is distributed.

    Args:
        logits: (B, G, G), zero where not usable.
        usable: (B, 1, 1), bool.

    Returns:
        Two tensors (1, 1, 1), with gradients to the logits of every process.
    """
    count = (usable.sum() * logits[0].numel()).to(logits.dtype).view(1, 1, 1)
    count, total = _sum_over_processes(torch.stack([count, logits.sum().view(1, 1, 1)]))
    mean = total / count.clamp(min=1)
    squares = torch.where(usable, (logits - mean).square(), 0).sum().view(1, 1, 1)
    return mean, _sum_over_processes(squares) / (count - 1).clamp(min=1)


def _sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        return all_reduce(tensor)
    return tensor


def build_trunk(config: RegionTokenizerConfig) -> tuple[nn.Module, int]:
    """The trunk that `config.scorer` names and the number of channels of its map.

    Raises:
        ValueError: timm knows no such model, or cannot take features from it.
    """
    if config.scorer == "conv":
        return ConvTrunk(config.num_channels), CONV_TRUNK_WIDTHS[-1]
    if config.scorer.startswith("timm/"):
        trunk = TimmTrunk(config.scorer.removeprefix("timm/"), config.num_channels)
        return trunk, trunk.num_features
    part, heads = TORCHVISION_TRUNKS[config.scorer]
    num_layers, num_features = heads[config.scorer_head]
    model = torchvision.models.get_model(config.scorer, weights=None)
    return getattr(model, part)[:num_layers], num_features


class ConvTrunk(nn.Sequential):
    """Four strided convolutions with BatchNorm: (B, C, H, W) -> (B, 96, ⌈H/16⌉, ⌈W/16⌉).

    For small images and for training from scratch.
    """

    def __init__(self, num_channels: int) -> None:
        layers = []
        for width in CONV_TRUNK_WIDTHS:
            convolution = nn.Conv2d(num_channels, width, kernel_size=3, stride=2, padding=1, bias=False)
            layers.append(nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)))
            num_channels = width
        super().__init__(*layers)


class TimmTrunk(nn.Module):
    """The last stage of a timm feature extractor: (B, C, H, W) -> (B, F, h, w)."""

    def __init__(self, name: str, num_channels: int, pretrained: bool = False) -> None:
        super().__init__()
        options: dict[str, Any] = {"features_only": True, "out_indices": (-1,), "in_chans": num_channels}
        try:
            self.model = timm.create_model(name, pretrained=pretrained, **options)
        except RuntimeError as error:
            raise ValueError(f"scorer='timm/{name}' cannot be built: {error}.") from error
        self.num_features = self.model.feature_info.channels()[-1]
        self.channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features = self.model(pixel_values)[-1]
        return features.permute(0, 3, 1, 2) if self.channels_last else features


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return module.state_dict(keep_vars=True)


def _read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"Scorer weights {path} do not exist.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(f"Scorer weights {path} are damaged, or cannot be read without executing code.") from error
    if not isinstance(state_dict, Mapping) or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise ValueError(f"Scorer weights {path} are no state dict: a mapping of names to tensors is accepted.")
    return dict(state_dict)
