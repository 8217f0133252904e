"""Conversion of pretrained ViTs: the source's logits and answers, what is said of the result, and what is refused."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage import data
from timm.data import create_transform, resolve_model_data_config
from timm.layers import resample_abs_pos_embed
from timm.models import save_for_hf
from torch import nn
from torchvision.models import mobilenet_v3_small
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTImageProcessor,
    DeiTModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
    pipeline,
)
from typer.testing import CliRunner

from dart_hf import DartConfig, DartForImageClassification, DartImageProcessor, DartModel
from dart_hf.cli.main import app
from dart_hf.conversion import vit
from dart_hf.conversion.vit import convert_vit
from dart_hf.data.sources import ImageData
from dart_hf.modeling.region_scorer import RegionScorer
from dart_hf.training.command import ModelArguments, start_model

LABELS = ["cup", "cat", "rocket", "tree", "house"]
CLASSES = {
    "vit": (ViTConfig, ViTForImageClassification, ViTImageProcessor),
    "deit": (DeiTConfig, DeiTForImageClassification, DeiTImageProcessor),
    "teacher": (DeiTConfig, DeiTForImageClassificationWithTeacher, DeiTImageProcessor),
    "vit-encoder": (ViTConfig, ViTModel, ViTImageProcessor),
    "deit-encoder": (DeiTConfig, DeiTModel, DeiTImageProcessor),
}


def with_random_weights(model: nn.Module) -> nn.Module:
    """Every parameter of a size at which it matters for the logits, position tables among them."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        deviation = 2 * parameter[0].numel() ** -0.5 if parameter.ndim in (2, 4) else 0.5
        parameter.data = deviation * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def transformers_source(folder: Path, kind: str = "vit", **settings) -> nn.Module:
    """Save a small model of transformers in `folder`, with its image processor."""
    config_class, model_class, processor_class = CLASSES[kind]
    defaults = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {label: index for index, label in enumerate(LABELS)}}
    model = with_random_weights(model_class(config_class(**{**defaults, **labels, **settings})))
    model.save_pretrained(folder)
    side = model.config.image_size
    size = {"size": {"height": side, "width": side}}
    processor_class(**(size if isinstance(side, int) and side != 224 else {})).save_pretrained(folder)
    return model


def timm_source(
    folder: Path, name: str = "vit_tiny_patch16_224", safe: bool = True, labels: list[str] = LABELS, **model_args
) -> nn.Module:
    """Save a small classifier of timm in `folder`, as timm does, or an encoder where there are no labels."""
    model_args = {"embed_dim": 32, "depth": 2, "num_heads": 2, **model_args}
    model = with_random_weights(timm.create_model(name, num_classes=len(labels), **model_args))
    model_config = {"label_names": labels} if labels else {}
    save_for_hf(model, folder, model_config, model_args=model_args, safe_serialization=safe)
    return model


