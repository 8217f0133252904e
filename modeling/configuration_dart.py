"""Configuration of the DART models: the region tokenizer's settings and, per architecture, the encoder's."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

TORCHVISION_TRUNKS = ("mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0", "mnasnet1_0", "squeezenet1_1")


@strict
class RegionTokenizerConfig(PreTrainedConfig):
    """Settings of the region tokenizer, shared by every DART architecture.

    Args:
        image_size: Side in pixels of the square images that the model is meant for (published checkpoints: 448). The
            model itself reads any height and width.
        patch_size: Side in pixels of a region after resampling.
        num_channels: Channels of `pixel_values`. torchvision trunks read 3.
        num_patches: Token budget N, the class token not counted. Any call may pass another one.
        partition: How the image is cut: `"flow"` (any N; regions follow the content along R bands), `"grid"`
            (N = R·C; one set of columns for all rows) or `"uniform"` (equal regions, the scorer is not run).
        score_grid_size: Side G of the score grid; also of the position table.
        scorer: Trunk of the scoring network: a torchvision name (`mobilenet_v3_small`, `mobilenet_v3_large`,
            `efficientnet_b0`, `mnasnet1_0`, `squeezenet1_1`), `timm/<name>` for any timm feature extractor, or
            `"conv"` (a few strided convolutions, trained from scratch).
        scorer_head: `"v1"` scores each cell by a small MLP, `"v2"` sums gated channels (named as the published
            checkpoints are).
        scorer_frozen: Whether the trunk stays in evaluation mode and without gradient. `None` freezes every trunk
            but `"conv"`.
        score_normalization: What standardises an image's scores. `"running"`: batch statistics in training, running
            statistics in evaluation. `"image"`: the image's own. `"batch"`: the batch's, in evaluation too (the
            published rule, under which an image's tokens depend on its batch neighbours).
        hidden_size: Width D of a token.
        initializer_range: Standard deviation of the truncated normal that initialises the weights.
    """

    keys_to_ignore_at_inference = ["regions"]

    image_size: int = 448
    patch_size: int = 16
    num_channels: int = 3
    num_patches: int = 196
    partition: Literal["flow", "grid", "uniform"] = "flow"
    score_grid_size: int = 14
    scorer: str = "mobilenet_v3_small"
    scorer_head: Literal["v1", "v2"] = "v1"
    scorer_frozen: bool | None = None
    score_normalization: Literal["running", "image", "batch"] = "running"
    hidden_size: int = 192
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        if self.scorer_frozen is None:
            self.scorer_frozen = self.scorer != "conv"
        super().__post_init__(**kwargs)
        self._check_region_tokenizer()

    def _check_region_tokenizer(self) -> None:
        # Not a `@strict` validator, whose errors are no ValueErrors.
        for name in ("image_size", "patch_size", "num_channels", "num_patches", "score_grid_size", "hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.scorer in TORCHVISION_TRUNKS:
            if self.num_channels != 3:
                raise ValueError(
                    f"scorer={self.scorer!r} reads 3 channels, got num_channels={self.num_channels}: use scorer='conv' "
                    "or a 'timm/<name>' trunk."
                )
        elif self.scorer != "conv" and not self.scorer.removeprefix("timm/"):
            raise ValueError("scorer='timm/' names no timm model, e.g. 'timm/resnet18'.")
        elif self.scorer != "conv" and not self.scorer.startswith("timm/"):
            raise ValueError(
                f"scorer={self.scorer!r} is unknown: accepted are 'conv', 'timm/<name>', "
                f"{', '.join(map(repr, TORCHVISION_TRUNKS))}."
            )


_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": {
        "hidden_size": 384,
        "num_attention_heads": 6,
        "intermediate_size": 1536,
        "scorer": "mobilenet_v3_large",
    },
    "base": {
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "scorer": "mobilenet_v3_large",
    },
}


@strict
class DartConfig(RegionTokenizerConfig):
    """Configuration of DART with a ViT (DeiT) encoder. The defaults are the published DART-DeiT-Ti.

    The tokenizer's settings are those of [`RegionTokenizerConfig`]; the encoder's are transformers' own names, and:

    Args:
        distillation_token: Whether a distillation token (arXiv 2012.12877) stands between the class token and the
            regions.
        distillation_head: Whether a second classifier reads the distillation token. The model's logits are then the
            mean of both.

    Example:

    ```python
    >>> from dart_hf import DartConfig, DartForImageClassification

    >>> config = DartConfig.preset("small", num_patches=392, num_labels=10)
    >>> model = DartForImageClassification(config)
    ```
    """

    model_type = "dart"
    keys_to_ignore_at_inference = ["regions", "cls_logits", "distillation_logits"]

    num_hidden_layers: int = 12
    num_attention_heads: int = 3
    intermediate_size: int = 768
    hidden_act: str = "gelu"
    qkv_bias: bool = True
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    layer_norm_eps: float = 1e-6
    distillation_token: bool = False
    distillation_head: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in ("num_hidden_layers", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is unknown: accepted are {', '.join(ACT2FN)}.")
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {self.hidden_size} and "
                f"{self.num_attention_heads}."
            )
        if self.distillation_head and not self.distillation_token:
            raise ValueError("distillation_head=True needs distillation_token=True, the token that the head reads.")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "DartConfig":
        """The published settings by size: `"tiny"` (DART-DeiT-Ti), `"small"` (DART-DeiT-S), `"base"` (DeiT-B encoder
        with small's scorer). `overrides` replace single settings.

        Raises:
            ValueError: `name` is no preset.
        """
        if name not in _PRESETS:
            raise ValueError(f"preset must be one of {', '.join(map(repr, _PRESETS))}, got {name!r}.")
        return cls(**{**_PRESETS[name], **overrides})


__all__ = ["DartConfig", "RegionTokenizerConfig"]
