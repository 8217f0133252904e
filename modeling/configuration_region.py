"""Settings that every DART architecture shares: how images are scored, cut into regions and made into tokens."""

import difflib
import functools
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, ClassVar, Literal, Self, get_args, get_origin

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

TORCHVISION_TRUNKS = ("mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0", "mnasnet1_0", "squeezenet1_1")
# Scorers without a network of their own.
SCORERS_WITHOUT_TRUNK = ("detail", "encoder")
# Settings that have a range in every configuration that has them.
PROBABILITIES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate")
NOT_NEGATIVE = ("layer_norm_eps", "initializer_range", "first_strip_edge", "scorer_layers")


def checked(config_class: type) -> type:
    """As `strict`, which checks the type of every setting when it is given and when it is set later.

    A setting of the wrong type or out of its range (`at_least_1` names those from 1) is a ValueError in one sentence.
    """
    config_class = strict(config_class)
    types = {field.name: field.type for field in fields(config_class)}
    set_checked = config_class.__setattr__

    def set_setting(self: PreTrainedConfig, name: str, value: Any) -> None:
        try:
            set_checked(self, name, value)
        except StrictDataclassError as error:
            raise ValueError(f"{name} must be {_accepted(types[name])}, got {value!r}.") from error
        if name in config_class.at_least_1 and value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
        if name in PROBABILITIES and not 0 <= value <= 1:
            raise ValueError(f"{name} must be from 0 to 1, got {value}.")
        if name in NOT_NEGATIVE and not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}.")

    validate_checked = config_class.validate

    @functools.wraps(validate_checked)
    def validate(self: PreTrainedConfig) -> None:
        try:
            validate_checked(self)
        except StrictDataclassError as error:
            raise ValueError(str(error.__cause__)) from error

    config_class.__setattr__, config_class.validate = set_setting, validate
    return config_class


def _accepted(hint: Any) -> str:
    """A type in words: `Literal["a", "b"]` -> "'a' or 'b'"."""
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    return hint.__name__ if isinstance(hint, type) else str(hint).replace(" | ", " or ")


