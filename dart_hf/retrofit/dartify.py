"""Give a pretrained vision encoder region tokens in place of its grid of patches."""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from dart_hf.modeling.configuration_dartified import DartifiedConfig
from dart_hf.modeling.dartified_families import find_family
from dart_hf.modeling.modeling_dart_base import RegionPreTrainedModel
from dart_hf.modeling.modeling_dartified import DartifiedForImageClassification, DartifiedModel
from dart_hf.retrofit.vision_tower import dartify_tower, is_vision_language

# Model type -> why its encoders cannot read regions.
REFUSED = {
    "beit": "its attention has a bias for each pair of cells of a grid",
    "data2vec-vision": "its attention has a bias for each pair of cells of a grid",
    "vit_mae": "it masks patches at random",
    "swin": "it attends within windows of a grid",
    "swinv2": "it attends within windows of a grid",
    "sam": "it attends within windows of a grid",
    "siglip2": "its input is patches that its image processor has cut (NaFlex)",
    "siglip2_vision_model": "its input is patches that its image processor has cut (NaFlex)",
}


def dartify(
    model: PreTrainedModel,
    num_patches: int | None = None,
    partition: str = "flow",
    scorer: str = "detail",
    **settings: Any,
) -> PreTrainedModel:
    """Give a pretrained vision encoder region tokens in place of its grid of patches.

    All weights are copied, and `model` stays as it is. With `partition="uniform"` and as many regions as the original
    has patches, the outputs are the original's.

    Args:
        model: A model of transformers: ViT, DeiT, I-JEPA, DINOv2 (with registers too), DINOv3, SigLIP, CLIP's vision
            encoder, or a plain ViT of timm in transformers' wrapper; with or without a classifier. Or a LLaVA, VipLLaVA
            or PaliGemma whose vision tower is one of these: its tower is replaced in place.
        num_patches: Token budget N. The default is the number of the original's patches.
        partition, scorer, **settings: Settings of [`DartifiedConfig`]. By default the score grid has the size of the
            original's grid, and each image's scores are standardised by themselves.

    Returns:
        A [`DartifiedForImageClassification`] for an image classifier, else a [`DartifiedModel`], in the mode
        (training or evaluation), precision and place of the original. For a vision-language model, `model` itself:
        then also call [`set_image_tokens`] with its processor.

    Raises:
        ValueError: The model's family is not supported, its images or patches are not square, it is a DART model
            already, the budget is above the number of pixels, or a setting is out of range.
    """
    if is_vision_language(model):
        return dartify_tower(model, dartify, num_patches, {"partition": partition, "scorer": scorer, **settings})
    name = type(model).__name__
    if isinstance(model, RegionPreTrainedModel):
        raise ValueError(f"{name} has region tokens already: give the original model.")
    if model.config.model_type in REFUSED:
        raise ValueError(f"{name} cannot be dartified: {REFUSED[model.config.model_type]}.")
    family = find_family(name)
    encoder = copy.deepcopy(model)
    kernel = family.install(encoder).projection.weight
    image_size = _side("image", family.image_size(encoder))
    patch_size = _side("patch", kernel.shape[2:])
    grid_size = image_size // patch_size
    num_patches = grid_size**2 if num_patches is None else num_patches
    if num_patches > image_size**2:
        raise ValueError(f"num_patches={num_patches} is more than the {image_size**2} pixels of the model's images.")
    config = DartifiedConfig(
        encoder_config=encoder.config,
        encoder_class=name,
        encoder_arguments=_arguments(model),
        image_size=image_size,
        patch_size=patch_size,
        num_channels=kernel.shape[1],
        num_patches=num_patches,
        partition=partition,
        scorer=scorer,
        id2label=model.config.id2label,
        label2id=model.config.label2id,
        problem_type=model.config.problem_type,
        # A scorer that was never trained has no running statistics.
        **{"score_grid_size": grid_size, "score_normalization": "image", **settings},
    )
    is_classifier = "ForImageClassification" in name
    dartified = (DartifiedForImageClassification if is_classifier else DartifiedModel)(config)
    dartified.base_model.encoder = encoder
    return dartified.to(kernel.device, kernel.dtype).train(model.training)


def _arguments(model: PreTrainedModel) -> dict[str, bool]:
    """What the model was built with besides its configuration: some classes have optional parts."""
    parts = {
        "add_pooling_layer": getattr(model, "pooler", None),
        "use_mask_token": getattr(getattr(model, "embeddings", None), "mask_token", None),
    }
    accepted = inspect.signature(type(model)).parameters
    return {name: part is not None for name, part in parts.items() if name in accepted}


def _side(what: str, size: int | Sequence[int]) -> int:
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ValueError(f"model: its {what} size is {height}×{width}; only squares are supported.")
    return height
