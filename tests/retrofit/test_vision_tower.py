"""Vision-language models whose tower has region tokens."""

import numpy as np
import pytest
import torch
import transformers
from helpers.tiny_models import random_weights
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, PreTrainedTokenizerFast

from dart_hf import DartifiedModel
from dart_hf.retrofit import set_image_tokens
from dart_hf.retrofit.dartify import dartify

TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 32, "patch_size": 8, "projection_dim": 16}


def llava(tower: str = "clip_vision_model", **settings) -> PreTrainedModel:
    config = transformers.LlavaConfig(
        vision_config={"model_type": tower, **VISION},
        text_config={"model_type": "llama", **TEXT},
        image_token_index=3,
        image_seq_length=16,
        **settings,
    )
    return random_weights(transformers.LlavaForConditionalGeneration(config))


def vipllava() -> PreTrainedModel:
    config = transformers.VipLlavaConfig(
        vision_config={"model_type": "clip_vision_model", **VISION},
        text_config={"model_type": "llama", **TEXT},
        image_token_index=3,
        image_seq_length=16,
        vision_feature_layers=[-1, -2],
    )
    return random_weights(transformers.VipLlavaForConditionalGeneration(config))


def paligemma() -> PreTrainedModel:
    config = transformers.PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
        text_config={"model_type": "gemma", **TEXT},
        image_token_id=3,
        projection_dim=16,
    )
    return random_weights(transformers.PaliGemmaForConditionalGeneration(config))


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<bos>", "<eos>", "<image>", "<unk>", "what", "is", "this"]
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, "<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    image = {"extra_special_tokens": {"image_token": "<image>"}}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special, **image)


def llava_processor(model: PreTrainedModel):
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    strategy = getattr(model.config, "vision_feature_select_strategy", "default")
    has_class = model.config.vision_config.model_type == "clip_vision_model"
    return transformers.LlavaProcessor(
        images,
        tokenizer(),
        patch_size=8,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(has_class),
    )


def paligemma_processor(model: PreTrainedModel):
    images = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    images.image_seq_length = 16
    return transformers.PaliGemmaProcessor(images, tokenizer())


CASES = [
    (llava, llava_processor),
    (lambda: llava("siglip_vision_model", vision_feature_select_strategy="full"), llava_processor),
    (vipllava, llava_processor),
    (paligemma, paligemma_processor),
]


@pytest.mark.parametrize(("make", "make_processor"), CASES, ids=["llava-clip", "llava-siglip", "vipllava", "paligemma"])
def test_language_model_reads_fewer_image_tokens(make, make_processor, tmp_path):
    model = make()
    processor = make_processor(model)
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)

    def inputs() -> dict[str, torch.Tensor]:
        return processor(images=image, text="<image> what is this", return_tensors="pt")

    def logits(model: PreTrainedModel) -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs()).logits

    before = logits(model)
    assert (inputs()["input_ids"] == 3).sum() == 16
    dartify(model, partition="uniform", scorer="conv")
    set_image_tokens(processor, model)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)

    model = dartify(make(), num_patches=5, scorer="conv")
    set_image_tokens(processor, model)
    assert (inputs()["input_ids"] == 3).sum() == 5
    generated = model.generate(**inputs(), max_new_tokens=3, do_sample=False, eos_token_id=None)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded.base_model.vision_tower, DartifiedModel)
    assert torch.equal(loaded.generate(**inputs(), max_new_tokens=3, do_sample=False, eos_token_id=None), generated)


@pytest.mark.parametrize(
    ("config_class", "tower", "reason"),
    [
        (transformers.Idefics3Config, {}, "of its own"),
        (transformers.LlavaNextConfig, {"model_type": "clip_vision_model"}, "a square"),
    ],
)
def test_other_vision_language_models_are_refused(config_class, tower, reason):
    config = config_class(vision_config={**tower, **VISION}, text_config={"model_type": "llama", **TEXT})
    model = AutoModelForImageTextToText.from_config(config)
    with pytest.raises(ValueError, match=f"cannot be dartified: .*{reason}"):
        dartify(model, scorer="conv")
