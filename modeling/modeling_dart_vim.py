"""DART with a Vision Mamba encoder (Vim, arXiv 2401.09417)."""

import functools
import math
from typing import Any

import torch
from timm.layers import DropPath
from torch import nn
from torch.nn.functional import conv2d, linear, rms_norm, silu, softplus
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_dart_vim import DartVimConfig
from .modeling_dart_base import DartModelOutput, ImageClassifierMixin, RegionPreTrainedModel, drop_path_rates
from .region_tokenizer import RegionTokenizer
from .selective_scan import selective_scan

# The log1p in softplus reads one of its constants for -0 alone. Until somebody does, the constant's page may be missing
# in memory, and an AMD processor with AVX-512 takes ten times as long to find out that a vector has no such number.
torch.log1p(torch.full((64,), -0.0, dtype=torch.float32, device="cpu"))


def _convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, **settings: Any) -> torch.Tensor:
    """Along the tokens (B, L, E), by weights (F, E, K) -> (B, L', F)."""
    # As an image one pixel high with its channels side by side in memory, which is read as it is.
    image = x.transpose(1, 2)[:, :, None]
    return conv2d(image, weight[:, :, None], bias, **settings)[:, :, 0].transpose(1, 2)


@functools.cache
def _mkl_is_slow() -> bool:
    """Whether PyTorch's library for products of matrices, MKL, leaves half of this processor's vectors empty.

    It takes AVX-512 on Intel's processors only; oneDNN, PyTorch's library for convolutions, on AMD's too.
    """
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    # Not in older releases of PyTorch.
    processor = getattr(torch.cpu, "get_capabilities", dict)()
    return processor.get("avx512_f", False) and processor.get("cpu_name", "").startswith("AMD")


