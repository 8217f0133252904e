"""Read a ViT or DeiT of transformers."""

from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from dart_hf.conversion.tensors import NameTable
from dart_hf.conversion.vit_source import ViT, common_settings, fold_position, source_errors

TRANSFORMERS_SETTINGS = (
    "num_channels",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "qkv_bias",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "layer_norm_eps",
)

TRANSFORMERS_VIT_NAMES: NameTable = (
    (r"dart\.cls_token", "embeddings.cls_token"),
    (r"dart\.distillation_token", "embeddings.distillation_token"),
    (r"dart\.tokenizer\.position_embeddings", "embeddings.position_embeddings"),
    (r"dart\.tokenizer\.projection\.", "embeddings.patch_embeddings.projection."),
    (r"dart\.layers\.", "layers."),
    (r"dart\.layernorm\.", "layernorm."),
    (r"classifier\.", "classifier."),
    (r"distillation_classifier\.", "distillation_classifier."),
)

# Names in older releases of transformers (up to 5.8), and of the distilled model's first classifier.
TRANSFORMERS_ALIASES = {
    "encoder.layer.": "layers.",
    "attention.attention.query.": "attention.q_proj.",
    "attention.attention.key.": "attention.k_proj.",
    "attention.attention.value.": "attention.v_proj.",
    "attention.output.dense.": "attention.o_proj.",
    "intermediate.dense.": "mlp.fc1.",
    "output.dense.": "mlp.fc2.",
    "cls_classifier.": "classifier.",
}

PREPARATION = (
    "do_resize",
    "size",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)


def read_transformers_vit(name: str, config: PreTrainedConfig) -> ViT:
    """Read a ViT or DeiT of transformers; [`convert_vit`] says which ones, and what is raised."""
    classifier = _load_transformers(name, config)
    common = common_settings(config, config.image_size, config.patch_size)
    tensors = {}
    for key, tensor in classifier.state_dict().items():
        key = key.removeprefix(f"{classifier.base_model_prefix}.")
        for alias, today in TRANSFORMERS_ALIASES.items():
            key = key.replace(alias, today)
        tensors[key] = tensor
    has_token = "embeddings.distillation_token" in tensors
    if has_token:
        fold_position(tensors, "embeddings.distillation_token", "embeddings.position_embeddings")
    return ViT(
        settings={
            **{setting: getattr(config, setting) for setting in TRANSFORMERS_SETTINGS},
            **common,
            "distillation_token": has_token,
            "distillation_head": "distillation_classifier.weight" in tensors,
        },
        tensors=tensors,
        names=TRANSFORMERS_VIT_NAMES,
        preparation=transformers_preparation(name, config.num_channels, common["image_size"]),
        classify=lambda pixel_values: classifier(pixel_values).logits,
    )


def _load_transformers(name: str, config: PreTrainedConfig) -> PreTrainedModel:
    """Load the classifier in float32 and evaluation mode; raise a ValueError unless its checkpoint has every weight.

    An encoder becomes a classifier without labels, also in `config`.
    """
    architecture = (config.architectures or ["an unknown class"])[0]
    if architecture in ("ViTModel", "DeiTModel"):
        config.num_labels = 0
    elif "ForImageClassification" not in architecture:
        raise ValueError(f"source: {name!r} is {architecture}; bare encoders and image classifiers are accepted.")
    with source_errors(f"the model {name!r}"):
        classifier, loading = AutoModelForImageClassification.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    misfits = {
        "missing": loading["missing_keys"],
        # transformers' encoders have a pooler, its classifiers do not use one.
        "unexpected": [key for key in loading["unexpected_keys"] if "pooler." not in key],
        "wrong shape": [key for key, *_ in loading["mismatched_keys"]],
    }
    for kind, keys in misfits.items():
        if keys:
            raise ValueError(
                f"source: the weights of {name!r} do not fit its config.json: {kind} {', '.join(sorted(keys)[:3])}."
            )
    return classifier.eval()


def transformers_preparation(name: str, num_channels: int, side: int) -> dict[str, Any]:
    """The settings of the `DartImageProcessor` that prepares images as a model's own image processor does.

    Raises:
        ValueError: The image processor does what `DartImageProcessor` does not.
        OSError: It cannot be read.
    """
    with source_errors(f"the image processor of {name!r}"):
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    given = {setting: value for setting, value in processor.to_dict().items() if value is not None}
    known = (*PREPARATION, "do_center_crop", "do_convert_rgb")
    unknown = [setting for setting in given if setting.startswith("do_") and given[setting] and setting not in known]
    if unknown:
        raise ValueError(f"source: its image processor has {', '.join(unknown)}, DartImageProcessor does not.")
    # Training reads the image size off the crop. A source without a crop resizes to that size.
    crops = given.get("do_center_crop", False)
    return {
        **{setting: given[setting] for setting in PREPARATION if setting in given},
        "crop_size": given["crop_size"] if crops else {"height": side, "width": side},
        "do_convert_rgb": num_channels == 3,
    }
