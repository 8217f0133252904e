"""DART in transformers: vision transformers whose tokens follow the content of the image.

Importing this package registers the models with transformers' Auto classes. Nothing else happens.
"""

from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from dart_hf.modeling.configuration_dart import DartConfig
from dart_hf.modeling.configuration_dart_rmt import DartRmtConfig
from dart_hf.modeling.configuration_dart_vim import DartVimConfig
from dart_hf.modeling.configuration_dartified import DartifiedConfig
from dart_hf.modeling.image_processing_dart import DartImageProcessor
from dart_hf.modeling.modeling_dart import DartForImageClassification, DartModel, DartPreTrainedModel
from dart_hf.modeling.modeling_dart_rmt import DartRmtForImageClassification, DartRmtModel, DartRmtPreTrainedModel
from dart_hf.modeling.modeling_dart_vim import DartVimForImageClassification, DartVimModel, DartVimPreTrainedModel
from dart_hf.modeling.modeling_dartified import (
    DartifiedForImageClassification,
    DartifiedModel,
    DartifiedPreTrainedModel,
)
from dart_hf.modeling.region_partition import Regions
from dart_hf.moved_names import keep_old_modules
from dart_hf.version import __version__

keep_old_modules()
# Saved models and image processors carry their code along, for `trust_remote_code=True` where dart_hf is missing.
DartImageProcessor.register_for_auto_class()
for _config, _model, _classifier in (
    (DartConfig, DartModel, DartForImageClassification),
    (DartVimConfig, DartVimModel, DartVimForImageClassification),
    (DartRmtConfig, DartRmtModel, DartRmtForImageClassification),
    (DartifiedConfig, DartifiedModel, DartifiedForImageClassification),
):
    AutoConfig.register(_config.model_type, _config)
    AutoImageProcessor.register(_config, image_processor_classes={"torchvision": DartImageProcessor})
    AutoModel.register(_config, _model)
    AutoModelForImageClassification.register(_config, _classifier)
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModel")
    _classifier.register_for_auto_class("AutoModelForImageClassification")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    # Imported when they are first used, because these rooms are slow to import.
    if name == "DartTrainer":
        from dart_hf.training.trainer import DartTrainer

        return DartTrainer
    if name == "dartify":
        from dart_hf.retrofit.dartify import dartify

        return dartify
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "DartConfig",
    "DartForImageClassification",
    "DartImageProcessor",
    "DartModel",
    "DartPreTrainedModel",
    "DartRmtConfig",
    "DartRmtForImageClassification",
    "DartRmtModel",
    "DartRmtPreTrainedModel",
    "DartTrainer",
    "DartVimConfig",
    "DartVimForImageClassification",
    "DartVimModel",
    "DartVimPreTrainedModel",
    "DartifiedConfig",
    "DartifiedForImageClassification",
    "DartifiedModel",
    "DartifiedPreTrainedModel",
    "Regions",
    "__version__",
    "dartify",
]
