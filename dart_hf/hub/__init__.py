"""Load models from the Hugging Face Hub and publish them there."""

from importlib import import_module

_EXPORTS = {
    "Publication": "publishing",
    "PublishingError": "repository",
    "load_config": "loading",
    "load_dart_config": "loading",
    "load_model": "loading",
    "publish": "publishing",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> object:
    # Imported on first use: the models take seconds.
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
