"""Configuration of the DART models: the region tokenizer's settings and, per architecture, the encoder's."""

import math
from typing import Any, ClassVar, Literal, Self

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

TORCHVISION_TRUNKS = ("mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0", "mnasnet1_0", "squeezenet1_1")


@strict
class RegionConfig(PreTrainedConfig):
    """How images are scored and cut into regions: the settings that every DART architecture has.

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
        initializer_range: Standard deviation of the truncated normal that initialises the weights.
    """

    keys_to_ignore_at_inference = ["regions"]
    # Settings by the names that `preset` takes.
    presets: ClassVar[dict[str, dict[str, Any]]] = {}

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
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        if self.scorer_frozen is None:
            self.scorer_frozen = self.scorer != "conv"
        super().__post_init__(**kwargs)
        self._check_regions()

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """The published settings by their name, one of `cls.presets`. `overrides` replace single settings.

        Raises:
            ValueError: `name` is no preset.
        """
        if name not in cls.presets:
            raise ValueError(f"preset must be one of {', '.join(map(repr, cls.presets))}, got {name!r}.")
        return cls(**{**cls.presets[name], **overrides})

    # Not `@strict` validators, whose errors are no ValueErrors.

    def _check_regions(self) -> None:
        self._check_at_least_1("image_size", "patch_size", "num_channels", "num_patches", "score_grid_size")
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

    def _check_at_least_1(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")

    def _check_activation(self) -> None:
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is unknown: accepted are {', '.join(ACT2FN)}.")


@strict
class RegionTokenizerConfig(RegionConfig):
    """Settings of the region tokenizer, for the architectures that read tokens.

    Those of [`RegionConfig`], and:

    Args:
        hidden_size: Width D of a token.
    """

    hidden_size: int = 192

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self._check_at_least_1("hidden_size")


@strict
class DartConfig(RegionTokenizerConfig):
    """Configuration of DART with a ViT (DeiT) encoder. The defaults are the published DART-DeiT-Ti.

    Presets are `"tiny"` (DART-DeiT-Ti), `"small"` (DART-DeiT-S) and `"base"` (DeiT-B's encoder, small's scorer). The
    tokenizer's settings are those of [`RegionTokenizerConfig`]; the encoder's are transformers' own names, and:

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
    presets: ClassVar[dict[str, dict[str, Any]]] = {
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
        self._check_at_least_1("num_hidden_layers", "intermediate_size")
        self._check_activation()
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {self.hidden_size} and "
                f"{self.num_attention_heads}."
            )
        if self.distillation_head and not self.distillation_token:
            raise ValueError("distillation_head=True needs distillation_token=True, the token that the head reads.")


@strict
class DartVimConfig(RegionTokenizerConfig):
    """Configuration of DART with a Vision Mamba encoder (Vim, arXiv 2401.09417). The defaults are DART-Vim-Ti.

    Presets are `"tiny"` (DART-Vim-Ti) and `"small"` (DART-Vim-S). The tokenizer's settings are those of
    [`RegionTokenizerConfig`]; the encoder's are those of transformers' Mamba:

    Args:
        num_hidden_layers: Number of blocks.
        expand: How many times wider than a token the mixers' channels are.
        state_size: Numbers that each channel remembers.
        conv_kernel: Tokens that the convolution in front of a scan sees: the current one and those before it.
        time_step_rank: Width of the bottleneck that the time step comes from; `None` stands for ⌈hidden_size / 16⌉,
            which then takes its place.
        time_step_min, time_step_max: Range of the time steps of a new model.
        layer_norm_eps: Of the RMSNorms.
        drop_path_rate: Of the last block; it grows linearly from the first.
    """

    model_type = "dart_vim"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {},
        "small": {"hidden_size": 384, "scorer": "mobilenet_v3_large"},
    }

    scorer_head: Literal["v1", "v2"] = "v2"
    num_hidden_layers: int = 24
    expand: int = 2
    state_size: int = 16
    conv_kernel: int = 4
    time_step_rank: int | None = None
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    drop_path_rate: float | int = 0.0
    layer_norm_eps: float = 1e-5

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.time_step_rank is None:
            self.time_step_rank = math.ceil(self.hidden_size / 16)
        self._check_at_least_1("num_hidden_layers", "expand", "state_size", "conv_kernel", "time_step_rank")
        if not 0 < self.time_step_min <= self.time_step_max:
            raise ValueError(
                f"time_step_min must be above 0 and at most time_step_max, got {self.time_step_min} and "
                f"{self.time_step_max}."
            )


@strict
class DartRmtConfig(RegionConfig):
    """Configuration of DART with a hierarchical encoder (RMT, arXiv 2309.11523). The defaults are RMT-S.

    Presets are `"small"` (RMT-S) and `"L6"`, the encoder of the published DART-RMT. The regions are put together
    again to an image of 16·R × 16·C pixels, so `num_patches` is R·C, and `partition` `"grid"` or `"uniform"`. The other
    settings of the regions are those of [`RegionConfig`]; the encoder's, with one entry per stage:

    Args:
        hidden_sizes: Channels.
        depths: Blocks.
        num_attention_heads: Heads.
        mlp_ratios: Width of a block's MLP, as a multiple of its channels.
        decay_starts, decay_ranges: Head h of n forgets by log(1 - 2^(-start - range·h/n)) for every step of distance.
        chunkwise: Whether the blocks attend along the rows and then along the columns, and not over all positions.
        layer_scale: Whether the blocks scale what they add to their input.
        layer_scale_init_value: At the start of training.
        projection_size: Channels of the last map, of which the classifier sees the mean.
        layer_norm_eps: Of the LayerNorms.
        drop_path_rate: Of the last block; it grows linearly from the first.
        first_strip_edge: Where the strip of a `"grid"` partition starts, in pixels. The published weights were trained
            with 2, which leaves out the first two columns of the topmost band.
    """

    model_type = "dart_rmt"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "small": {},
        "L6": {
            "hidden_sizes": (112, 224, 448, 640),
            "depths": (4, 8, 25, 8),
            "num_attention_heads": (7, 7, 14, 20),
            "decay_ranges": (6, 6, 6, 6),
            "layer_scale": (False, False, True, True),
            "drop_path_rate": 0.5,
        },
    }

    partition: Literal["grid", "uniform"] = "grid"
    scorer: str = "efficientnet_b0"
    hidden_sizes: list[int] | tuple[int, ...] = (64, 128, 256, 512)
    depths: list[int] | tuple[int, ...] = (3, 4, 18, 4)
    num_attention_heads: list[int] | tuple[int, ...] = (4, 4, 8, 16)
    mlp_ratios: list[int] | tuple[int, ...] = (4, 4, 3, 3)
    decay_starts: list[int] | tuple[int, ...] = (2, 2, 2, 2)
    decay_ranges: list[int] | tuple[int, ...] = (4, 4, 6, 6)
    chunkwise: list[bool] | tuple[bool, ...] = (True, True, True, False)
    layer_scale: list[bool] | tuple[bool, ...] = (False, False, False, False)
    layer_scale_init_value: float = 1e-6
    projection_size: int = 1024
    hidden_act: str = "gelu"
    drop_path_rate: float | int = 0.15
    layer_norm_eps: float = 1e-6
    first_strip_edge: float | int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self._check_activation()
        self._check_at_least_1("projection_size")
        # As they come back from JSON, so that a saved configuration equals the one before.
        for name in RMT_STAGE_SETTINGS:
            setattr(self, name, list(getattr(self, name)))
        given = {name: len(getattr(self, name)) for name in RMT_STAGE_SETTINGS}
        if not self.depths or len(set(given.values())) > 1:
            lengths = ", ".join(f"{name} {length}" for name, length in given.items())
            raise ValueError(f"The settings of the stages must have one entry for each stage, got {lengths}.")
        for name in ("hidden_sizes", "depths", "num_attention_heads", "mlp_ratios"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1 in every stage, got {getattr(self, name)}.")
        for width, heads in zip(self.hidden_sizes, self.num_attention_heads, strict=True):
            # The rotation of queries and keys turns pairs of channels.
            if width % (2 * heads):
                raise ValueError(
                    f"hidden_sizes must be multiples of twice num_attention_heads, got {width} and {heads}."
                )
        for start, extent, heads in zip(self.decay_starts, self.decay_ranges, self.num_attention_heads, strict=True):
            if min(start, start + extent * (heads - 1) / heads) <= 0:
                raise ValueError(
                    f"decay_starts and decay_ranges must leave every head above 0, got {start} and {extent} for "
                    f"{heads} heads."
                )
        if self.first_strip_edge < 0:
            raise ValueError(f"first_strip_edge must be at least 0, got {self.first_strip_edge}.")


RMT_STAGE_SETTINGS = (
    "hidden_sizes",
    "depths",
    "num_attention_heads",
    "mlp_ratios",
    "decay_starts",
    "decay_ranges",
    "chunkwise",
    "layer_scale",
)


__all__ = ["DartConfig", "DartRmtConfig", "DartVimConfig", "RegionConfig", "RegionTokenizerConfig"]