@checked
class RegionConfig(PreTrainedConfig):
    """Settings that every DART architecture has: how images are scored and cut into regions.

    A setting out of range or of the wrong type is a ValueError. An unknown setting whose name is close to a known one
    is named in a warning.

    Args:
        image_size: Side in pixels of the square images that the model is meant for (published checkpoints: 448). The
            model itself reads any height and width.
        patch_size: Side in pixels of a region after resampling.
        num_channels: Channels of `pixel_values`. torchvision trunks read 3.
        num_patches: Token budget N, not counting the class token. Any call may pass another one.
        partition: How the image is cut: `"flow"` (any N; regions follow the content along R bands), `"grid"`
            (N = R·C; one set of columns for all rows) or `"uniform"` (equal regions; the scorer does not run).
        score_grid_size: Side G of the score grid and of the position table.
        scorer: Trunk of the scoring network: a torchvision name (`mobilenet_v3_small`, `mobilenet_v3_large`,
            `efficientnet_b0`, `mnasnet1_0`, `squeezenet1_1`), `timm/<name>` for any timm feature extractor, or
            `"conv"` (a few strided convolutions, trained from scratch). Two scorers have no trunk: `"detail"` scores
            the local contrast, without a network; `"encoder"` reads the model's own first layers, run on a plain grid
            of the resized image.
        scorer_layers: How many of its first layers (RMT: stages) the model runs for `scorer="encoder"`. With 0 these
            are the embedding of patches and positions only (RMT: the stem).
        scorer_head: `"v1"` scores each cell by a small MLP, `"v2"` sums gated channels. The names are those of the
            published checkpoints. `"detail"` has a head of its own and ignores this.
        scorer_frozen: Keep the trunk in evaluation mode and without gradient. `None` freezes every trunk except
            `"conv"`. Always `True` without a trunk: there is nothing to train but the head.
        score_normalization: How the scores are standardised. `"running"`: by batch statistics in training, and by
            running statistics in evaluation. `"image"`: each image by itself. `"batch"`: by batch statistics, in
            evaluation too (the published rule: an image's tokens depend on the other images of its batch).
        initializer_range: Standard deviation of the truncated normal that initialises the weights.
    """

    keys_to_ignore_at_inference = ["regions"]
    # Settings by the names that `preset` takes.
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    at_least_1: ClassVar[set[str]] = {"image_size", "patch_size", "num_channels", "num_patches", "score_grid_size"}

    image_size: int = 448
    patch_size: int = 16
    num_channels: int = 3
    num_patches: int = 196
    partition: Literal["flow", "grid", "uniform"] = "flow"
    score_grid_size: int = 14
    scorer: str = "mobilenet_v3_small"
    scorer_layers: int = 0
    scorer_head: Literal["v1", "v2"] = "v1"
    scorer_frozen: bool | None = None
    score_normalization: Literal["running", "image", "batch"] = "running"
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        self._warn_of_misspelled(kwargs)
        if self.scorer_frozen is None or self.scorer in SCORERS_WITHOUT_TRUNK:
            self.scorer_frozen = self.scorer != "conv"
        super().__post_init__(**kwargs)
        self._check_scorer()

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """The published settings by their name, one of `cls.presets`. `overrides` replace single settings.

        Raises:
            ValueError: `name` is no preset, or an override is out of range.
        """
        if name not in cls.presets:
            raise ValueError(f"preset must be one of {', '.join(map(repr, cls.presets))}, got {name!r}.")
        return cls(**{**cls.presets[name], **overrides})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self | tuple[Self, dict[str, Any]]:
        """Load as transformers does, and check the settings in `kwargs` together with the others."""
        ours = {field.name for field in fields(cls)} - {field.name for field in fields(PreTrainedConfig)}
        overrides = {name: kwargs.pop(name) for name in ours & kwargs.keys()}
        cls._warn_of_misspelled(kwargs)
        return super().from_dict({**config_dict, **overrides}, **kwargs)

    @classmethod
    def _warn_of_misspelled(cls, names: Iterable[str]) -> None:
        known = [field.name for field in fields(cls)]
        for name in names:
            close = [] if hasattr(cls, name) else difflib.get_close_matches(name, known, n=1, cutoff=0.85)
            if close:
                logger.warning(f"{cls.__name__} has no setting {name!r}: it has no effect. Did you mean {close[0]!r}?")

    @property
    def layer_widths(self) -> list[int]:
        """Channels of the encoder's map after 0, 1, 2… of its first layers, see [`RegionPreTrainedModel.look`]."""
        return [self.hidden_size] * (1 + self.num_hidden_layers)

    def _check_scorer(self) -> None:
        if self.scorer in TORCHVISION_TRUNKS:
            if self.num_channels != 3:
                raise ValueError(
                    f"scorer={self.scorer!r} reads 3 channels, got num_channels={self.num_channels}: use "
                    "scorer='conv', 'detail', 'encoder' or a 'timm/<name>' trunk."
                )
        elif self.scorer == "timm/":
            raise ValueError("scorer='timm/' names no timm model, e.g. 'timm/resnet18'.")
        elif self.scorer not in ("conv", *SCORERS_WITHOUT_TRUNK) and not self.scorer.startswith("timm/"):
            raise ValueError(
                f"scorer={self.scorer!r} is unknown: accepted are 'conv', 'detail', 'encoder', 'timm/<name>', "
                f"{', '.join(map(repr, TORCHVISION_TRUNKS))}."
            )
        if self.scorer_layers and self.scorer != "encoder":
            raise ValueError(f"scorer_layers={self.scorer_layers} needs scorer='encoder', got {self.scorer!r}.")
        if self.scorer_layers and self.scorer_layers >= len(self.layer_widths):
            raise ValueError(
                f"scorer_layers must be at most {len(self.layer_widths) - 1}, as many as the encoder has, got "
                f"{self.scorer_layers}."
            )

    def _check_activation(self) -> None:
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is unknown: accepted are {', '.join(ACT2FN)}.")


@checked
class RegionTokenizerConfig(RegionConfig):
    """Settings of the region tokenizer, for the architectures that read tokens.

    In addition to those of [`RegionConfig`]:

    Args:
        hidden_size: Width D of a token.
    """

    at_least_1: ClassVar[set[str]] = RegionConfig.at_least_1 | {"hidden_size"}

    hidden_size: int = 192


__all__ = ["RegionConfig", "RegionTokenizerConfig"]
