"""Trunks of the scorer: pixel values -> a map of features. Others' networks, run as fast as their arithmetic allows."""

from collections import OrderedDict
from typing import Any

import timm
import torch
import torchvision
from torch import nn

from .configuration_region import RegionConfig

# (width, kernel size, stride) of each convolution of the "conv" trunk. The first takes a coarse step: a layer at half
# resolution would cost more than the whole rest.
CONV_TRUNK = ((24, 7, 4), (48, 3, 2), (96, 3, 2))

# torchvision name -> the part that is the trunk; then per head how many of its layers are read (None: all) and how many
# channels the last of them has.
TORCHVISION_LAYERS: dict[str, tuple[str, dict[str, tuple[int | None, int]]]] = {
    "mobilenet_v3_small": ("features", {"v1": (11, 96), "v2": (13, 576)}),
    "mobilenet_v3_large": ("features", {"v1": (15, 160), "v2": (17, 960)}),
    "efficientnet_b0": ("features", {"v1": (None, 1280), "v2": (None, 1280)}),
    "mnasnet1_0": ("layers", {"v1": (None, 1280), "v2": (None, 1280)}),
    "squeezenet1_1": ("features", {"v1": (None, 512), "v2": (None, 512)}),
}

# Numbers in a trunk's largest map for every pixel of the image; without an entry 16, as for 64 channels at half
# resolution.
LARGEST_MAP = {
    "conv": 1.5,
    "mobilenet_v3_small": 4.5,
    "mobilenet_v3_large": 16,
    "efficientnet_b0": 24,
    "mnasnet1_0": 12,
    "squeezenet1_1": 16,
}
# glibc keeps freed memory for the next allocation up to this size. Beyond it every map is made of new pages, and on a
# CPU touching those costs more than computing the map.
LARGEST_REUSED_ALLOCATION = 32 * 2**20


def build_trunk(config: RegionConfig) -> tuple[nn.Module, int]:
    """The trunk that `config.scorer` names and the number of channels of its map.

    Raises:
        ValueError: timm knows no such model, or cannot take features from it.
    """
    if config.scorer == "conv":
        return folding(ConvTrunk(config.num_channels)), CONV_TRUNK[-1][0]
    if config.scorer.startswith("timm/"):
        trunk = TimmTrunk(config)
        return folding(trunk), trunk.num_features
    part, heads = TORCHVISION_LAYERS[config.scorer]
    num_layers, num_features = heads[config.scorer_head]
    model = torchvision.models.get_model(config.scorer, weights=None)
    return folding(getattr(model, part)[:num_layers]), num_features


class ConvTrunk(nn.Sequential):
    """Three strided convolutions with BatchNorm: (B, C, H, W) -> (B, 96, ⌈H/16⌉, ⌈W/16⌉).

    For small images and for training from scratch.
    """

    def __init__(self, num_channels: int) -> None:
        layers = []
        for width, kernel_size, stride in CONV_TRUNK:
            convolution = nn.Conv2d(num_channels, width, kernel_size, stride, padding=kernel_size // 2, bias=False)
            layers.append(nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)))
            num_channels = width
        super().__init__(*layers)


class TimmTrunk(nn.Module):
    """The last stage of a timm feature extractor: (B, C, H, W) -> (B, F, h, w)."""

    def __init__(self, config: RegionConfig, pretrained: bool = False) -> None:
        super().__init__()
        name = config.scorer.removeprefix("timm/")
        options: dict[str, Any] = {"features_only": True, "out_indices": (-1,), "in_chans": config.num_channels}
        known = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
        if known is not None and known.fixed_input_size:
            options["img_size"] = config.image_size
        try:
            self.model = timm.create_model(name, pretrained=pretrained, **options)
        except (RuntimeError, TypeError, AssertionError) as error:
            raise ValueError(f"scorer={config.scorer!r} cannot be built: {error}.") from error
        self.num_features = self.model.feature_info.channels()[-1]
        self.channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features = self.model(pixel_values)[-1]
        return features.permute(0, 3, 1, 2) if self.channels_last else features


@torch.no_grad()
def run_frozen(trunk: nn.Module, name: str, pixel_values: torch.Tensor) -> torch.Tensor:
    """Apply a trunk that mixes no images: (B, C, H, W) -> (B, F, h, w).

    On a CPU a few images at a time, so that freed memory is used again.
    """
    if pixel_values.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return trunk(pixel_values)
    largest_map = LARGEST_MAP.get(name, 16) * pixel_values[0, 0].nbytes
    images_at_once = max(1, int(LARGEST_REUSED_ALLOCATION // largest_map))
    return torch.cat([trunk(images) for images in pixel_values.split(images_at_once)])


class FoldingSequential(nn.Sequential):
    """Runs a convolution and the BatchNorm in evaluation mode that follows it as one convolution.

    The folded weights are made at every call, which costs far less than the pass over the map that they save, so
    whatever is loaded, moved, cast or trained in between takes effect, and the state dict shows nothing of it. timm's
    models, which keep most of their layers elsewhere than in an `nn.Sequential`, stay mostly unfolded.
    """

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        layers = list(self)
        while layers:
            layer = layers.pop(0)
            if layers and _folds(layer, layers[0]):
                features = layer._conv_forward(features, *folded_weights(layer, layers.pop(0)))
            else:
                features = layer(features)
        return features


def folding(trunk: nn.Module) -> nn.Module:
    """`trunk` with its plain `nn.Sequential`s replaced by [`FoldingSequential`]s of the same layers."""
    for name, child in trunk.named_children():
        setattr(trunk, name, folding(child))
    if isinstance(trunk, nn.Sequential) and type(trunk).forward is nn.Sequential.forward:
        return FoldingSequential(OrderedDict(trunk.named_children()))
    return trunk


def _folds(layer: nn.Module, following: nn.Module) -> bool:
    # The types themselves: timm's subclasses of BatchNorm2d do more.
    return (
        type(layer) is nn.Conv2d
        and type(following) is nn.BatchNorm2d
        and not following.training
        and following.track_running_stats
        and not (_is_hooked(layer) or _is_hooked(following))
    )


def _is_hooked(layer: nn.Module) -> bool:
    """Whether somebody relies on the layer's being called: a hook, or accelerate, which fetches offloaded weights."""
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    return "forward" in layer.__dict__ or any(hooks)


def folded_weights(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the convolution that does what `norm` in evaluation mode does after `convolution`."""
    dtype = convolution.weight.dtype
    precision = torch.promote_types(dtype, torch.float32)
    scale = (norm.running_var.to(precision) + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight
    mean = norm.running_mean if convolution.bias is None else norm.running_mean - convolution.bias
    bias = -mean * scale if norm.bias is None else torch.addcmul(norm.bias.to(precision), mean, scale, value=-1)
    return (convolution.weight * scale[:, None, None, None]).to(dtype), bias.to(dtype)