def logits_of(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        outputs = model(pixel_values)
    return outputs if isinstance(outputs, torch.Tensor) else outputs.logits


def images(model: DartForImageClassification, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    side = model.config.image_size
    shape = (2, model.config.num_channels, side, side)
    return torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(dtype)


def convert(folder: Path, name: str = "source", **options) -> DartForImageClassification:
    """Convert the source in `folder`, quietly, and load what was written."""
    output = convert_vit(folder / name, folder / "output", **{"say": lambda sentence: None, **options})
    return DartForImageClassification.from_pretrained(output).eval()


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def stops(message: str, source: object, folder: Path, error: type[Exception] = ValueError, **options) -> None:
    """Converting `source` to a new folder in `folder` raises one sentence with `message` and writes nothing."""
    before = sorted(folder.iterdir())
    with pytest.raises(error, match=message) as caught:
        convert_vit(source, folder / "output", say=pytest.fail, **options)
    assert sorted(folder.iterdir()) == before
    assert "\n" not in str(caught.value)


# --- the source's logits ---------------------------------------------------------------------------------------------


SOURCES = {
    "vit": (transformers_source, {"kind": "vit"}),
    "vit-other-settings": (
        transformers_source,
        {"kind": "vit", "layer_norm_eps": 0.1, "qkv_bias": False, "hidden_act": "relu"},
    ),
    "vit-lists": (transformers_source, {"kind": "vit", "image_size": [224, 224], "patch_size": [16, 16]}),
    "vit-patch-32": (transformers_source, {"kind": "vit", "patch_size": 32}),
    "vit-384": (transformers_source, {"kind": "vit", "image_size": 384}),
    "deit": (transformers_source, {"kind": "deit"}),
    "teacher": (transformers_source, {"kind": "teacher", "layer_norm_eps": 0.1, "hidden_act": "silu"}),
    "teacher-384": (transformers_source, {"kind": "teacher", "image_size": 384}),
    "timm": (timm_source, {}),
    "timm-dynamic-size": (timm_source, {"dynamic_img_size": True}),
    "timm-no-bias-tanh": (timm_source, {"qkv_bias": False, "act_layer": "gelu_tanh", "mlp_ratio": 3}),
    "timm-silu": (timm_source, {"act_layer": "silu"}),
    "timm-bin": (timm_source, {"safe": False}),
    "timm-384": (timm_source, {"name": "vit_tiny_patch16_384"}),
    "timm-patch-32": (timm_source, {"name": "vit_small_patch32_224"}),
    "timm-distilled": (timm_source, {"name": "deit_tiny_distilled_patch16_224"}),
    "timm-distilled-384": (timm_source, {"name": "deit_base_distilled_patch16_384"}),
}
GRIDS = {"384": 24, "patch-32": 7}


@pytest.mark.parametrize("name", SOURCES)
def test_equal_regions_give_the_sources_logits(name, tmp_path):
    make, settings = SOURCES[name]
    source = make(tmp_path / "source", **settings)
    grid_size = next((size for part, size in GRIDS.items() if name.endswith(part)), 14)
    model = convert(tmp_path, score_grid_size=grid_size)
    config = model.config
    assert (config.partition, config.num_patches, config.score_grid_size) == ("uniform", grid_size**2, grid_size)

    expected = logits_of(source, images(model))
    torch.testing.assert_close(logits_of(model, images(model)), expected, rtol=0, atol=2e-5)
    # The image matters, and positions that lie otherwise would be noticed.
    assert (expected[0] - expected[1]).abs().max() > 1e-2
    table = model.dart.tokenizer.position_embeddings
    original = table.data.clone()
    table.data[:, 1:] = original[:, 1:].unflatten(1, (grid_size, grid_size)).transpose(1, 2).flatten(1, 2)
    assert (logits_of(model, images(model)) - expected).abs().max() > 1e-2
    table.data = original

    source, model = source.double(), model.double()
    expected = logits_of(source, images(model, torch.float64))
    # The distillation token and its position were added in float32.
    torch.testing.assert_close(logits_of(model, images(model, torch.float64)), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (transformers_source, {"kind": "vit-encoder"}),
        (transformers_source, {"kind": "deit-encoder"}),
        (transformers_source, {"kind": "vit", "num_labels": 0, "id2label": {}, "label2id": {}}),
        (timm_source, {"labels": []}),
        (timm_source, {"labels": [], "name": "deit_tiny_distilled_patch16_224"}),
    ],
)
def test_a_source_without_a_classifier_becomes_a_model_with_its_class_token(make, settings, tmp_path):
    source = make(tmp_path / "source", **settings)
    folder = convert_vit(tmp_path / "source", tmp_path / "output", say=lambda sentence: None)
    model, loading = DartModel.from_pretrained(folder, output_loading_info=True)
    assert model.config.architectures == ["DartModel"]
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    pixel_values = images(model)
    with torch.inference_mode():
        if make is timm_source:
            hidden_states = source.forward_features(pixel_values)
        else:
            hidden_states = source.base_model(pixel_values).last_hidden_state
        found = model.eval()(pixel_values)
    torch.testing.assert_close(found.pooler_output, hidden_states[:, 0], rtol=0, atol=2e-5)
    torch.testing.assert_close(found.last_hidden_state, hidden_states, rtol=0, atol=2e-5)
    assert (hidden_states[0, 0] - hidden_states[1, 0]).abs().max() > 1e-2


@pytest.mark.parametrize("new_head", [True, False])
def test_training_starts_from_an_encoder_with_a_new_head(new_head, tmp_path):
    source = transformers_source(tmp_path / "source", "vit-encoder")
    arguments = ModelArguments(
        str(tmp_path / "source"), model_settings='{"scorer": "conv"}', partition="uniform", new_head=new_head
    )
    model, _ = start_model(arguments, ImageData(None, None, LABELS, None), say=pytest.fail)
    assert list(model.config.id2label.values()) == LABELS and model.classifier.weight.std() > 0
    with torch.inference_mode():
        features = source(images(model)).last_hidden_state[:, 0]
        expected = model.classifier(features)
    torch.testing.assert_close(logits_of(model.eval(), images(model)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "settings"),
    [(transformers_source, {"kind": "teacher"}), (timm_source, {"name": "deit_tiny_distilled_patch16_224"})],
)
def test_a_distilled_model_keeps_both_classifiers(make, settings, tmp_path):
    source = make(tmp_path / "source", **settings)
    model = convert(tmp_path)
    assert model.config.distillation_token and model.config.distillation_head
    with torch.inference_mode():
        found = model(images(model))
        if make is timm_source:
            source.set_distilled_training()
            # What it returns apart in training; it has no dropout.
            expected = source.train()(images(model))
        else:
            expected = source(images(model))[1:3]
    torch.testing.assert_close(found.cls_logits, expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.distillation_logits, expected[1], rtol=0, atol=1e-5)


def test_transformers_plain_deit_has_the_token_without_its_classifier(tmp_path):
    transformers_source(tmp_path / "source", "deit")
    model = convert(tmp_path)
    assert model.config.distillation_token and not model.config.distillation_head
    assert model.distillation_classifier is None
    assert model(images(model)).distillation_logits is None


@pytest.mark.parametrize(
    ("make", "name"), [(transformers_source, "teacher"), (timm_source, "deit_tiny_distilled_patch16_224")]
)
def test_half_precision_becomes_float32(make, name, tmp_path):
    source = make(tmp_path / "source", name).half()
    file = tmp_path / "source" / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    if make is transformers_source:
        edit_json(tmp_path / "source" / "config.json", dtype="float16")
    model = convert(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    torch.testing.assert_close(logits_of(model, images(model)), logits_of(source.float(), images(model)))


def test_settings_are_kept(tmp_path):
    settings = {
        "hidden_dropout_prob": 0.2,
        "attention_probs_dropout_prob": 0.3,
        "problem_type": "multi_label_classification",
    }
    transformers_source(tmp_path / "source", **settings)
    config = convert(tmp_path).config
    assert {name: getattr(config, name) for name in settings} == settings
    assert config.image_size == 224
    assert config.id2label == dict(enumerate(LABELS)) and config.label2id["tree"] == 3


def test_timms_models_have_the_labels_that_their_files_give_or_imagenets(tmp_path):
    timm_source(tmp_path / "source")
    assert convert(tmp_path).config.id2label == dict(enumerate(LABELS))
    model_args = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    save_for_hf(timm.create_model("vit_tiny_patch16_224", **model_args), tmp_path / "imagenet", model_args=model_args)
    folder = convert_vit(tmp_path / "imagenet", tmp_path / "imagenet-output", say=lambda sentence: None)
    labels = DartConfig.from_pretrained(folder).id2label
    assert len(labels) == 1000 and labels[0].startswith("tench") and labels[999].startswith("toilet tissue")


# --- the source's answers --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(data.coffee())


def answers(model, image: Image.Image) -> dict[str, float]:
    return {
        answer["label"]: answer["score"] for answer in pipeline("image-classification", model=model)(image, top_k=5)
    }


@pytest.mark.parametrize(
    ("kind", "preparation"),
    [
        ("vit", {}),
        ("vit", {"resample": 3, "image_mean": [0.2, 0.3, 0.4], "image_std": [0.3, 0.2, 0.1]}),
        ("vit", {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}}),
        ("vit", {"size": 224, "feature_extractor_type": "ViTFeatureExtractor", "image_processor_type": None}),
        ("deit", {}),
        ("teacher", {"do_normalize": False}),
    ],
)
def test_the_pipelines_answers_are_those_of_the_source(kind, preparation, picture, tmp_path):
    transformers_source(tmp_path / "source", kind)
    edit_json(tmp_path / "source" / "preprocessor_config.json", **preparation)
    convert(tmp_path)
    expected = answers(str(tmp_path / "source"), picture)
    assert len(set(expected.values())) == 5
    assert answers(str(tmp_path / "output"), picture) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("preparation", [{}, {"crop_mode": "squash", "interpolation": "bilinear", "crop_pct": 0.8}])
def test_images_are_prepared_as_timm_does(preparation, picture, tmp_path):
    source = timm_source(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    config["pretrained_cfg"] |= preparation
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    convert(tmp_path)
    transform = create_transform(**{**resolve_model_data_config(source), **preparation})
    expected = transform(picture)[None]
    processor = DartImageProcessor.from_pretrained(tmp_path / "output")
    found = processor(picture, return_tensors="pt").pixel_values
    # Pillow's and torchvision's resizing round otherwise: by one level of 255, at a standard deviation of 0.5.
    assert found.shape == expected.shape and (found - expected).abs().max() < 1.5 / 255 / 0.5
    probabilities = logits_of(source, expected)[0].softmax(dim=0)
    assert answers(str(tmp_path / "output"), picture) == pytest.approx(
        dict(zip(LABELS, probabilities.tolist(), strict=True)), abs=1e-2
    )


def test_the_crop_tells_the_images_size_where_the_source_does_not_crop(tmp_path):
    transformers_source(tmp_path / "source", image_size=96)
    convert(tmp_path, score_grid_size=6)
    processor = DartImageProcessor.from_pretrained(tmp_path / "output")
    assert (processor.crop_size["height"], processor.crop_size["width"]) == (96, 96)


# --- what is chosen and said -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "settings", "grid_size", "new_size"),
    [
        (transformers_source, {"kind": "teacher", "image_size": 384}, 24, 14),
        (timm_source, {"name": "vit_small_patch32_224"}, 7, 14),
        (timm_source, {}, 14, 10),
    ],
)
def test_another_position_table_is_resampled_and_said_so(make, settings, grid_size, new_size, tmp_path):
    make(tmp_path / "source", **settings)
    said = []
    original = convert(tmp_path, score_grid_size=grid_size, say=said.append)
    assert not any("position table" in sentence for sentence in said)
    folder = convert_vit(tmp_path / "source", tmp_path / "resampled", score_grid_size=new_size, say=said.append)
    sentence = next(sentence for sentence in said if "position table" in sentence)
    assert f"of {grid_size}×{grid_size} cells was resampled to {new_size}×{new_size}" in sentence
    assert "logits differ" in sentence and f"size of {grid_size} keeps it" in sentence

    model = DartForImageClassification.from_pretrained(folder).eval()
    assert model.config.score_grid_size == new_size and model.config.num_patches == grid_size**2
    expected = resample_abs_pos_embed(original.dart.tokenizer.position_embeddings, [new_size, new_size])
    assert torch.equal(model.dart.tokenizer.position_embeddings, expected)
    assert not torch.allclose(logits_of(model, images(model)), logits_of(original, images(model)), atol=1e-3)


def test_what_is_said_is_logged_where_nobody_listens(tmp_path, caplog):
    transformers_source(tmp_path / "source")
    with caplog.at_level(logging.WARNING):
        convert_vit(tmp_path / "source", tmp_path / "output", score_grid_size=7)
    assert "resampled to 7×7" in caplog.text and "has no weights yet" in caplog.text


@pytest.mark.parametrize(("width", "scorer"), [(192, "mobilenet_v3_small"), (200, "mobilenet_v3_large")])
def test_the_scorer_is_that_of_the_preset_of_the_width(width, scorer, tmp_path):
    transformers_source(tmp_path / "source", hidden_size=width)
    said = []
    model = convert(tmp_path, say=said.append)
    assert model.config.scorer == scorer and model.scorer.is_dead
    assert len(said) == 1 and f"{scorer!r} has no weights yet: call model.load_pretrained_scorer()" in said[0]


def test_a_scorer_that_trains_needs_no_weights(tmp_path):
    transformers_source(tmp_path / "source")
    model = convert(tmp_path, scorer="conv", partition="flow", say=pytest.fail)
    assert (model.config.scorer, model.config.partition) == ("conv", "flow")
    model.require_scorer_weights()
    loss = model.train()(images(model), labels=torch.tensor([0, 1])).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_scorers_weights_are_loaded(tmp_path):
    transformers_source(tmp_path / "source")
    torch.manual_seed(1)
    trunk = mobilenet_v3_small(weights=None)
    torch.save(trunk.state_dict(), tmp_path / "trunk.pth")
    model = convert(tmp_path, scorer_weights=tmp_path / "trunk.pth", partition="flow", say=pytest.fail)
    model.require_scorer_weights()
    assert torch.equal(model.scorer.trunk[0][0].weight, trunk.features[0][0].weight)


def test_imagenet_stands_for_the_librarys_download(tmp_path, monkeypatch):
    asked = []

    def load(self, source=None):
        asked.append(source)
        self.trunk_loaded.fill_(1)

    monkeypatch.setattr(RegionScorer, "load_pretrained_trunk", load)
    transformers_source(tmp_path / "source")
    convert(tmp_path, scorer_weights="imagenet", say=pytest.fail)
    assert asked == [None]


def test_unusable_options_stop(tmp_path):
    transformers_source(tmp_path / "source")
    source = tmp_path / "source"
    stops("partition must be one of 'flow', 'grid', 'uniform', got 'hexagons'", source, tmp_path, partition="hexagons")
    stops("score_grid_size must be at least 1, got 0", source, tmp_path, score_grid_size=0)
    stops("scorer='vgg' is unknown", source, tmp_path, scorer="vgg")
    stops("none.pth do not exist", source, tmp_path, FileNotFoundError, scorer_weights="none.pth")
    stops("'conv' has no pretrained weights", source, tmp_path, scorer="conv", scorer_weights="imagenet")
    with pytest.raises(FileExistsError, match=r"output.*is not empty"):
        convert_vit(source, tmp_path)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "model_args", "message"),
    [
        ("vit_tiny_patch16_224", {"reg_tokens": 2}, "has register tokens"),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, "has no class token"),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}, "reads more than the class token"),
        ("vit_tiny_patch16_224", {"global_pool": "map"}, "reads more than the class token"),
        ("vit_tiny_patch16_224", {"pos_embed": "none"}, "has no position table"),
        ("vit_tiny_patch16_224", {"no_embed_class": True}, "a position table without the class token"),
        ("vit_tiny_patch16_224", {"init_values": 0.1}, "has layer scale"),
        ("vit_tiny_patch16_224", {"qk_norm": True}, "has normalised queries and keys"),
        ("vit_tiny_patch16_224", {"pre_norm": True}, r"a normalisation before its blocks \(pre-norm\)"),
        ("vit_tiny_patch16_224", {"final_norm": False}, "has no LayerNorm after its blocks"),
        ("vit_tiny_patch16_224", {"norm_layer": "rmsnorm"}, "has no LayerNorm after its blocks"),
        ("vit_tiny_patch16_224", {"embed_norm_layer": "layernorm"}, "has normalised patches"),
        ("vit_tiny_patch16_224", {"scale_attn_norm": True}, "has normalisations inside attention and MLP"),
        ("vit_tiny_patch16_224", {"scale_mlp_norm": True}, "has normalisations inside attention and MLP"),
        ("vit_tiny_patch16_224", {"proj_bias": False}, "has linear layers without bias"),
        ("vit_tiny_patch16_224", {"act_layer": "mish"}, "activation is Mish; GELU"),
        ("vit_tiny_patch16_224", {"img_size": (224, 192)}, "image_size is 224×192; only squares"),
        ("vit_tiny_patch16_224", {"img_size": 230}, "image_size 230 is no multiple of its patch_size 16"),
        ("vit_tiny_patch16_224", {"in_chans": 1}, "reads 3 channels, got num_channels=1: use scorer='conv'"),
        ("vit_tiny_r_s16_p8_224", {}, "has a stem other than one convolution"),
        ("vit_small_patch16_36x1_224", {}, "has layer scale"),
        ("vit_small_patch16_18x2_224", {}, "has blocks of another design"),
        ("vit_giant_patch14_reg4_dinov2", {"reg_tokens": 0, "no_embed_class": False, "init_values": None}, "SwiGLU"),
        ("eva02_tiny_patch14_224", {}, "is a Eva; only plain and distilled ViTs"),
    ],
)
def test_what_dart_does_not_have_is_refused_by_name(name, model_args, message, tmp_path):
    timm_source(tmp_path / "source", name, **model_args)
    stops(message, tmp_path / "source", tmp_path)