def _project(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A linear layer (B, L, D) -> (B, L, F), as a convolution where that is faster."""
    if _is_eager_float32(x) and _mkl_is_slow() and _is_as_made(layer):
        return _convolve(x, layer.weight[..., None], layer.bias)
    return layer(x)


def _is_as_made(layer: nn.Module) -> bool:
    """Whether nobody has put another layer in its place, another kind of weights into it, or a call around it."""
    hooks = layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks
    if type(layer) not in (nn.Linear, DartVimOutput) or "forward" in vars(layer) or any(hooks):
        return False
    weight = layer.weight
    return type(weight) is nn.Parameter and weight.dtype == torch.float32 and weight.layout == torch.strided


def _is_eager_float32(x: torch.Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):
        return False
    # On one thread PyTorch convolves few images with MKL, too.
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0 and torch.get_num_threads() > 1


class DartVimConvolution(nn.Conv1d):
    """Each token and the few before it in the direction of the scan, channel by channel: (B, L, E) -> (B, L, E)."""

    def __init__(self, num_channels: int, kernel_size: int, backwards: bool) -> None:
        super().__init__(num_channels, num_channels, kernel_size, groups=num_channels)
        self.backwards = backwards

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        reach, length = self.kernel_size[0] - 1, x.shape[1]
        weight, first = (self.weight.flip(-1), reach) if self.backwards else (self.weight, 0)
        convolved = _convolve(x, weight, self.bias, padding=(0, reach), groups=self.groups)
        return convolved[:, first : first + length]


class DartVimTimeSteps(nn.Module):
    """Time steps of each channel: (B, L, rank) -> Δ (B, L, E), in float32 at least.

    With the rates of decay they decide how far back a state remembers, which half precision would blur. This is no
    `nn.Linear`, which others might extend or replace as if it were linear.
    """

    def __init__(self, rank: int, num_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_channels, rank))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        delta = linear(x, self.weight)
        precise = torch.promote_types(delta.dtype, torch.float32)
        return softplus(delta.to(precise) + self.bias.to(precise))


class DartVimOutput(nn.Linear):
    """What a mixer adds to the residual stream. Loading initialises by the class of what has the missing weight."""


class DartVimNorm(nn.RMSNorm):
    """RMSNorm of what is summed in more precision than the weights have, which the result has."""

    def forward(self, residual: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(residual.dtype)
        return rms_norm(residual, self.normalized_shape, weight, self.eps).to(self.weight.dtype)


class DartVimScan(nn.Module):
    """A Mamba layer's path through the tokens in one direction: convolution, selective scan. (B, L, E) -> (B, L, E)."""

    def __init__(self, config: DartVimConfig, backwards: bool) -> None:
        super().__init__()
        self.backwards = backwards
        channels, rank = config.expand * config.hidden_size, config.time_step_rank
        self.sizes = (rank, config.state_size, config.state_size)
        self.conv1d = DartVimConvolution(channels, config.conv_kernel, backwards)
        self.x_proj = nn.Linear(channels, sum(self.sizes), bias=False)
        self.dt_proj = DartVimTimeSteps(rank, channels)
        # The published names of the rates of decay, in logarithms, and of the skip connection.
        self.A_log = nn.Parameter(torch.zeros(channels, config.state_size))
        self.D = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = silu(self.conv1d(x))
        steps, B, C = _project(self.x_proj, x).split(self.sizes, dim=-1)
        delta = self.dt_proj(steps)
        y = selective_scan(x, delta, -self.A_log.to(delta.dtype).exp(), B, C, self.backwards)
        return torch.addcmul(y, x, self.D.to(x.dtype))


class DartVimMixer(nn.Module):
    """Bidirectional Mamba: what both directions find in the same projection, gated. (B, L, D) -> (B, L, D)."""

    def __init__(self, config: DartVimConfig) -> None:
        super().__init__()
        channels = config.expand * config.hidden_size
        self.in_proj = nn.Linear(config.hidden_size, 2 * channels, bias=False)
        self.forward_scan = DartVimScan(config, backwards=False)
        self.backward_scan = DartVimScan(config, backwards=True)
        self.out_proj = DartVimOutput(channels, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x, gate = _project(self.in_proj, hidden_states).chunk(2, dim=-1)
        y = self.forward_scan(x) + self.backward_scan(x)
        return _project(self.out_proj, y * silu(gate)) / 2


class DartVimLayer(GradientCheckpointingLayer):
    """Pre-norm block with stochastic depth. (B, L, D) -> (B, L, D), in the precision of its input."""

    def __init__(self, config: DartVimConfig, drop_path_rate: float) -> None:
        super().__init__()
        self.norm = DartVimNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mixer = DartVimMixer(config)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, residual: torch.Tensor) -> torch.Tensor:
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
            # torch's own: within the range of the linear layers, four numbers per channel would let little through.
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            init.zeros_(module.bias)
        elif isinstance(module, DartVimTimeSteps):
            self._init_time_steps(module)
        elif isinstance(module, DartVimScan):
            # Rates of decay 1, 2, 3…
            rates = torch.arange(1, module.A_log.shape[1] + 1, device=module.A_log.device, dtype=torch.float32)
            init.copy_(module.A_log, rates.log().expand_as(module.A_log))
            init.ones_(module.D)
        elif isinstance(module, DartVimOutput):
            # As many layers add to the residual stream.
            init.trunc_normal_(
                module.weight, std=self.config.initializer_range / math.sqrt(self.config.num_hidden_layers)
            )
        else:
            super()._init_weights(module)

    def _init_time_steps(self, module: DartVimTimeSteps) -> None:
        """As in Mamba: spread evenly over the logarithms of their range."""
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

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        num_patches: int | None = None,
        output_regions: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DartModelOutput:
        """Encode images.

        Args:
            pixel_values: (B, C, H, W), floating point, normalised as [`DartImageProcessor`] does.
            num_patches: Token budget N of this call; `config.num_patches` without it.
            output_regions: Whether to return where the tokens are.

        Returns:
            `last_hidden_state` (B, N + 1, D): the regions in their order, and the class token in the middle, at place
            ⌊N/2⌋. `pooler_output` (B, D), the normalised class token; `regions` on request. There are no attentions.

        Raises:
            ValueError: See [`RegionPartitioner.check`].
        """
        tokens, class_position, regions = self.tokenizer(pixel_values, num_patches)
        hidden_states = self.encode(tokens, class_position)
        # A slice, because `torch.compile` would make a graph for every number that is an index.
        middle = tokens.shape[1] // 2
        return DartModelOutput(
            last_hidden_state=hidden_states,
            pooler_output=hidden_states[:, middle : middle + 1].squeeze(1),
            regions=regions if output_regions else None,
        )

    def encode(self, tokens: torch.Tensor, class_position: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, D) and the class token's position (1, 1, D) -> normalised hidden states (B, N + 1, D)."""
        middle = tokens.shape[1] // 2
        class_token = self.cls_token.to(class_position.device) + class_position
        class_token = class_token.expand(tokens.shape[0], -1, -1).to(tokens.dtype)
        residual = torch.cat([tokens[:, :middle], class_token, tokens[:, middle:]], dim=1)
        # The sum over all layers would lose what each of them adds in half precision.
        residual = residual.to(torch.promote_types(residual.dtype, torch.float32))
        for layer in self.layers:
            residual = layer(residual)
        return self.norm(residual)


class DartVimForImageClassification(ImageClassifierMixin, DartVimPreTrainedModel):
    """DART-Vim with a linear classifier on the class token."""

    def __init__(self, config: DartVimConfig) -> None:
        super().__init__(config, DartVimModel(config), config.hidden_size)
        self.post_init()


__all__ = ["DartVimForImageClassification", "DartVimModel", "DartVimPreTrainedModel"]
