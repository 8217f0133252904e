"""The settings of published models by short names, over all architectures."""

from typing import Any

from dart_hf.modeling.configuration_dart import DartConfig
from dart_hf.modeling.configuration_dart_rmt import DartRmtConfig
from dart_hf.modeling.configuration_dart_vim import DartVimConfig
from dart_hf.modeling.configuration_region import RegionConfig

# "tiny", "small" and "base" are DART with a ViT; the others say which encoder they have.
PRESETS: dict[str, tuple[type[RegionConfig], str]] = {
    f"{encoder}{name}": (config, name)
    for encoder, config in (("", DartConfig), ("vim-", DartVimConfig), ("rmt-", DartRmtConfig))
    for name in config.presets
}


def preset_config(name: str, **overrides: Any) -> RegionConfig:
    """The configuration of a preset of any architecture; `overrides` replace single settings.

    Raises:
        ValueError: `name` is no preset, or a setting is out of range.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(map(repr, PRESETS))}, got {name!r}.")
    config, own_name = PRESETS[name]
    return config.preset(own_name, **overrides)
