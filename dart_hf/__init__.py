"""DART in transformers: vision transformers whose tokens follow the content of the image.

Importing this package registers the models with transformers' Auto classes; nothing else happens.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from dart_hf.modeling.configuration_dart import DartConfig
from dart_hf.modeling.image_processing_dart import DartImageProcessor
from dart_hf.modeling.modeling_dart import DartForImageClassification, DartModel, DartPreTrainedModel
from dart_hf.modeling.region_partition import Regions
from dart_hf.version import __version__

AutoConfig.register(DartConfig.model_type, DartConfig)
AutoImageProcessor.register(DartConfig, image_processor_classes={"torchvision": DartImageProcessor})
AutoModel.register(DartConfig, DartModel)
AutoModelForImageClassification.register(DartConfig, DartForImageClassification)

# Saved models and image processors carry their code along, for `trust_remote_code=True` where dart_hf is missing.
DartConfig.register_for_auto_class()
DartImageProcessor.register_for_auto_class()
DartModel.register_for_auto_class("AutoModel")
DartForImageClassification.register_for_auto_class("AutoModelForImageClassification")

__all__ = [
    "DartConfig",
    "DartForImageClassification",
    "DartImageProcessor",
    "DartModel",
    "DartPreTrainedModel",
    "Regions",
    "__version__",
]