@pytest.mark.parametrize(
    ("make", "settings"), [(transformers_source, {"num_channels": 1}), (timm_source, {"in_chans": 1})]
)
def test_images_of_one_channel_need_a_scorer_that_reads_them(make, settings, tmp_path):
    source = make(tmp_path / "source", **settings)
    model = convert(tmp_path, scorer="conv")
    torch.testing.assert_close(logits_of(model, images(model)), logits_of(source, images(model)), rtol=0, atol=2e-5)
    assert DartImageProcessor.from_pretrained(tmp_path / "output").do_convert_rgb is False


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": [224, 192]}, "image_size is 224×192; only squares"),
        ({"patch_size": [16, 32]}, "patch_size is 16×32; only squares"),
        ({"image_size": 230}, "image_size 230 is no multiple of its patch_size 16"),
        ({"num_channels": 1}, "reads 3 channels, got num_channels=1"),
    ],
)
def test_what_dart_cannot_be_is_refused(settings, message, tmp_path):
    transformers_source(tmp_path / "source", **settings)
    stops(message, tmp_path / "source", tmp_path)


def test_other_models_are_refused(tmp_path):
    transformers_source(tmp_path / "encoder")
    edit_json(tmp_path / "encoder" / "config.json", architectures=["ViTForMaskedImageModeling"])
    stops("encoder' is ViTForMaskedImageModeling; bare encoders and image cl", tmp_path / "encoder", tmp_path)
    ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])).save_pretrained(
        tmp_path / "resnet"
    )
    stops("a model of type 'resnet'; ViT and DeiT are accepted", tmp_path / "resnet", tmp_path)
    (tmp_path / "empty").mkdir()
    stops("'.*empty' holds no model: it has no config.json", tmp_path / "empty", tmp_path, FileNotFoundError)
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "config.json").write_text('{"model_type": "unknown"}')
    with pytest.raises(ValueError, match="model type `unknown`"):
        convert_vit(tmp_path / "unknown", tmp_path / "output")


