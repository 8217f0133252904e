"""DART with a Vision Mamba encoder (Vim, arXiv 2401.09417)."""

import math

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear, rms_norm, silu, softplus
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_dart_vim import DartVimConfig
from .modeling_dart_base import DartModelOutput, ImageClassifierMixin, RegionPreTrainedModel, drop_path_rates
from .region_tokenizer import RegionTokenizer
from .selective_scan import selective_scan


class DartVimConvolution(nn.Module):
    """Convolves each channel along the tokens, over the current token and those that the scan read before it.

    (B, L, E) -> (B, L, E). This is no `nn.Conv1d`, because the channels come last.
    """

    def __init__(self, num_channels: int, kernel_size: int, backwards: bool) -> None:
        super().__init__()
        # Drawn as torch draws the kernel of a convolution.
        kernel = nn.Conv1d(num_channels, num_channels, kernel_size, groups=num_channels)
        self.weight, self.bias = kernel.weight, kernel.bias
        self.backwards = backwards

    def forward(self, x: Tensor) -> Tensor:
        num_channels, _, kernel_size = self.weight.shape
        reach, length = kernel_size - 1, x.shape[1]
        weight, first = (self.weight.flip(-1), reach) if self.backwards else (self.weight, 0)
        # This image, one pixel high, is in the channels_last format already, so it needs no copy.
        image = x.transpose(1, 2)[:, :, None]
        convolved = conv2d(image, weight[:, :, None], self.bias, padding=(0, reach), groups=num_channels)
        return convolved[:, :, 0, first : first + length].transpose(1, 2)


class DartVimTimeSteps(nn.Module):
    """Time steps of each channel: (B, L, rank) -> Δ (B, L, E), in float32 at least.

    Together with the rates of decay they decide how far back a state remembers. Half precision would blur this. This
    is no `nn.Linear`, because adapters and quantisers would treat it as a linear layer.
    """

    def __init__(self, rank: int, num_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_channels, rank))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        delta = linear(x, self.weight)
        precise = torch.promote_types(delta.dtype, torch.float32)
        return softplus(delta.to(precise) + self.bias.to(precise))


class DartVimOutput(nn.Linear):
    """The mixer's last projection. A class of its own, because `_init_weights` gives it a smaller range."""


class DartVimNorm(nn.RMSNorm):
    """RMSNorm that computes in the input's dtype and returns the weights' dtype.

    The residual stream is float32 at least, also where the weights are in half precision.
    """

    def forward(self, residual: Tensor) -> Tensor:
        weight = self.weight.to(residual.dtype)
        return rms_norm(residual, self.normalized_shape, weight, self.eps).to(self.weight.dtype)


class DartVimScan(nn.Module):
    """One direction of a Mamba layer: a convolution and a selective scan. (B, L, E) -> (B, L, E)."""

    def __init__(self, config: DartVimConfig, backwards: bool) -> None:
        super().__init__()
        self.backwards = backwards
        channels, rank = config.expand * config.hidden_size, config.time_step_rank
        self.sizes = (rank, config.state_size, config.state_size)
        self.conv1d = DartVimConvolution(channels, config.conv_kernel, backwards)
        self.x_proj = nn.Linear(channels, sum(self.sizes), bias=False)
        self.dt_proj = DartVimTimeSteps(rank, channels)
        # As in the published files: the logarithms of the decay rates, and the skip connection.
        self.A_log = nn.Parameter(torch.zeros(channels, config.state_size))
        self.D = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = silu(self.conv1d(x))
        steps, B, C = self.x_proj(x).split(self.sizes, dim=-1)
        delta = self.dt_proj(steps)
        y = selective_scan(x, delta, -self.A_log.to(delta.dtype).exp(), B, C, self.backwards)
        return torch.addcmul(y, x, self.D.to(x.dtype))


class DartVimMixer(nn.Module):
    """Bidirectional Mamba: both directions read the same projection, and a gate weighs their sum.

    (B, L, D) -> (B, L, D).
    """

    def __init__(self, config: DartVimConfig) -> None:
        super().__init__()
        channels = config.expand * config.hidden_size
        self.in_proj = nn.Linear(config.hidden_size, 2 * channels, bias=False)
        self.forward_scan = DartVimScan(config, backwards=False)
        self.backward_scan = DartVimScan(config, backwards=True)
        self.out_proj = DartVimOutput(channels, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x, gate = self.in_proj(hidden_states).chunk(2, dim=-1)
        y = self.forward_scan(x) + self.backward_scan(x)
        return self.out_proj(y * silu(gate)) / 2


class DartVimLayer(GradientCheckpointingLayer):
    """Pre-norm block with stochastic depth. (B, L, D) -> (B, L, D), in the precision of its input."""

    def __init__(self, config: DartVimConfig, drop_path_rate: float) -> None:
        super().__init__()
        self.norm = DartVimNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mixer = DartVimMixer(config)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, residual: Tensor) -> Tensor:
        return residual + self.drop_path(self.mixer(self.norm(residual)))


