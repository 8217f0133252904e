"""Dartified models: the outputs of the original, regions, saving, gradients, and what is refused."""

import copy

import pytest
import torch
import transformers
from helpers.tiny_models import random_weights
from transformers import AutoModel, AutoModelForImageClassification, PreTrainedModel

from dart_hf import DartifiedForImageClassification, DartifiedModel
from dart_hf.modeling.dartified_families import FAMILIES
from dart_hf.retrofit.dartify import dartify

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
GRID = {"image_size": 32, "patch_size": 8}
TOWERS = {"vision_config": {**SIZE, **GRID}, "text_config": {**SIZE, "vocab_size": 9, "max_position_embeddings": 8}}
TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
CONFIGS = {
    "CLIPFor": (transformers.CLIPConfig, TOWERS),
    "CLIP": (transformers.CLIPVisionConfig, {**SIZE, **GRID, "projection_dim": 16}),
    "SiglipFor": (transformers.SiglipConfig, TOWERS),
    "Siglip": (transformers.SiglipVisionConfig, {**SIZE, **GRID}),
    "TimmWrapper": (transformers.TimmWrapperConfig, {"architecture": "vit_tiny_patch16_224", "model_args": TIMM}),
    "ViT": (transformers.ViTConfig, {**SIZE, **GRID}),
    "DeiT": (transformers.DeiTConfig, {**SIZE, **GRID}),
    "IJepa": (transformers.IJepaConfig, {**SIZE, **GRID}),
    "Dinov2WithRegisters": (transformers.Dinov2WithRegistersConfig, {**SIZE, **GRID, "num_register_tokens": 3}),
    "Dinov2": (transformers.Dinov2Config, {**SIZE, **GRID}),
    "DINOv3ViT": (transformers.DINOv3ViTConfig, {**SIZE, **GRID, "num_register_tokens": 2}),
}
CLASSES = [name for family in FAMILIES for name in family.classes]


def original(name: str, **settings) -> PreTrainedModel:
    """A tiny model of a class of transformers, whose outputs depend on every pixel and position."""
    config_class, defaults = next(CONFIGS[prefix] for prefix in CONFIGS if name.startswith(prefix))
    model = getattr(transformers, name)(config_class(**{**defaults, "num_labels": 3, **settings}))
    return random_weights(model)


