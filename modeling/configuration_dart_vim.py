"""Configuration of DART with a Vision Mamba encoder."""

import math
from typing import Any, ClassVar, Literal

from .configuration_region import RegionTokenizerConfig, checked


@checked
class DartVimConfig(RegionTokenizerConfig):
    """Configuration of DART with a Vision Mamba encoder (Vim, arXiv 2401.09417). The defaults are DART-Vim-Ti.

    Presets are `"tiny"` (DART-Vim-Ti) and `"small"` (DART-Vim-S). The tokenizer's settings are those of
    [`RegionTokenizerConfig`]. The encoder's have the names of transformers' Mamba:

    Args:
        num_hidden_layers: Number of blocks.
        expand: Channels of a mixer, as a multiple of the token width.
        state_size: Size of the state that a scan keeps for each channel.
        conv_kernel: Number of tokens that the convolution before a scan reads: the current one and those before it.
        time_step_rank: Width of the bottleneck that computes the time steps. `None` sets it to ⌈hidden_size / 16⌉.
        time_step_min, time_step_max: Range of the time steps of a new model.
        layer_norm_eps: Epsilon of the RMSNorms.
        drop_path_rate: Stochastic depth of the last block. It grows linearly from 0 at the first block.
    """

    model_type = "dart_vim"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {},
        "small": {"hidden_size": 384, "scorer": "mobilenet_v3_large"},
    }

    at_least_1: ClassVar[set[str]] = RegionTokenizerConfig.at_least_1.union(
        ("num_hidden_layers", "expand", "state_size", "conv_kernel", "time_step_rank")
    )

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
        if not 0 < self.time_step_min <= self.time_step_max:
            raise ValueError(
                f"time_step_min must be above 0 and at most time_step_max, got {self.time_step_min} and "
                f"{self.time_step_max}."
            )


__all__ = ["DartVimConfig"]
