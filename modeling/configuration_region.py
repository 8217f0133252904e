"""Settings that every DART architecture shares: how images are scored, cut into regions and made into tokens."""

from typing import Any, ClassVar, Literal, Self

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

TORCHVISION_TRUNKS = ("mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0", "mnasnet1_0", "squeezenet1_1")


@strict
class RegionConfig(PreTrainedConfig):
    """Settings that every DART architecture has: how images are scored and cut into regions.

    Args:
        image_size: Side in pixels of the square images that the model is meant for (published checkpoints: 448). The
            model itself reads any height and width.
        patch_size: Side in pixels of a region after resampling.
        num_channels: Channels of `pixel_values`. torchvision trunks read 3.
        num_patches: Token budget N, without the class token. Each call may pass another one.
        partition: How the image is cut. `"flow"`: regions follow the content along R bands; any N. `"grid"`: all rows
            have the same columns; N = R·C. `"uniform"`: equal regions; the scorer does not run.
        score_grid_size: Side G of the score grid and of the position table.
        scorer: Trunk of the scoring network: a torchvision name (`mobilenet_v3_small`, `mobilenet_v3_large`,
            `efficientnet_b0`, `mnasnet1_0`, `squeezenet1_1`), `timm/<name>` for any timm feature extractor, or
            `"conv"` (a few strided convolutions, trained from scratch).
        scorer_head: `"v1"` scores each cell with a small MLP. `"v2"` sums gated channels. The names are those of the
            published checkpoints.
        scorer_frozen: Keep the trunk in evaluation mode and without gradient. `None` freezes every trunk but `"conv"`.
        score_normalization: The mean and deviation that standardise an image's scores. `"running"`: those of the batch
            in training, running averages in evaluation. `"image"`: those of the image. `"batch"`: those of the batch,
            in evaluation too. `"batch"` is the published rule; it makes an image's tokens depend on the other images
            of its batch.
        initializer_range: Standard deviation of the truncated normal that initialises the weights.
    """

    keys_to_ignore_at_inference = ["regions"]
    # Name of a preset -> the settings that differ from the defaults.
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
        """Make the configuration of a published model.

        Args:
            name: One of `cls.presets`.
            overrides: Settings that replace those of the preset.

        Raises:
            ValueError: `name` is not a preset.
        """
        if name not in cls.presets:
            raise ValueError(f"preset must be one of {', '.join(map(repr, cls.presets))}, got {name!r}.")
        return cls(**{**cls.presets[name], **overrides})

    # These are not `@strict` validators, because the errors of those are not ValueErrors.

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

    It has the settings of [`RegionConfig`] and one more:

    Args:
        hidden_size: Width D of a token.
    """

    hidden_size: int = 192

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self._check_at_least_1("hidden_size")


__all__ = ["RegionConfig", "RegionTokenizerConfig"]
