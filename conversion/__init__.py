"""Convert the checkpoints of others into DART models."""

from importlib import import_module

_EXPORTS = {
    "VARIANTS": "original",
    "convert_checkpoint": "original",
    "convert_vit": "vit",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> object:
    # Imported on first use: timm and the models take seconds.
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
