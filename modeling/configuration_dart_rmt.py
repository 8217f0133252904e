"""Configuration of DART with a hierarchical encoder, RMT."""

from typing import Any, ClassVar, Literal

from .configuration_region import RegionConfig, checked


@checked
class DartRmtConfig(RegionConfig):
    """Configuration of DART with a hierarchical encoder (RMT, arXiv 2309.11523). The defaults are RMT-S.

    Presets are `"small"` (RMT-S) and `"L6"`, the encoder of the published DART-RMT. The encoder reads an image of
    16·R × 16·C pixels that is rebuilt from the regions, so `num_patches` is R·C, and `partition` is `"grid"` or
    `"uniform"`. The other settings of the regions are those of [`RegionConfig`]. Most of the encoder's have one entry
    for each stage:

    Args:
        hidden_sizes: Channels.
        depths: Number of blocks.
        num_attention_heads: Number of attention heads.
        mlp_ratios: Width of a block's MLP, as a multiple of its channels.
        decay_starts, decay_ranges: For each step of distance, head h of n adds log(1 - 2^(-start - range·h/n)) to its
            attention logits.
        chunkwise: Attend along the rows and then along the columns, instead of over all positions.
        layer_scale: Scale the output of each residual branch.
        layer_scale_init_value: Initial value of that scale.
        projection_size: Channels of the last map. The classifier reads its mean.
        layer_norm_eps: Epsilon of the LayerNorms.
        drop_path_rate: Stochastic depth of the last block. It grows linearly from 0 at the first block.
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

    at_least_1: ClassVar[set[str]] = RegionConfig.at_least_1 | {"projection_size"}

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
        # Lists, as JSON has them: a saved and loaded configuration equals the original.
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
            # Queries and keys are rotated in pairs of channels.
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

    @property
    def layer_widths(self) -> list[int]:
        """Channels after the stem, and after each stage with its step down to the next."""
        return [*self.hidden_sizes, self.hidden_sizes[-1]]


# The settings that have one entry for each stage.
RMT_STAGE_SETTINGS = [name for name, hint in DartRmtConfig.__annotations__.items() if "tuple" in str(hint)]


__all__ = ["DartRmtConfig"]
