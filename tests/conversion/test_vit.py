"""Conversion of pretrained ViTs of transformers and timm."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import transformers
from helpers.malicious import Malicious
from helpers.tiny_models import random_weights
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage import data
from timm.data import create_transform, resolve_model_data_config
from timm.layers import resample_abs_pos_embed
from timm.models import save_for_hf
from torch import nn
from torchvision.models import mobilenet_v3_small
from transformers import DeiTConfig, DeiTImageProcessor, ResNetConfig, ViTConfig, ViTImageProcessor, pipeline
from typer.testing import CliRunner

from dart_hf import DartForImageClassification, DartImageProcessor, DartModel
from dart_hf.cli.main import app
from dart_hf.conversion import vit, vit_timm
from dart_hf.conversion.vit import convert_vit
from dart_hf.modeling.region_scorer import RegionScorer

LABELS = ["cup", "cat", "rocket", "tree", "house"]
CLASSES = {
    "vit": (ViTConfig, transformers.ViTForImageClassification, ViTImageProcessor),
    "deit": (DeiTConfig, transformers.DeiTForImageClassification, DeiTImageProcessor),
    "teacher": (DeiTConfig, transformers.DeiTForImageClassificationWithTeacher, DeiTImageProcessor),
    "vit-encoder": (ViTConfig, transformers.ViTModel, ViTImageProcessor),
    "deit-encoder": (DeiTConfig, transformers.DeiTModel, DeiTImageProcessor),
}
DISTILLED = "deit_tiny_distilled_patch16_224"
SIDE, GRID = 64, 4


def transformers_source(folder: Path, kind: str = "vit", **settings) -> nn.Module:
    """Save a small model of transformers in `folder`, with its image processor."""
    config_class, model_class, processor_class = CLASSES[kind]
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {label: index for index, label in enumerate(LABELS)}}
    config = config_class(**{**size, **labels, "image_size": SIDE, **settings})
    model = random_weights(model_class(config))
    model.save_pretrained(folder)
    processor_class(size={"height": SIDE, "width": SIDE}, do_center_crop=False).save_pretrained(folder)
    return model


def timm_source(
    folder: Path, name: str = "vit_tiny_patch16_224", safe: bool = True, labels: list[str] | None = LABELS, **model_args
) -> nn.Module:
    """Save a small classifier of timm in `folder`: an encoder if `labels` is empty, with 1000 classes if it is None."""
    model_args = {"img_size": SIDE, "embed_dim": 32, "depth": 2, "num_heads": 2, **model_args}
    num_classes = 1000 if labels is None else len(labels)
    model = random_weights(timm.create_model(name, num_classes=num_classes, **model_args))
    model_config = {"label_names": labels} if labels else {}
    save_for_hf(model, folder, model_config, model_args=model_args, safe_serialization=safe)
    return model


MAKERS = {"transformers": transformers_source, "timm": timm_source}
EACH_LIBRARY = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def logits_of(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        outputs = model(pixel_values)
    return outputs if isinstance(outputs, torch.Tensor) else outputs.logits


def images(model: nn.Module) -> torch.Tensor:
    shape = (2, model.config.num_channels, model.config.image_size, model.config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(model.dtype)


def check_logits(model: nn.Module, source: nn.Module, atol: float = 2e-5) -> torch.Tensor:
    """Both models give the same logits, which are returned."""
    expected = logits_of(source, images(model))
    torch.testing.assert_close(logits_of(model, images(model)), expected, rtol=0, atol=atol)
    return expected


def convert(folder: Path, output: str = "output", **options) -> DartForImageClassification:
    """Convert the source in `folder` and load what was written."""
    written = convert_vit(folder / "source", folder / output, **{"report": lambda sentence: None, **options})
    return DartForImageClassification.from_pretrained(written).eval()


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


def check_refused(
    message: str, folder: Path, source: object = None, error: type[Exception] = ValueError, **options
) -> None:
    """Converting raises one sentence with `message`, and writes nothing."""
    before = sorted(folder.iterdir())
    with pytest.raises(error, match=message) as caught:
        convert_vit(source or folder / "source", folder / "output", report=pytest.fail, **options)
    assert sorted(folder.iterdir()) == before
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "settings", "grid_size"),
    [
        (transformers_source, {"layer_norm_eps": 0.1, "qkv_bias": False, "hidden_act": "relu"}, GRID),
        (transformers_source, {"image_size": [96, 96], "patch_size": [32, 32]}, 3),
        (transformers_source, {"kind": "deit"}, GRID),
        (transformers_source, {"kind": "teacher", "image_size": 224, "layer_norm_eps": 0.1, "hidden_act": "silu"}, 14),
        (timm_source, {"dynamic_img_size": True, "safe": False, "act_layer": "silu"}, GRID),
        (timm_source, {"qkv_bias": False, "act_layer": "gelu_tanh", "mlp_ratio": 3, "patch_size": 32}, 2),
        (timm_source, {"name": DISTILLED, "img_size": 384}, 24),
    ],
)
def test_equal_regions_give_the_logits_of_the_source(make, settings, grid_size, tmp_path):
    source = make(tmp_path / "source", **settings)
    model = convert(tmp_path)
    config, table = model.config, model.dart.tokenizer.position_embeddings
    assert (config.partition, config.num_patches, config.score_grid_size) == ("uniform", grid_size**2, grid_size)
    expected = check_logits(model, source)
    # The logits depend on the image, and on the order of the positions.
    assert (expected[0] - expected[1]).abs().max() > 1e-2
    original = table.data.clone()
    table.data[:, 1:] = original[:, 1:].unflatten(1, (grid_size, grid_size)).transpose(1, 2).flatten(1, 2)
    assert (logits_of(model, images(model)) - expected).abs().max() > 1e-2
    table.data = original
    # The distillation token and its position were added in float32.
    check_logits(model.double(), source.double(), atol=1e-7)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (transformers_source, {"kind": "vit-encoder"}),
        (transformers_source, {"kind": "deit-encoder"}),
        (transformers_source, {"num_labels": 0, "id2label": {}, "label2id": {}}),
        (timm_source, {"labels": []}),
        (timm_source, {"labels": [], "name": DISTILLED}),
    ],
)
@torch.inference_mode()
def test_source_without_a_classifier_becomes_an_encoder(make, settings, tmp_path):
    source = make(tmp_path / "source", **settings)
    folder = convert_vit(tmp_path / "source", tmp_path / "output", report=lambda sentence: None)
    model, loading = DartModel.from_pretrained(folder, output_loading_info=True)
    assert model.config.architectures == ["DartModel"]
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    pixel_values = images(model)
    found = model.eval()(pixel_values)
    is_timm = make is timm_source
    expected = source.forward_features(pixel_values) if is_timm else source.base_model(pixel_values).last_hidden_state
    torch.testing.assert_close(found.pooler_output, expected[:, 0], rtol=0, atol=2e-5)
    torch.testing.assert_close(found.last_hidden_state, expected, rtol=0, atol=2e-5)
    assert (expected[0, 0] - expected[1, 0]).abs().max() > 1e-2


@pytest.mark.parametrize(("make", "name"), [(transformers_source, "teacher"), (timm_source, DISTILLED)])
@torch.inference_mode()
def test_half_precision_distilled_model_keeps_both_classifiers_in_float32(make, name, tmp_path):
    source = make(tmp_path / "source", name).half().float()
    edit_weights(tmp_path / "source", lambda tensors: {name: tensor.half() for name, tensor in tensors.items()})
    edit_json(tmp_path / "source" / "config.json", dtype="float16")
    model = convert(tmp_path)
    assert model.config.distillation_token and model.config.distillation_head
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    found = model(images(model))
    if make is timm_source:
        # In training mode timm returns both; there is no dropout.
        source.set_distilled_training()
        expected = source.train()(images(model))
    else:
        expected = source(images(model))[1:3]
    torch.testing.assert_close((found.cls_logits, found.distillation_logits), tuple(expected), rtol=0, atol=1e-5)


def test_settings_labels_and_the_token_of_a_plain_deit_are_kept(tmp_path):
    settings = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}
    settings["problem_type"] = "multi_label_classification"
    transformers_source(tmp_path / "source", "deit", **settings)
    model = convert(tmp_path)
    assert {name: getattr(model.config, name) for name in settings} == settings
    assert model.config.id2label == dict(enumerate(LABELS)) and model.config.label2id["tree"] == 3
    assert model.config.distillation_token and not model.config.distillation_head
    assert model.distillation_classifier is None and model(images(model)).distillation_logits is None


def test_timm_model_without_label_names_has_those_of_imagenet(tmp_path):
    timm_source(tmp_path / "source", labels=None)
    labels = convert(tmp_path).config.id2label
    assert len(labels) == 1000 and labels[0].startswith("tench") and labels[999].startswith("toilet tissue")


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(data.coffee()).resize((120, 80))


def answers(model, image: Image.Image) -> dict[str, float]:
    classify = pipeline("image-classification", model=str(model))
    return {answer["label"]: answer["score"] for answer in classify(image, top_k=5)}


@pytest.mark.parametrize(
    ("kind", "preparation"),
    [
        ("vit", {"resample": 3, "image_mean": [0.2, 0.3, 0.4], "image_std": [0.3, 0.2, 0.1]}),
        ("vit", {"size": {"shortest_edge": 72}, "do_center_crop": True, "crop_size": {"height": SIDE, "width": SIDE}}),
        ("vit", {"size": SIDE, "feature_extractor_type": "ViTFeatureExtractor", "image_processor_type": None}),
        ("teacher", {"do_normalize": False}),
    ],
)
def test_pipeline_answers_as_with_the_source(kind, preparation, picture, tmp_path):
    transformers_source(tmp_path / "source", kind)
    edit_json(tmp_path / "source" / "preprocessor_config.json", **preparation)
    convert(tmp_path)
    expected = answers(tmp_path / "source", picture)
    assert len(set(expected.values())) == 5
    assert answers(tmp_path / "output", picture) == pytest.approx(expected, abs=1e-5)
    # Training reads the image size off the crop.
    crop_size = DartImageProcessor.from_pretrained(tmp_path / "output").crop_size
    assert (crop_size["height"], crop_size["width"]) == (SIDE, SIDE)


@pytest.mark.parametrize("preparation", [{}, {"crop_mode": "squash", "interpolation": "bilinear", "crop_pct": 0.8}])
def test_images_are_prepared_as_timm_prepares_them(preparation, picture, tmp_path):
    source = timm_source(tmp_path / "source")
    config = tmp_path / "source" / "config.json"
    edit_json(config, pretrained_cfg=json.loads(config.read_text())["pretrained_cfg"] | preparation)
    convert(tmp_path)
    settings = {**resolve_model_data_config(source), **preparation, "input_size": (3, SIDE, SIDE)}
    expected = create_transform(**settings)(picture)[None]
    found = DartImageProcessor.from_pretrained(tmp_path / "output")(picture, return_tensors="pt").pixel_values
    # Pillow and torchvision round differently when they resize: by one level of 255, at a standard deviation of 0.5.
    assert found.shape == expected.shape and (found - expected).abs().max() < 1.5 / 255 / 0.5


@EACH_LIBRARY
def test_grey_images_need_a_scorer_that_reads_them(make, tmp_path):
    source = make(tmp_path / "source", **{"num_channels" if make is transformers_source else "in_chans": 1})
    check_refused("reads 3 channels, got num_channels=1: use scorer='conv'", tmp_path)
    check_logits(convert(tmp_path, scorer="conv"), source)
    assert DartImageProcessor.from_pretrained(tmp_path / "output").do_convert_rgb is False


def test_other_score_grid_size_resamples_the_position_table(tmp_path):
    transformers_source(tmp_path / "source")
    original, reported = convert(tmp_path), []
    folder = convert_vit(tmp_path / "source", tmp_path / "resampled", score_grid_size=6, report=reported.append)
    for part in ("of 4×4 cells was resampled to 6×6", "logits differ", "size of 4 keeps it"):
        assert part in reported[0]
    model = DartForImageClassification.from_pretrained(folder).eval()
    assert model.config.score_grid_size == 6 and model.config.num_patches == GRID**2
    expected = resample_abs_pos_embed(original.dart.tokenizer.position_embeddings, [6, 6])
    assert torch.equal(model.dart.tokenizer.position_embeddings, expected)


@pytest.mark.parametrize(("width", "scorer"), [(192, "mobilenet_v3_small"), (200, "mobilenet_v3_large")])
def test_scorer_is_that_of_the_preset_of_this_width(width, scorer, tmp_path):
    transformers_source(tmp_path / "source", hidden_size=width)
    reported = []
    model = convert(tmp_path, report=reported.append)
    assert model.config.scorer == scorer and model.scorer.is_dead
    (sentence,) = reported
    assert f"{scorer!r} has no weights yet: call model.load_pretrained_scorer()" in sentence


def test_scorer_weights_come_from_the_library_or_a_file(tmp_path, monkeypatch):
    transformers_source(tmp_path / "source")
    trunk = mobilenet_v3_small(weights=None)
    torch.save(trunk.state_dict(), tmp_path / "trunk.pth")
    monkeypatch.chdir(tmp_path)
    command = "convert ./source --from vit --output output --scorer-weights trunk.pth --partition flow"
    result = CliRunner().invoke(app, [*command.split(), "--scorer", "mobilenet_v3_small", "--score-grid-size", "4"])
    assert (result.exit_code, result.stdout) == (0, "Wrote output\n")
    model = DartForImageClassification.from_pretrained("output")
    assert model.config.partition == "flow" and not model.scorer.is_dead
    assert torch.equal(model.scorer.trunk[0][0].weight, trunk.features[0][0].weight)
    asked = []
    monkeypatch.setattr(RegionScorer, "load_pretrained_trunk", lambda self, source=None: asked.append(source))
    convert(tmp_path, scorer_weights="imagenet", output="imagenet")
    assert asked == [None]


def test_unusable_options_are_refused(tmp_path):
    transformers_source(tmp_path / "source")
    check_refused("partition must be one of 'flow', 'grid', 'uniform', got 'hexagons'", tmp_path, partition="hexagons")
    check_refused("score_grid_size must be at least 1, got 0", tmp_path, score_grid_size=0)
    check_refused("scorer='vgg' is unknown", tmp_path, scorer="vgg")
    check_refused("none.pth do not exist", tmp_path, error=FileNotFoundError, scorer_weights="none.pth")
    check_refused("'conv' has no pretrained weights", tmp_path, scorer="conv", scorer_weights="imagenet")
    with pytest.raises(FileExistsError, match=r"output.*is not empty"):
        convert_vit(tmp_path / "source", tmp_path)


@pytest.mark.parametrize(
    ("message", "settings"),
    [
        ("has register tokens", {"reg_tokens": 2}),
        ("has no class token", {"class_token": False, "global_pool": "avg"}),
        ("reads more than the class token", {"global_pool": "avg"}),
        ("reads more than the class token", {"global_pool": "map"}),
        ("has no position table", {"pos_embed": "none"}),
        ("a position table without the class token", {"no_embed_class": True}),
        ("has layer scale", {"init_values": 0.1}),
        ("has normalised queries and keys", {"qk_norm": True}),
        (r"a normalisation before its blocks \(pre-norm\)", {"pre_norm": True}),
        ("has no LayerNorm after its blocks", {"final_norm": False}),
        ("has no LayerNorm after its blocks", {"norm_layer": "rmsnorm"}),
        ("has normalised patches", {"embed_norm_layer": "layernorm"}),
        ("has normalisations inside attention and MLP", {"scale_attn_norm": True}),
        ("has linear layers without bias", {"proj_bias": False}),
        ("activation is Mish; GELU", {"act_layer": "mish"}),
        ("image_size is 64×48; only squares", {"img_size": (64, 48)}),
        ("image_size 70 is not a multiple of its patch_size 16", {"img_size": 70}),
        ("has a stem other than one convolution", {"name": "vit_tiny_r_s16_p8_224"}),
        ("has blocks of another design", {"name": "vit_small_patch16_18x2_224"}),
        ("SwiGLU", {"name": "vit_giant_patch14_dinov2", "img_size": 56, "init_values": None}),
        ("is a Eva; only plain and distilled ViTs", {"name": "eva02_tiny_patch14_224", "img_size": 56}),
    ],
)
def test_timm_model_with_other_parts_is_refused(message, settings, tmp_path):
    timm_source(tmp_path / "source", **settings)
    check_refused(message, tmp_path)


def test_other_models_are_refused(tmp_path):
    transformers_source(tmp_path / "encoder")
    edit_json(tmp_path / "encoder" / "config.json", architectures=["ViTForMaskedImageModeling"])
    check_refused("ViTForMaskedImageModeling; bare encoders and image classifiers", tmp_path, tmp_path / "encoder")
    ResNetConfig(architectures=["ResNetModel"]).save_pretrained(tmp_path / "resnet")
    check_refused("a model of type 'resnet'; ViT and DeiT are accepted", tmp_path, tmp_path / "resnet")
    timm_source(tmp_path / "future")
    edit_json(tmp_path / "future" / "config.json", architecture="vit_of_tomorrow")
    check_refused("timm's 'vit_of_tomorrow' cannot be used: Unknown model", tmp_path, tmp_path / "future")


def test_other_ways_to_prepare_images_are_refused(tmp_path):
    transformers_source(tmp_path / "source")
    edit_json(tmp_path / "source" / "preprocessor_config.json", do_pad=True, pad_size={"height": 9, "width": 9})
    check_refused("image processor has do_pad", tmp_path)
    (tmp_path / "source" / "preprocessor_config.json").unlink()
    message = "the image processor of '.*source' cannot be read: Can't load image processor for '.*source'.$"
    check_refused(message, tmp_path, error=OSError)
    timm_source(tmp_path / "timm")
    config = tmp_path / "timm" / "config.json"
    edit_json(config, pretrained_cfg=json.loads(config.read_text())["pretrained_cfg"] | {"crop_mode": "border"})
    check_refused("crop_mode is 'border'; DartImageProcessor does 'center', 'squash'", tmp_path, tmp_path / "timm")


def test_other_logits_are_refused(tmp_path, monkeypatch):
    source = transformers_source(tmp_path / "source")
    source.classifier.bias.data[0] = torch.nan
    source.save_pretrained(tmp_path / "source")
    check_refused("gives other logits, by nan%", tmp_path)
    timm_source(tmp_path / "timm")
    monkeypatch.setitem(vit_timm.ACTIVATIONS, "GELU", "silu")
    check_refused("gives other logits, by", tmp_path, tmp_path / "timm")


@EACH_LIBRARY
@pytest.mark.parametrize(
    ("problem", "change"),
    [
        ("missing", lambda tensors, name: tensors.pop(name)),
        ("unexpected", lambda tensors, name: tensors.update({f"{name}_2": tensors[name].clone()})),
        ("wrong shape", lambda tensors, name: tensors.update({name: tensors[name][:-1].clone()})),
    ],
)
def test_tensor_that_does_not_fit_is_named(make, problem, change, tmp_path):
    make(tmp_path / "source")
    is_timm = make is timm_source
    name = "blocks.0.attn.qkv.weight" if is_timm else "vit.encoder.layer.0.attention.attention.query.weight"
    edit_weights(tmp_path / "source", lambda tensors: (change(tensors, name), tensors)[1])
    check_refused(f"{problem} .*{'blocks' if is_timm else 'layers?'}.0.att", tmp_path)


def test_unused_pooler_is_left_out(tmp_path):
    source = transformers_source(tmp_path / "source")
    edit_weights(tmp_path / "source", lambda tensors: {**tensors, "vit.pooler.dense.weight": torch.ones(32, 32)})
    check_logits(convert(tmp_path), source)


@EACH_LIBRARY
def test_damaged_missing_and_malicious_weights_are_refused(make, tmp_path):
    make(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    check_refused("damaged|incomplete", tmp_path)
    file.unlink()
    check_refused("model.safetensors", tmp_path, error=OSError)
    torch.save({"weight": Malicious(os.mkdir, str(tmp_path / "trace"))}, tmp_path / "source" / "pytorch_model.bin")
    check_refused("mkdir|Weights only load failed.$", tmp_path)


def test_missing_source_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_refused("There is no folder 'models/vit/last'", tmp_path, "models/vit/last", FileNotFoundError)
    (tmp_path / "vit.pth").touch()
    check_refused("'vit.pth' is a file; give the model's folder", tmp_path, "vit.pth", NotADirectoryError)
    check_refused("the Hub did not give a model of that name", tmp_path, "no/body", OSError)


def test_timm_name_without_a_tag_gets_the_default_tag(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert vit_timm.add_default_tag("timm/deit_tiny_patch16_224") == "timm/deit_tiny_patch16_224.fb_in1k"
    for name in ("timm/deit_tiny_patch16_224.other", "timm/a_model_of_tomorrow", "somebody/deit_tiny_patch16_224"):
        assert vit_timm.add_default_tag(name) == name


@pytest.mark.parametrize("error", [EntryNotFoundError, LocalEntryNotFoundError])
def test_pickle_is_downloaded_if_there_is_no_safetensors_file(error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    timm_source(Path("downloaded"), safe=False)
    config, asked = vit.load_config("downloaded"), []
    monkeypatch.setattr(vit, "load_config", lambda name: config)

    def download(repository, name):
        asked.append(name)
        if name == "model.safetensors":
            raise error("Not in the cache.")
        return str(Path("downloaded") / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    if error is LocalEntryNotFoundError:
        check_refused("the model 'somebody/vit' cannot be read: Not in the cache", tmp_path, "somebody/vit", OSError)
    else:
        convert_vit("somebody/vit", "output", report=lambda sentence: None)
    assert asked == ["config.json", "model.safetensors", "pytorch_model.bin"][: 2 + (error is EntryNotFoundError)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--from vim", "--from must be 'dart' or 'vit', got 'vim'"),
        ("--from vit --ema", "--ema goes with --from dart, got --from vit"),
        ("--partition flow", "--partition goes with --from vit, got --from dart"),
        ("--from vit --score-grid-size 0", "--score-grid-size"),
        ("--from vit", "There is no folder './none'"),
    ],
)
def test_command_refuses_a_mistake_in_one_line(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["convert", "./none", "--output", "output", *options.split()]
    result = CliRunner().invoke(app, arguments, prog_name="dart-hf")
    assert (result.exit_code, result.stdout, list(tmp_path.iterdir())) == (2, "", [])
    assert len(result.stderr.splitlines()) == 1 and message in result.stderr