def test_other_ways_to_prepare_images_are_refused(tmp_path):
    transformers_source(tmp_path / "source")
    edit_json(tmp_path / "source" / "preprocessor_config.json", do_pad=True, pad_size={"height": 9, "width": 9})
    stops("image processor has do_pad", tmp_path / "source", tmp_path)
    (tmp_path / "source" / "preprocessor_config.json").unlink()
    stops(
        "the image processor of '.*source' cannot be had: Can't load image processor for '.*source'.$",
        tmp_path / "source",
        tmp_path,
        OSError,
    )

    timm_source(tmp_path / "timm")
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    config["pretrained_cfg"]["crop_mode"] = "border"
    (tmp_path / "timm" / "config.json").write_text(json.dumps(config))
    stops("crop_mode is 'border'; DartImageProcessor does 'center', 'squash'", tmp_path / "timm", tmp_path)


def test_a_computation_that_is_not_darts_is_noticed(tmp_path, monkeypatch):
    timm_source(tmp_path / "source")
    monkeypatch.setitem(vit.ACTIVATIONS, "GELU", "silu")
    stops("gives other logits, by", tmp_path / "source", tmp_path)


def test_logits_that_are_no_numbers_are_refused(tmp_path):
    source = transformers_source(tmp_path / "source")
    source.classifier.bias.data[0] = torch.nan
    source.save_pretrained(tmp_path / "source")
    stops("gives other logits, by nan%", tmp_path / "source", tmp_path)


