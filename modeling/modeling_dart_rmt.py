"""DART (arXiv 2506.10390) with a hierarchical encoder: RMT, retentive networks for images (arXiv 2309.11523).

An image is rebuilt from the regions of a grid. An ordinary network of four stages reads it.
"""

from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.functional import conv2d
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_dart_rmt import DartRmtConfig
from .image_rebuilder import ImageRebuilder
from .modeling_dart_base import (
    DartModelOutput,
    ImageClassifierMixin,
    RegionPreTrainedModel,
    drop_path_rates,
    eager_attention_forward,
)
from .region_tokenizer import channels_last


class RelativePositions(NamedTuple):
    """The relative positions on a map (h, w), for all layers of a stage.

    Args:
        cos, sin: (h, w, 1, E), cosine and sine of the angles that rotate queries and keys. E is the channels of a head.
        decays: Each (1, heads, L, L), terms of the attention logits that depend on the distance. A chunkwise stage has
            two: along the width (L = w) and along the height (L = h). Other stages have one, over all positions
            (L = h·w).
    """

    cos: Tensor
    sin: Tensor
    decays: tuple[Tensor, ...]


# These two functions compute in float32 in every model, because the authors' code does, also in float64 models. So our
# float64 logits agree with theirs to 1e-13. In float64 the rates would differ by up to 4e-6, and the logits by 2e-7.


