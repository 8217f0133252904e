"""Give the vision tower of a vision-language model region tokens, so that its language model reads fewer of them."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

# Models that build their tower with the Auto classes and take its tokens one by one.
ACCEPTED = ("llava", "paligemma", "vipllava")
SQUARE = "it reshapes the tokens of its vision tower to a square"
OWN_TOWER = "its vision tower is a class of its own, which the Auto classes cannot replace"
# Model type -> why its tower cannot be replaced.
REFUSED = {
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision", "gemma3", "aya_vision", "internvl"), SQUARE),
    **dict.fromkeys(("cohere2_vision", "mistral3", "video_llava"), SQUARE),
    **dict.fromkeys(("idefics2", "idefics3", "smolvlm", "blip_2", "instructblip", "mllama", "qwen2_vl"), OWN_TOWER),
}


def is_vision_language(model: PreTrainedModel) -> bool:
    """Tell whether a model reads images and text, in one language model."""
    kinds = getattr(model.config, "sub_configs", {})
    return "text_config" in kinds and hasattr(model, "get_image_features") and model.can_generate()


def dartify_tower(
    model: PreTrainedModel, dartify: Callable[..., PreTrainedModel], num_patches: int | None, settings: dict[str, Any]
) -> PreTrainedModel:
    """Replace the vision tower of a model in place, and return the model.

    Raises:
        ValueError: The model cannot take another number of image tokens, or another tower.
    """
    kind = model.config.model_type
    if kind not in ACCEPTED:
        reason = REFUSED.get(kind, f"of vision-language models only {', '.join(ACCEPTED)} are accepted")
        raise ValueError(f"{type(model).__name__} cannot be dartified: {reason}.")
    parent = model.base_model
    tower = dartify(parent.vision_tower, num_patches, **settings)
    parent.vision_tower = tower
    model.config.vision_config = tower.config
    if hasattr(model.config, "image_seq_length"):
        model.config.image_seq_length = count_image_tokens(model)
    return model


def count_image_tokens(model: PreTrainedModel) -> int:
    """The number of tokens of an image in the language model of a model with a dartified tower."""
    tower = model.base_model.vision_tower
    count = tower.config.num_patches + tower.num_prefix_tokens
    # LLaVA then drops the first token, the class token; VipLLaVA always does.
    strategy = getattr(model.config, "vision_feature_select_strategy", "default" if _is_vipllava(model) else "full")
    return count - (strategy == "default")


def set_image_tokens(processor: ProcessorMixin, model: PreTrainedModel) -> None:
    """Let the processor of a vision-language model put as many image tokens into a text as the dartified tower gives.

    Save the processor afterwards, with the model.

    Raises:
        ValueError: The processor counts image tokens in a way that is not known.
    """
    if hasattr(processor, "num_additional_image_tokens"):
        # It counts the patches of an image, plus additional tokens, minus the class token. An image is one patch now.
        tower = model.base_model.vision_tower
        processor.patch_size = tower.config.image_size
        processor.num_additional_image_tokens = tower.config.num_patches + tower.num_prefix_tokens - 1
    elif hasattr(processor, "image_seq_length"):
        processor.image_seq_length = processor.image_processor.image_seq_length = count_image_tokens(model)
    else:
        raise ValueError(
            f"processor: {type(processor).__name__} is not accepted; LlavaProcessor and PaliGemmaProcessor are."
        )


def _is_vipllava(model: PreTrainedModel) -> bool:
    return model.config.model_type == "vipllava"