# --- every tensor ----------------------------------------------------------------------------------------------------


FIRST_ATTENTION = {
    "transformers": "vit.encoder.layer.0.attention.attention.query.weight",
    "timm": "blocks.0.attn.qkv.weight",
}


@pytest.mark.parametrize("library", ["transformers", "timm"])
@pytest.mark.parametrize("problem", ["missing", "unexpected", "wrong shape"])
def test_tensors_that_do_not_fit_stop(library, problem, tmp_path):
    (transformers_source if library == "transformers" else timm_source)(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors, name = load_file(file), FIRST_ATTENTION[library]
    if problem == "missing":
        del tensors[name]
    elif problem == "unexpected":
        tensors[f"{name}_2"] = tensors[name].clone()
    else:
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, file, {"format": "pt"})
    named = r"layers?\.0\.attention" if library == "transformers" else r"blocks\.0\.attn\.qkv\.weight"
    stops(f"{problem} .*{named}", tmp_path / "source", tmp_path)


def test_a_pooler_that_the_source_does_not_use_is_left_out(tmp_path):
    source = transformers_source(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    save_file({**load_file(file), "vit.pooler.dense.weight": torch.ones(32, 32)}, file, {"format": "pt"})
    model = convert(tmp_path)
    torch.testing.assert_close(logits_of(model, images(model)), logits_of(source, images(model)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_damaged_and_absent_weights_stop(library, tmp_path):
    (transformers_source if library == "transformers" else timm_source)(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    stops("damaged|incomplete", tmp_path / "source", tmp_path)
    file.unlink()
    stops("model.safetensors", tmp_path / "source", tmp_path, OSError)


class Malicious:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_pickles_are_read_without_executing_them(library, tmp_path):
    (transformers_source if library == "transformers" else timm_source)(tmp_path / "source")
    (tmp_path / "source" / "model.safetensors").unlink()
    torch.save({"weight": Malicious(tmp_path / "trace")}, tmp_path / "source" / "pytorch_model.bin")
    stops("mkdir|Weights only load failed.$", tmp_path / "source", tmp_path)
    assert not (tmp_path / "trace").exists()


def test_a_model_that_timm_cannot_build_stops(tmp_path):
    timm_source(tmp_path / "source")
    edit_json(tmp_path / "source" / "config.json", architecture="vit_of_tomorrow")
    stops("timm's 'vit_of_tomorrow' cannot be used: Unknown model", tmp_path / "source", tmp_path)


# --- where the source is ---------------------------------------------------------------------------------------------


def test_what_is_neither_a_folder_nor_an_id_stops(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stops(r"There is no folder './vit'", "./vit", tmp_path, FileNotFoundError)
    stops("There is no folder 'models/vit/last'", "models/vit/last", tmp_path, FileNotFoundError)
    (tmp_path / "vit.pth").touch()
    stops("'vit.pth' is a file; give the model's folder", "vit.pth", tmp_path, NotADirectoryError)
    stops("There is no folder 'no/body', and the Hub did not give a model of that name", "no/body", tmp_path, OSError)


def test_a_folder_wins_over_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = timm_source(Path("timm/vit_tiny_patch16_224"))
    model = convert(Path(), "timm/vit_tiny_patch16_224")
    torch.testing.assert_close(logits_of(model, images(model)), logits_of(source, images(model)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "hub_id"),
    [
        ("timm/deit_tiny_patch16_224", "timm/deit_tiny_patch16_224.fb_in1k"),
        ("timm/deit_tiny_patch16_224.fb_in1k", "timm/deit_tiny_patch16_224.fb_in1k"),
        ("timm/a_model_of_tomorrow", "timm/a_model_of_tomorrow"),
        ("somebody/deit_tiny_patch16_224", "somebody/deit_tiny_patch16_224"),
        ("deit_tiny_patch16_224", "deit_tiny_patch16_224"),
    ],
)
def test_timms_name_without_a_tag_is_its_default_weights(name, hub_id, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def ask(name):
        asked.append(name)
        raise OSError("We are offline.")

    monkeypatch.setattr(vit, "load_config", ask)
    stops("We are offline.", name, tmp_path, OSError)
    assert asked == [hub_id]


def hub_cache(home: Path, source: Path, hub_id: str) -> None:
    """Put the files of `source` where the Hub's client keeps those of `hub_id`."""
    repository = home / "hub" / f"models--{hub_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "snapshots").mkdir()
    source.rename(repository / "snapshots" / ("a" * 40))


def test_sources_of_the_hub(tmp_path):
    """As a user does it, from what the Hub's client has downloaded before."""
    sources = {"timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k": timm_source(tmp_path / "timm", "vit_tiny_patch16_224")}
    sources["somebody/deit"] = transformers_source(tmp_path / "deit", "deit")
    for folder, hub_id in zip(("timm", "deit"), sources, strict=True):
        hub_cache(tmp_path / "home", tmp_path / folder, hub_id)
    script = """
import sys
from dart_hf.conversion.vit import convert_vit

for source, output in zip(sys.argv[1::2], sys.argv[2::2]):
    convert_vit(source, output)
"""
    arguments = ["timm/vit_tiny_patch16_224", tmp_path / "out-0", "somebody/deit", tmp_path / "out-1"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    for name in ("HF_HUB_CACHE", "TRANSFORMERS_CACHE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for index, source in enumerate(sources.values()):
        model = DartForImageClassification.from_pretrained(tmp_path / f"out-{index}").eval()
        torch.testing.assert_close(logits_of(model, images(model)), logits_of(source, images(model)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("present", ["pytorch_model.bin", None])
def test_timms_weights_on_the_hub_may_be_a_pickle(present, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    timm_source(Path("downloaded"), safe=False)
    config = vit.load_config("downloaded")
    monkeypatch.setattr(vit, "load_config", lambda name: config)
    asked = []

    def download(repository, name):
        asked.append(name)
        if name == "model.safetensors":
            if present is None:
                raise LocalEntryNotFoundError("Not in the cache.")
            raise EntryNotFoundError("No such file.")
        return str(Path("downloaded") / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    if present is None:
        stops("the model 'somebody/vit' cannot be had: Not in the cache", "somebody/vit", tmp_path, OSError)
        assert asked == ["config.json", "model.safetensors"]
    else:
        convert_vit("somebody/vit", "output", say=lambda sentence: None)
        assert asked == ["config.json", "model.safetensors", "pytorch_model.bin"]


# --- the command line ------------------------------------------------------------------------------------------------


def run(*arguments: object):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)], prog_name="dart-hf")


def test_the_command_converts_and_says_what_matters(tmp_path):
    transformers_source(tmp_path / "source", image_size=96)
    result = run(tmp_path / "source", "--from", "vit", "--output", tmp_path / "output")
    assert result.exit_code == 0, result.output
    resampled, dead, wrote = result.stdout.splitlines()
    assert "6×6 cells was resampled to 14×14" in resampled
    assert "has no weights yet" in dead
    assert wrote == f"Wrote {tmp_path / 'output'}"
    assert DartConfig.from_pretrained(tmp_path / "output").partition == "uniform"


def test_the_command_passes_its_options_on(tmp_path):
    timm_source(tmp_path / "source")
    options = ["--partition", "flow", "--scorer", "mobilenet_v3_small", "--score-grid-size", "14"]
    torch.save(mobilenet_v3_small(weights=None).state_dict(), tmp_path / "trunk.pth")
    output = ["--output", tmp_path / "output", "--scorer-weights", tmp_path / "trunk.pth"]
    result = run(tmp_path / "source", "--from", "vit", *output, *options)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"Wrote {tmp_path / 'output'}\n"
    model = DartForImageClassification.from_pretrained(tmp_path / "output")
    assert model.config.partition == "flow" and not model.scorer.is_dead


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "vim"], "--from must be 'dart' or 'vit', got 'vim'"),
        (["--from", "vit", "--variant", "darvit-tiny"], "--variant goes with --from dart, got --from vit"),
        (["--from", "vit", "--ema"], "--ema goes with --from dart, got --from vit"),
        (["--scorer-weights", "imagenet"], "--scorer-weights goes with --from vit, got --from dart"),
        (["--from", "dart", "--partition", "flow"], "--partition goes with --from vit, got --from dart"),
        (["--from", "vit", "--score-grid-size", "0"], "--score-grid-size"),
        (["--from", "vit", "--partition", "hexagons"], "partition must be one of"),
        (["--from", "vit"], "There is no folder './none'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("./none", "--output", "output", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and message in result.stderr
    assert not Path("output").exists()