def rotation_frequencies(head_dim: int, device: torch.device | None = None) -> Tensor:
    """Angle per position of each channel: (E,), float32. Pairs of channels have the same angle."""
    exponents = torch.linspace(0, 1, head_dim // 2, dtype=torch.float32, device=device)
    return (1 / 10000**exponents).repeat_interleave(2)


def decay_rates(start: float, extent: float, num_heads: int, device: torch.device | None = None) -> Tensor:
    """Term of the logits of head h per step of distance, log(1 - 2^(-start - extent·h/heads)): (heads,), float32."""
    heads = torch.arange(num_heads, dtype=torch.float32, device=device)
    return torch.log(1 - 2 ** (-start - extent * heads / num_heads))


def rotate(channels: Tensor, positions: RelativePositions) -> Tensor:
    """Rotate pairs of neighbouring channels by the angles of their positions: (B, h, w, heads, E) -> same shape."""
    cos, sin = positions.cos.to(channels.dtype), positions.sin.to(channels.dtype)
    quarter_turned = torch.stack([-channels[..., 1::2], channels[..., ::2]], dim=-1).flatten(-2)
    return channels * cos + quarter_turned * sin


class DartRmtConvolution(nn.Module):
    """A 3×3 convolution and BatchNorm: (B, C, h, w) -> (B, C', h, w), or ⌈h/2⌉ and ⌈w/2⌉ with stride 2."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, features: Tensor) -> Tensor:
        return self.norm(self.conv(features))


class DartRmtStem(nn.Module):
    """Four convolutions, two of them strided: images (B, c, H, W) -> a map (B, C, ⌈H/4⌉, ⌈W/4⌉)."""

    def __init__(self, config: DartRmtConfig) -> None:
        super().__init__()
        width = config.hidden_sizes[0]
        self.convolutions = nn.ModuleList(
            [
                DartRmtConvolution(config.num_channels, width // 2, stride=2),
                DartRmtConvolution(width // 2, width // 2),
                DartRmtConvolution(width // 2, width, stride=2),
                DartRmtConvolution(width, width),
            ]
        )
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, images: Tensor) -> Tensor:
        first, *others = self.convolutions
        features = first(images.to(first.conv.weight.dtype))
        for convolution in others:
            features = convolution(self.activation(features))
        return features


class DartRmtDepthwiseConvolution(nn.Module):
    """A convolution of each channel by itself: (B, h, w, C) -> (B, h, w, C).

    This is no `nn.Conv2d`, because the channels come last.
    """

    def __init__(self, num_channels: int, kernel_size: int) -> None:
        super().__init__()
        # Drawn as torch draws the kernel of a convolution.
        kernel = nn.Conv2d(num_channels, num_channels, kernel_size, groups=num_channels)
        self.weight, self.bias = kernel.weight, kernel.bias

    def forward(self, hidden_states: Tensor) -> Tensor:
        # Both permutations are views: torch stores a map (B, C, h, w) this way in its channels_last format.
        features = hidden_states.permute(0, 3, 1, 2)
        num_channels, _, _, kernel_size = self.weight.shape
        convolved = conv2d(features, self.weight, self.bias, padding=kernel_size // 2, groups=num_channels)
        return convolved.permute(0, 2, 3, 1)


class DartRmtRetention(nn.Module):
    """Multi-head attention that decays with distance: (B, h, w, C) -> (B, h, w, C).

    Chunkwise retention attends along the width, then along the height of the result.
    """

    def __init__(self, config: DartRmtConfig, stage: int) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_sizes[stage]
        self.head_dim = width // config.num_attention_heads[stage]
        self.scaling = self.head_dim**-0.5
        self.chunkwise = config.chunkwise[stage]
        self.is_causal = False
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.local_conv = DartRmtDepthwiseConvolution(width, kernel_size=5)
        self.o_proj = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor, positions: RelativePositions) -> Tensor:
        def split_heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (-1, self.head_dim))

        query = rotate(split_heads(self.q_proj(hidden_states)), positions)
        key = rotate(split_heads(self.k_proj(hidden_states)), positions)
        value = self.v_proj(hidden_states)
        if self.chunkwise:
            along_width, along_height = positions.decays
            retained = self.attend(query, key, split_heads(value), along_width)
            columns = (states.transpose(1, 2) for states in (query, key, retained))
            retained = self.attend(*columns, along_height).transpose(1, 2)
        else:
            sequences = (states.flatten(1, 2).unsqueeze(1) for states in (query, key, split_heads(value)))
            retained = self.attend(*sequences, *positions.decays).view_as(query)
        return self.o_proj(self.local_conv(value) + retained.flatten(-2))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, decay: Tensor) -> Tensor:
        """Attend within each of the S sequences of an image. All tensors except the decay are (B, S, L, heads, E)."""
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        by_head = (states.flatten(0, 1).transpose(1, 2) for states in (query, key, value))
        output, _ = attention(self, *by_head, decay.to(query.dtype), scaling=self.scaling)
        return output.unflatten(0, query.shape[:2])


class DartRmtMLP(nn.Module):
    """MLP with a depthwise convolution between its projections: (B, h, w, C) -> (B, h, w, C)."""

    def __init__(self, config: DartRmtConfig, stage: int) -> None:
        super().__init__()
        width = config.hidden_sizes[stage]
        intermediate_size = width * config.mlp_ratios[stage]
        self.fc1 = nn.Linear(width, intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.conv = DartRmtDepthwiseConvolution(intermediate_size, kernel_size=3)
        self.fc2 = nn.Linear(intermediate_size, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.activation(self.fc1(hidden_states))
        return self.fc2(hidden_states + self.conv(hidden_states))


class DartRmtLayer(GradientCheckpointingLayer):
    """Pre-norm block with a depthwise convolution first, stochastic depth, and layer scale if it is on."""

    def __init__(self, config: DartRmtConfig, stage: int, drop_path_rate: float) -> None:
        super().__init__()
        width = config.hidden_sizes[stage]
        self.position_conv = DartRmtDepthwiseConvolution(width, kernel_size=3)
        self.layernorm_before = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.retention = DartRmtRetention(config, stage)
        self.layer_scale1 = nn.Parameter(torch.ones(width)) if config.layer_scale[stage] else None
        self.layernorm_after = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = DartRmtMLP(config, stage)
        self.layer_scale2 = nn.Parameter(torch.ones(width)) if config.layer_scale[stage] else None
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, hidden_states: Tensor, positions: RelativePositions) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C)."""
        hidden_states = hidden_states + self.position_conv(hidden_states)
        retained = self.retention(self.layernorm_before(hidden_states), positions)
        if self.layer_scale1 is not None:
            retained = self.layer_scale1 * retained
        hidden_states = hidden_states + self.drop_path(retained)
        transformed = self.mlp(self.layernorm_after(hidden_states))
        if self.layer_scale2 is not None:
            transformed = self.layer_scale2 * transformed
        return hidden_states + self.drop_path(transformed)


class DartRmtStage(nn.Module):
    """Blocks at one resolution, and the step down to the next: (B, C, h, w) -> (B, C', ⌈h/2⌉, ⌈w/2⌉).

    The last stage has no step down: (B, C, h, w) -> (B, C, h, w).
    """

    def __init__(self, config: DartRmtConfig, stage: int, drop_path_rates: list[float]) -> None:
        super().__init__()
        width, *following = config.hidden_sizes[stage:]
        self.num_heads = config.num_attention_heads[stage]
        self.head_dim = width // self.num_heads
        self.decay_start, self.decay_range = config.decay_starts[stage], config.decay_ranges[stage]
        self.chunkwise = config.chunkwise[stage]
        self.layers = nn.ModuleList(DartRmtLayer(config, stage, rate) for rate in drop_path_rates)
        self.downsample = DartRmtConvolution(width, following[0], stride=2) if following else None

    def forward(self, features: Tensor) -> Tensor:
        positions = self.relative_positions(features)
        hidden_states = features.permute(0, 2, 3, 1)
        for layer in self.layers:
            hidden_states = layer(hidden_states, positions)
        features = hidden_states.permute(0, 3, 1, 2)
        return features if self.downsample is None else self.downsample(features)

    def relative_positions(self, features: Tensor) -> RelativePositions:
        """The relative positions on a map (B, C, h, w), in float32 at least."""
        height, width = features.shape[2:]
        dtype, device = torch.promote_types(features.dtype, torch.float32), features.device
        frequencies = rotation_frequencies(self.head_dim, device).to(dtype)
        index = torch.arange(height * width, dtype=dtype, device=device).view(height, width, 1, 1)
        angles = index * frequencies
        rates = decay_rates(self.decay_start, self.decay_range, self.num_heads, device).to(dtype).view(1, -1, 1, 1)
        x, y = torch.arange(width, dtype=dtype, device=device), torch.arange(height, dtype=dtype, device=device)
        along_width, along_height = (x[:, None] - x).abs(), (y[:, None] - y).abs()
        if self.chunkwise:
            decays = (rates * along_width, rates * along_height)
        else:
            # Manhattan distances (h, w, h, w).
            over_map = along_height[:, None, :, None] + along_width[:, None, :]
            decays = (rates * over_map.flatten(2).flatten(0, 1),)
        return RelativePositions(angles.cos(), angles.sin(), decays)


class DartRmtPooler(nn.Module):
    """Mean over the positions after a projection: (B, C, h, w) -> (B, projection_size)."""

    def __init__(self, config: DartRmtConfig) -> None:
        super().__init__()
        self.projection = nn.Linear(config.hidden_sizes[-1], config.projection_size)
        self.norm = nn.BatchNorm2d(config.projection_size)
        self.activation = nn.SiLU()

    def forward(self, features: Tensor) -> Tensor:
        projected = self.projection(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.activation(self.norm(projected)).mean(dim=(2, 3))


class DartRmtPreTrainedModel(RegionPreTrainedModel):
    """Weights and loading of the models below."""

    config: DartRmtConfig
    config_class = DartRmtConfig
    base_model_prefix = "dart_rmt"
    # The scorer has a unit of its own under FSDP, where a unit has one precision.
    _no_split_modules = ["ImageRebuilder", "RegionScorer", "DartRmtLayer"]
    # The other attention implementations of transformers take no bias.
    _supports_sdpa = True
    _can_record_outputs = {"hidden_states": DartRmtStage}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, DartRmtDepthwiseConvolution):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.bias)
        elif isinstance(module, DartRmtLayer):
            for layer_scale in (module.layer_scale1, module.layer_scale2):
                if layer_scale is not None:
                    init.constant_(layer_scale, self.config.layer_scale_init_value)
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.stem

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.stem = value