class DartVimPreTrainedModel(RegionPreTrainedModel):
    """Weights and loading of the models below."""

    config: DartVimConfig
    config_class = DartVimConfig
    base_model_prefix = "dart_vim"
    # The scorer has a unit of its own under FSDP, where a unit has one precision.
    _no_split_modules = ["RegionTokenizer", "RegionScorer", "DartVimLayer"]
    _can_record_outputs = {"hidden_states": DartVimLayer}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, DartVimModel):
            init.trunc_normal_(module.cls_token, std=self.config.initializer_range)
        elif isinstance(module, DartVimConvolution):
            # As torch initialises a convolution: the linear layers' range is too small for four weights a channel.
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            init.zeros_(module.bias)
        elif isinstance(module, DartVimTimeSteps):
            self._init_time_steps(module)
        elif isinstance(module, DartVimScan):
            # Decay rates 1, 2, 3…
            rates = torch.arange(1, module.A_log.shape[1] + 1, device=module.A_log.device, dtype=torch.float32)
            init.copy_(module.A_log, rates.log().expand_as(module.A_log))
            init.ones_(module.D)
        elif isinstance(module, DartVimOutput):
            # All layers add to the residual stream, so each starts with a share.
            init.trunc_normal_(
                module.weight, std=self.config.initializer_range / math.sqrt(self.config.num_hidden_layers)
            )
        else:
            super()._init_weights(module)

    def _init_time_steps(self, module: DartVimTimeSteps) -> None:
        """As in Mamba: the new time steps are spread evenly over the logarithm of their range."""
        bound = module.weight.shape[1] ** -0.5
        init.uniform_(module.weight, -bound, bound)
        logarithms = torch.empty_like(module.bias, dtype=torch.float32)
        logarithms.uniform_(math.log(self.config.time_step_min), math.log(self.config.time_step_max))
        steps = logarithms.exp()
        # The inverse of softplus.
        init.copy_(module.bias, steps + torch.log(-torch.expm1(-steps)))


class DartVimModel(DartVimPreTrainedModel):
    """The region tokenizer and a Vision Mamba encoder, without a head."""

    def __init__(self, config: DartVimConfig) -> None:
        super().__init__(config)
        self.tokenizer = RegionTokenizer(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.layers = nn.ModuleList(
            DartVimLayer(config, rate) for rate in drop_path_rates(config.drop_path_rate, config.num_hidden_layers)
        )
        self.norm = DartVimNorm(config.hidden_size, eps=config.layer_norm_eps)
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
            num_patches: Token budget N of this call. The default is `config.num_patches`.
            output_regions: Also return `regions`: where the tokens are.

        Returns:
            `last_hidden_state` (B, N + 1, D): the regions in their order, with the class token between them at index
            ⌊N/2⌋. `pooler_output` (B, D), the normalised class token. With `output_regions` `regions`. There are no
            attentions.

        Raises:
            ValueError: See [`RegionPartitioner.check`].
        """
        tokens, class_position, regions = self.tokenizer(pixel_values, num_patches, self.look)
        outputs = self.encode(tokens, class_position, return_dict=True, **kwargs)
        outputs.regions = regions if output_regions else None
        return outputs

    # Not `forward`, in which the layers also run for the scorer "encoder".
    @capture_outputs(tie_last_hidden_states=False)
    def encode(self, tokens: Tensor, class_position: Tensor, **kwargs: Unpack[TransformersKwargs]) -> DartModelOutput:
        """Encode tokens (B, N, D), given the class token's position (1, 1, D); see [`forward`]."""
        residual = self.with_class_token(tokens, class_position)
        for layer in self.layers:
            residual = layer(residual)
        hidden_states = self.norm(residual)
        # A slice, because with an index `torch.compile` would make a graph for each number of tokens.
        middle = tokens.shape[1] // 2
        return DartModelOutput(
            last_hidden_state=hidden_states, pooler_output=hidden_states[:, middle : middle + 1].squeeze(1)
        )

    def with_class_token(self, tokens: Tensor, class_position: Tensor) -> Tensor:
        """Tokens (B, N, D), with the class token in their middle, in float32 at least."""
        middle = tokens.shape[1] // 2
        class_token = self.cls_token.to(class_position.device) + class_position
        class_token = class_token.expand(tokens.shape[0], -1, -1).to(tokens.dtype)
        residual = torch.cat([tokens[:, :middle], class_token, tokens[:, middle:]], dim=1)
        # In half precision the sum over all layers would round away the small terms of single layers.
        return residual.to(torch.promote_types(residual.dtype, torch.float32))

    def first_layers(self, images: Tensor, num_layers: int) -> Tensor:
        tokens, class_position = self.tokenizer.embed_grid(images)
        residual = self.with_class_token(tokens, class_position)
        for layer in self.layers[:num_layers]:
            residual = layer(residual)
        middle, grid = tokens.shape[1] // 2, (self.config.score_grid_size, self.config.score_grid_size)
        residual = torch.cat([residual[:, :middle], residual[:, middle + 1 :]], dim=1)
        return residual.transpose(1, 2).unflatten(2, grid)


class DartVimForImageClassification(ImageClassifierMixin, DartVimPreTrainedModel):
    """DART-Vim with a linear classifier on the class token."""

    def __init__(self, config: DartVimConfig) -> None:
        super().__init__(config, DartVimModel(config), config.hidden_size)
        self.post_init()


__all__ = ["DartVimForImageClassification", "DartVimModel", "DartVimPreTrainedModel"]