def images(height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def check_same(found, expected, rtol: float) -> None:
    """Every output of the original is there, with the same numbers."""
    assert expected and expected.keys() <= found.keys()
    for name, value in expected.items():
        values = zip(value, found[name], strict=True) if isinstance(value, tuple) else [(value, found[name])]
        for wanted, got in values:
            torch.testing.assert_close(got, wanted, rtol=rtol, atol=rtol * wanted.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("name", CLASSES)
def test_equal_regions_give_the_outputs_of_the_original(name):
    model = original(name)
    state = copy.deepcopy(model.state_dict())
    dartified = dartify(model, partition="uniform", scorer="conv")
    wanted = {} if name.startswith("Timm") else {"output_hidden_states": True}
    for precision, rtol in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        pixel_values = images().to(precision)
        check_same(dartified.to(precision)(pixel_values, **wanted), model.to(precision)(pixel_values, **wanted), rtol)
    model.float()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", [family.classes[0] for family in FAMILIES])
def test_models_of_real_size_give_the_outputs_of_the_original(name):
    config_class, _ = next(CONFIGS[prefix] for prefix in CONFIGS if name.startswith(prefix))
    config = config_class(architecture="vit_small_patch16_224") if name.startswith("Timm") else config_class()
    model = getattr(transformers, name)(config).eval()
    dartified = dartify(model, partition="uniform", scorer="conv")
    side = dartified.config.image_size
    for precision, rtol in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        pixel_values = images(side, side)[:1].to(precision)
        check_same(dartified.to(precision)(pixel_values), model.to(precision)(pixel_values), rtol)


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["ViTModel", "DeiTModel", "Dinov2Model", "Dinov2WithRegistersModel", "SiglipVisionModel", "DINOv3ViTModel"]
)
@pytest.mark.parametrize(("height", "width"), [(48, 48), (40, 72), (37, 50)])
def test_other_image_sizes_give_the_outputs_of_the_original(name, height, width):
    model = original(name)
    dartified = dartify(model, partition="uniform", scorer="conv").double()
    pixel_values = images(height, width).double()
    interpolates = {"interpolate_pos_encoding": True} if name[:3] in ("ViT", "Dei", "Sig") else {}
    expected = model.double()(pixel_values[:, :, : height // 8 * 8, : width // 8 * 8], **interpolates)
    found = dartified(pixel_values, num_patches=(height // 8) * (width // 8), **interpolates)
    check_same(found, expected, 1e-10)


@pytest.mark.parametrize("name", [family.classes[-1] for family in FAMILIES])
def test_regions_follow_the_image_and_everything_learns(name):
    dartified = dartify(original(name), num_patches=7, scorer="conv").train()
    outputs = dartified(images(), output_regions=True)
    first = outputs.logits if "logits" in outputs else outputs.last_hidden_state
    first.square().sum().backward()
    assert outputs.regions.strip_edges.shape == (2, 8)
    parameters = dict(dartified.named_parameters())
    silent = {key for key, parameter in parameters.items() if parameter.grad is None or not parameter.grad.any()}
    # Parameters that do not reach this output in the original either.
    unused = ("mask_token", "pooler", "head", "layernorm", "post_layernorm", "text", "logit", "visual_projection")
    assert not [key for key in silent if not any(part in key for part in unused)], silent
    assert any("scorer.head" in key for key in parameters.keys() - silent)
    with torch.no_grad():
        few, many = (dartified.eval()(images(), num_patches=budget, output_regions=True) for budget in (3, 12))
    assert [len(output.regions.strip_edges[0]) for output in (few, many)] == [4, 13]
    if "last_hidden_state" in few:
        assert few.last_hidden_state.shape[1] == dartified.num_prefix_tokens + 3


@torch.no_grad()
@pytest.mark.parametrize("name", CLASSES)
def test_saved_models_load_with_the_auto_classes(name, tmp_path):
    dartified = dartify(original(name), num_patches=5, scorer="conv").eval()
    dartified.save_pretrained(tmp_path)
    is_classifier = isinstance(dartified, DartifiedForImageClassification)
    auto_class = AutoModelForImageClassification if is_classifier else AutoModel
    loaded, loading = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(dartified) and not any(loading[kind] for kind in ("missing_keys", "unexpected_keys"))
    check_same(loaded(images()), dartified(images()), 1e-6)
    encoder = AutoModel.from_pretrained(tmp_path)
    assert type(encoder) is DartifiedModel
    assert encoder(images()).last_hidden_state.shape[1] == encoder.num_prefix_tokens + 5


@torch.no_grad()
@pytest.mark.parametrize("name", [family.classes[0] for family in FAMILIES])
def test_the_scorer_can_read_the_first_layers_of_every_family(name, tmp_path):
    model = original(name)
    dartified = dartify(model, num_patches=5, scorer="encoder", scorer_layers=1)
    seen = dartified.look(images(), 1)
    dartified.save_pretrained(tmp_path)
    torch.testing.assert_close(AutoModel.from_pretrained(tmp_path).look(images(), 1), seen)
    if not name.startswith("Timm"):
        hidden = model(images(), output_hidden_states=True).hidden_states[1]
        expected = hidden[:, dartified.num_prefix_tokens :].mT.unflatten(2, (4, 4))
        torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("has_pooler", [True, False])
@pytest.mark.parametrize("name", ["ViTModel", "IJepaModel"])
def test_optional_parts_of_the_original_are_kept(name, has_pooler, tmp_path):
    config_class, settings = CONFIGS[name.removesuffix("Model")]
    model = getattr(transformers, name)(config_class(**settings), add_pooling_layer=has_pooler, use_mask_token=True)
    dartified = dartify(random_weights(model), partition="uniform")
    dartified.save_pretrained(tmp_path)
    loaded, loading = DartifiedModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    outputs, expected = loaded(images()), model(images())
    assert ("pooler_output" in outputs) == ("pooler_output" in expected) == has_pooler
    check_same(outputs, expected, 1e-5)


@torch.no_grad()
def test_patch_of_14_reads_the_pixels_of_the_original():
    model = original("Dinov2Model", image_size=64, patch_size=14)
    dartified = dartify(model, partition="uniform", scorer="conv")
    assert (dartified.config.num_patches, dartified.config.patch_size) == (16, 14)
    check_same(dartified(images(64, 64)), model(images(64, 64)), 1e-5)


@torch.no_grad()
def test_labels_give_the_loss_and_settings_ask_for_outputs():
    model = original("ViTForImageClassification")
    dartified = dartify(model, partition="uniform", scorer="conv")
    labels = torch.tensor([2, 0])
    check_same(dartified(images(), labels=labels), model(images(), labels=labels), 1e-5)
    dartified.config.output_hidden_states = True
    assert len(dartified(images()).hidden_states) == 3
    with pytest.raises(ValueError, match="one entry per image, got shape"):
        dartified(images(), labels=labels[:1])


@pytest.mark.parametrize(
    ("message", "make"),
    [
        (
            "ViTForMaskedImageModeling cannot be dartified: accepted are ViTModel.*how to add one",
            lambda: original("ViTForMaskedImageModeling"),
        ),
        ("a bias for each pair", lambda: transformers.BeitModel(transformers.BeitConfig(**SIZE, **GRID))),
        ("masks patches at random", lambda: transformers.ViTMAEModel(transformers.ViTMAEConfig(**SIZE, **GRID))),
        (
            "within windows",
            lambda: transformers.SwinModel(transformers.SwinConfig(depths=[1], num_heads=[1])),
        ),
        ("NaFlex", lambda: transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**SIZE))),
        ("has region tokens already", lambda: dartify(original("ViTModel"), scorer="conv")),
        ("image size is 32×64; only squares", lambda: original("ViTModel", image_size=[32, 64])),
        ("only plain ViTs", lambda: original("TimmWrapperModel", architecture="resnet10t", model_args={})),
    ],
)
def test_other_models_are_refused(message, make):
    with pytest.raises(ValueError, match=message):
        dartify(make(), scorer="conv")


def test_budgets_and_images_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="num_patches=1025 is more than the 1024 pixels"):
        dartify(original("ViTModel"), num_patches=1025, scorer="conv")
    dartified = dartify(original("ViTModel"), scorer="conv")
    with pytest.raises(ValueError, match="num_patches=65 is more than the 64 pixels"):
        dartified(images(15, 15), num_patches=65)
    with pytest.raises(ValueError, match="at least 8 pixels high and wide, one patch of the original, got 32×7"):
        dartified(images(32, 7))