class DartRmtModel(DartRmtPreTrainedModel):
    """The image rebuilt from its regions and an RMT encoder, without a head."""

    def __init__(self, config: DartRmtConfig) -> None:
        super().__init__(config)
        self.tokenizer = ImageRebuilder(config)
        self.stem = DartRmtStem(config)
        rates = iter(drop_path_rates(config.drop_path_rate, sum(config.depths)))
        self.stages = nn.ModuleList(
            DartRmtStage(config, stage, list(islice(rates, depth))) for stage, depth in enumerate(config.depths)
        )
        self.pooler = DartRmtPooler(config)
        self.post_init()

    @can_return_tuple
    @merge_with_config_defaults
    def forward(
        self,
        pixel_values: Tensor,
        num_patches: int | None = None,
        output_regions: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DartModelOutput:
        """Encode images.

        Args:
            pixel_values: (B, C, H, W), floating point, normalised as [`DartImageProcessor`] does.
            num_patches: Number R·C of regions of this call. The default is `config.num_patches`.
            output_regions: Also return `regions`: where the regions are.

        Returns:
            `last_hidden_state` (B, C, h, w), the map of the last stage. `pooler_output` (B, projection_size), the mean
            of this map after a projection. With `output_regions` `regions`. `hidden_states`, on request, are maps
            (B, C, h, w): the stem's, and the input of each following stage, which is half as high and wide. There are
            no attentions.

        Raises:
            ValueError: See [`ImageRebuilder.check`].
        """
        images, regions = self.tokenizer(pixel_values, num_patches, self.look)
        outputs = self.encode(images, return_dict=True, **kwargs)
        outputs.regions = regions if output_regions else None
        return outputs

    # Not `forward`, in which the stages also run for the scorer "encoder".
    @capture_outputs(tie_last_hidden_states=False)
    def encode(self, images: Tensor, **kwargs: Unpack[TransformersKwargs]) -> DartModelOutput:
        """Encode images (B, c, P·R, P·C), rebuilt or not; see [`forward`]."""
        features = self.first_layers(images, len(self.stages))
        return DartModelOutput(last_hidden_state=features, pooler_output=self.pooler(features))

    def first_layers(self, images: Tensor, num_layers: int) -> Tensor:
        # In this layout a map (B, C, h, w) is a view of (B, h, w, C).
        features = self.stem(channels_last(images))
        for stage in self.stages[:num_layers]:
            features = stage(features)
        return features


class DartRmtForImageClassification(ImageClassifierMixin, DartRmtPreTrainedModel):
    """DART-RMT with a linear classifier on the pooled map."""

    def __init__(self, config: DartRmtConfig) -> None:
        super().__init__(config, DartRmtModel(config), config.projection_size)
        self.post_init()


__all__ = ["DartRmtForImageClassification", "DartRmtModel", "DartRmtPreTrainedModel"]
