"""Trunks of the scorer, by name: pixel values -> a map of features. Networks of torchvision and timm, and our own."""

from collections import OrderedDict
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import conv2d

from .configuration_region import RegionConfig
from .region_partition import band_weights

# (width, kernel size, stride) of each convolution of the "conv" trunk. The first stride is 4, because a layer at half
# resolution would cost more than all others together.
CONV_TRUNK = ((24, 7, 4), (48, 3, 2), (96, 3, 2))

PIXELS_AT_ONCE = 4 * 448 * 448  # of a frozen trunk on a CPU

# Added to the contrast of a cell before its logarithm is taken. Differences of half a grey level, which is 0.01 in
# normalised pixel values, are noise.
CONTRAST_FLOOR = 0.01

# torchvision name -> the part of the model that is the trunk; then, for each head, the number of its layers that are
# used (None: all) and the number of channels of the last one.
TORCHVISION_LAYERS: dict[str, tuple[str, dict[str, tuple[int | None, int]]]] = {
    "mobilenet_v3_small": ("features", {"v1": (11, 96), "v2": (13, 576)}),
    "mobilenet_v3_large": ("features", {"v1": (15, 160), "v2": (17, 960)}),
    "efficientnet_b0": ("features", {"v1": (None, 1280), "v2": (None, 1280)}),
    "mnasnet1_0": ("layers", {"v1": (None, 1280), "v2": (None, 1280)}),
    "squeezenet1_1": ("features", {"v1": (None, 512), "v2": (None, 512)}),
}


def build_trunk(config: RegionConfig) -> tuple[nn.Module, int]:
    """The trunk that `config.scorer` names, and the number of channels of its map.

    Raises:
        ValueError: timm knows no such model, or cannot take features from it.
    """
    if config.scorer == "conv":
        return folding(ConvTrunk(config.num_channels)), CONV_TRUNK[-1][0]
    if config.scorer == "detail":
        return DetailTrunk(config), 1
    if config.scorer == "encoder":
        # The model itself computes the map.
        return nn.Identity(), config.layer_widths[config.scorer_layers]
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


class DetailTrunk(nn.Module):
    """The logarithm of the local contrast, without weights: (B, C, H, W) -> (B, 1, G, G), in float32 at least.

    The contrast of a cell is the mean absolute difference of the luminance of neighbouring pixels: of horizontal
    neighbours plus of vertical ones. The differences are spread evenly over the image, and each counts in a cell by its
    share there, so any size is exact, also one below G. An image one pixel wide has no horizontal neighbours.
    """

    def __init__(self, config: RegionConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, pixel_values: Tensor) -> Tensor:
        pixels = pixel_values.to(torch.promote_types(pixel_values.dtype, torch.float32))
        if pixels.shape[1] == 3:
            red, green, blue = pixels.unbind(1)
            luminance = 0.299 * red + 0.587 * green + 0.114 * blue
        else:
            luminance = pixels.mean(dim=1)
        contrast = self.cell_means(luminance.diff(dim=2).abs()) + self.cell_means(luminance.diff(dim=1).abs())
        return (contrast + CONTRAST_FLOOR).log().unsqueeze(1)

    def cell_means(self, values: Tensor) -> Tensor:
        """The means of a map (B, h, w) over G×G equal cells: (B, G, G)."""
        edges = torch.arange(self.config.score_grid_size + 1, device=values.device, dtype=values.dtype)[None]
        rows, columns = (band_weights(edges, size) for size in values.shape[1:])
        return rows @ values @ columns.mT


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

    def forward(self, pixel_values: Tensor) -> Tensor:
        features = self.model(pixel_values)[-1]
        return features.permute(0, 3, 1, 2) if self.channels_last else features


def run_frozen(trunk: nn.Module, pixel_values: Tensor) -> Tensor:
    """Apply a trunk that mixes no images: (B, C, H, W) -> (B, F, h, w). On a CPU in groups, to bound the memory."""
    if pixel_values.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return trunk(pixel_values)
    images = max(1, PIXELS_AT_ONCE // pixel_values.shape[2:].numel())
    return torch.cat([trunk(group) for group in pixel_values.split(images)])


class FoldingSequential(nn.Sequential):
    """Runs a convolution and the BatchNorm in evaluation mode behind it as one convolution.

    The folded weights are computed at every call. This costs far less than the pass over the map that it saves, and
    whatever is loaded, moved, cast or trained in between takes effect. The state dict does not change. timm's models
    hold few layers in an `nn.Sequential`, so most of theirs are not folded.
    """

    def forward(self, features: Tensor) -> Tensor:
        layers = list(self)
        while layers:
            layer = layers.pop(0)
            if layers and _can_fold(layer, layers[0]):
                weight, bias = folded_weights(layer, layers.pop(0))
                features = conv2d(features, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
            else:
                features = layer(features)
        return features


def folding(trunk: nn.Module) -> nn.Module:
    """`trunk` with a [`FoldingSequential`] of the same layers in place of each plain `nn.Sequential`."""
    for name, child in trunk.named_children():
        setattr(trunk, name, folding(child))
    if isinstance(trunk, nn.Sequential) and type(trunk).forward is nn.Sequential.forward:
        return FoldingSequential(OrderedDict(trunk.named_children()))
    return trunk


def _can_fold(layer: nn.Module, following: nn.Module) -> bool:
    # The exact types: subclasses of BatchNorm2d, such as timm's, do more.
    return (
        type(layer) is nn.Conv2d
        and type(following) is nn.BatchNorm2d
        and layer.padding_mode == "zeros"
        and not following.training
        and following.track_running_stats
        and not (_is_hooked(layer) or _is_hooked(following))
    )


def _is_hooked(layer: nn.Module) -> bool:
    """Tell if a call of the layer does more than the layer: it has hooks, or accelerate loads offloaded weights."""
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    return "forward" in vars(layer) or any(hooks)


def folded_weights(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that equals `convolution` followed by `norm` in evaluation mode.

    `torch.nn.utils.fusion.fuse_conv_bn_weights` returns `nn.Parameter`s. They would cut the gradient, and
    `torch.compile` cannot trace them.
    """
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight
    mean = norm.running_mean if convolution.bias is None else norm.running_mean - convolution.bias
    bias = -mean * scale if norm.bias is None else torch.addcmul(norm.bias, mean, scale, value=-1)
    # FSDP's mixed precision casts the weights but not the statistics.
    dtype = convolution.weight.dtype
    return (convolution.weight * scale[:, None, None, None]).to(dtype), bias.to(dtype)
