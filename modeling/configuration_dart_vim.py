"""Configuration of DART with a Vision Mamba encoder."""

import math
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict

from .configuration_region import RegionTokenizerConfig


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


__all__ = ["DartVimConfig"]
