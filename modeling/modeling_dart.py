"""DART with a ViT (DeiT) encoder."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_dart import DartConfig
from .modeling_dart_base import (
    DartModelOutput,
    DistilledImageClassifierOutput,
    ImageClassifierMixin,
    RegionPreTrainedModel,
    build_classifier,
    drop_path_rates,
    eager_attention_forward,
)
from .region_tokenizer import RegionTokenizer


class DartAttention(nn.Module):
    """Multi-head self-attention: (B, L, D) -> (B, Q, D) and, from the eager implementation, its weights.

    Q is L, or `num_queries`: then only the first tokens look at the others.
    """

    def __init__(self, config: DartConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: Tensor, num_queries: int | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[Tensor, Tensor | None]:
        def split_heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self,
            split_heads(self.q_proj(hidden_states[:, :num_queries])),
            split_heads(self.k_proj(hidden_states)),
            split_heads(self.v_proj(hidden_states)),
            None,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.flatten(2)), weights


class DartMLP(nn.Module):
    def __init__(self, config: DartConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class DartLayer(GradientCheckpointingLayer):
    """Pre-norm transformer block with stochastic depth."""

    def __init__(self, config: DartConfig, drop_path_rate: float) -> None:
        super().__init__()
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = DartAttention(config)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = DartMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = DropPath(drop_path_rate)

    def forward(
        self, hidden_states: Tensor, num_queries: int | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> Tensor:
        """(B, L, D) -> (B, L, D), or the first `num_queries` tokens of that."""
        attended, _ = self.attention(self.layernorm_before(hidden_states), num_queries, **kwargs)
        hidden_states = hidden_states[:, :num_queries] + self.drop_path(self.dropout(attended))
        transformed = self.mlp(self.layernorm_after(hidden_states))
        return hidden_states + self.drop_path(self.dropout(transformed))


class DartPreTrainedModel(RegionPreTrainedModel):
    """Weights and loading of the models below."""

    config: DartConfig
    config_class = DartConfig
    base_model_prefix = "dart"
    # The scorer has a unit of its own under FSDP, where a unit has one precision.
    _no_split_modules = ["RegionTokenizer", "RegionScorer", "DartLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": DartLayer, "attentions": DartAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, DartModel):
            init.trunc_normal_(module.cls_token, std=self.config.initializer_range)
            if module.distillation_token is not None:
                init.trunc_normal_(module.distillation_token, std=self.config.initializer_range)
        else:
            super()._init_weights(module)


class DartModel(DartPreTrainedModel):
    """The region tokenizer and a ViT encoder, without a head."""

    def __init__(self, config: DartConfig) -> None:
        super().__init__(config)
        self.tokenizer = RegionTokenizer(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        # It is always the second token, so it contains its position, and the position table has no row for it.
        self.distillation_token = (
            nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if config.distillation_token else None
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(
            DartLayer(config, rate) for rate in drop_path_rates(config.drop_path_rate, config.num_hidden_layers)
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @can_return_tuple
    @merge_with_config_defaults
    def forward(
        self,
        pixel_values: Tensor,
        num_patches: int | None = None,
        output_regions: bool = False,
        class_token_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DartModelOutput:
        """Encode images.

        Args:
            pixel_values: (B, C, H, W), floating point, normalised as [`DartImageProcessor`] does.
            num_patches: Token budget N of this call. The default is `config.num_patches`.
            output_regions: Also return `regions`: where the tokens are.
            class_token_only: Compute only the class token (and the distillation token) in the last layer. This saves
                most of that layer's work, and leaves the regions out of `last_hidden_state`.

        Returns:
            `last_hidden_state` (B, 1 + N, D): the class token, the distillation token if there is one, and the regions.
            `pooler_output` (B, D), the normalised class token. With `output_regions` `regions`.

        Raises:
            ValueError: See [`RegionPartitioner.check`].
        """
        tokens, class_position, regions = self.tokenizer(pixel_values, num_patches, self.look)
        outputs = self.encode(tokens, class_position, class_token_only, return_dict=True, **kwargs)
        outputs.regions = regions if output_regions else None
        return outputs

    # Not `forward`, in which the layers also run for the scorer "encoder".
    @capture_outputs(tie_last_hidden_states=False)
    def encode(
        self,
        tokens: Tensor,
        class_position: Tensor,
        class_token_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DartModelOutput:
        """Encode tokens (B, N, D), given the class token's position (1, 1, D); see [`forward`]."""
        hidden_states = self.dropout(self.with_prefix(tokens, class_position))
        num_queries = hidden_states.shape[1] - tokens.shape[1] if class_token_only else None
        for layer in self.layers[:-1]:
            hidden_states = layer(hidden_states, **kwargs)
        hidden_states = self.layernorm(self.layers[-1](hidden_states, num_queries=num_queries, **kwargs))
        return DartModelOutput(last_hidden_state=hidden_states, pooler_output=hidden_states[:, 0])

    def with_prefix(self, tokens: Tensor, class_position: Tensor) -> Tensor:
        """Tokens (B, N, D), after the class token and, if there is one, the distillation token."""
        prefix = self.cls_token.to(class_position.device) + class_position
        if self.distillation_token is not None:
            prefix = torch.cat([prefix, self.distillation_token.to(prefix.device)], dim=1)
        return torch.cat([prefix.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens], dim=1)

    def first_layers(self, images: Tensor, num_layers: int) -> Tensor:
        tokens, class_position = self.tokenizer.embed_grid(images)
        hidden_states = self.with_prefix(tokens, class_position)
        for layer in self.layers[:num_layers]:
            hidden_states = layer(hidden_states)
        grid = (self.config.score_grid_size, self.config.score_grid_size)
        return hidden_states[:, -tokens.shape[1] :].transpose(1, 2).unflatten(2, grid)


class DartForImageClassification(ImageClassifierMixin, DartPreTrainedModel):
    """DART with a linear classifier on the class token.

    With `config.distillation_head` a second classifier reads the distillation token. The logits are the mean of both,
    in training too, so fine-tuning on labels trains both. The outputs also hold them apart, for a distillation loss.
    """

    def __init__(self, config: DartConfig) -> None:
        super().__init__(config, DartModel(config), config.hidden_size)
        self.distillation_classifier = (
            build_classifier(config.hidden_size, config.num_labels) if config.distillation_head else None
        )
        self.post_init()

    def base_model_arguments(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        # Hidden states and attentions are of all tokens.
        flags = (f"output_{name}" for name in self._can_record_outputs)
        return {"class_token_only": not any(kwargs.get(flag, getattr(self.config, flag, None)) for flag in flags)}

    def classify(self, outputs: DartModelOutput) -> DistilledImageClassifierOutput:
        logits = self.classifier(outputs.pooler_output)
        if self.distillation_classifier is None:
            return DistilledImageClassifierOutput(logits=logits)
        of_distillation_token = self.distillation_classifier(outputs.last_hidden_state[:, 1])
        return DistilledImageClassifierOutput(
            logits=(logits + of_distillation_token) / 2, cls_logits=logits, distillation_logits=of_distillation_token
        )


__all__ = ["DartForImageClassification", "DartModel", "DartPreTrainedModel"]
