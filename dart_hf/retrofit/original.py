"""Original models: pretrained vision encoders of others, and image processors that prepare images as they need it."""

import os

import torch
from transformers.modeling_utils import PreTrainedModel

from dart_hf.conversion.vit_source import source_errors
from dart_hf.conversion.vit_timm import add_default_tag, timm_preparation
from dart_hf.conversion.vit_transformers import transformers_preparation
from dart_hf.hub.loading import load_config
from dart_hf.modeling.configuration_region import RegionConfig
from dart_hf.modeling.dartified_families import find_family
from dart_hf.modeling.image_processing_dart import DartImageProcessor
from dart_hf.retrofit.dartify import REFUSED

# Of a pair of encoders for images and text, the one for images.
VISION_CLASSES = {"CLIPModel": "CLIPVisionModelWithProjection", "SiglipModel": "SiglipVisionModel"}


def load_original(source: str | os.PathLike) -> PreTrainedModel:
    """Load a model that [`dartify`] accepts, in float32 and evaluation mode.

    Args:
        source: Folder or Hub id of a model of transformers, or of a ViT of timm. A CLIP or SigLIP gives its encoder for
            images.

    Raises:
        ValueError: It is a DART model already, its family is not supported, or its checkpoint lacks weights.
        OSError: It does not exist, or cannot be downloaded or read.
    """
    name = add_default_tag(os.fspath(source))
    config = load_config(name)
    if isinstance(config, RegionConfig):
        raise ValueError(f"model: {name!r} has region tokens already; give the original model.")
    if config.model_type == "timm_wrapper":
        architecture = "TimmWrapperForImageClassification" if config.num_labels else "TimmWrapperModel"
        # timm writes the number of classes here too, and transformers takes it from only one place.
        (config.model_args or {}).pop("num_classes", None)
    else:
        architecture = (config.architectures or ["a model of unknown class"])[0]
    if config.model_type in REFUSED:
        raise ValueError(f"{architecture} cannot be dartified: {REFUSED[config.model_type]}.")
    if architecture in VISION_CLASSES:
        architecture, config = VISION_CLASSES[architecture], config.vision_config
    model_class = find_family(architecture).original_class(architecture)
    with source_errors(f"the model {name!r}"):
        model, loading = model_class.from_pretrained(name, config=config, dtype=torch.float32, output_loading_info=True)
    if loading["missing_keys"]:
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise ValueError(f"model: the checkpoint of {name!r} lacks weights: {missing}.")
    return model.eval()


def processor_for(model: PreTrainedModel, source: str | os.PathLike, side: int) -> DartImageProcessor:
    """The image processor for the dartified model: it prepares images as the original's does.

    Args:
        model: The original, loaded from `source`.
        source: Folder or Hub id of the original.
        side: Of the original's images in pixels, for image processors that do not crop.

    Raises:
        ValueError: The original's image processor does what [`DartImageProcessor`] does not.
        OSError: It has none, or it cannot be read.
    """
    name = add_default_tag(os.fspath(source))
    if model.config.model_type == "timm_wrapper":
        num_channels = model.timm_model.patch_embed.proj.in_channels
        return DartImageProcessor(**timm_preparation(model.timm_model, num_channels, side))
    num_channels = getattr(model.config, "vision_config", model.config).num_channels
    return DartImageProcessor(**transformers_preparation(name, num_channels, side))
