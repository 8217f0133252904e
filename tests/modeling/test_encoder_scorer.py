"""The scorer "encoder": the model's own first layers on a plain grid of the resized image."""

import pytest
import torch
from helpers.tiny_models import ENCODERS, tiny_classifier
from torch.nn.functional import conv2d, interpolate

from dart_hf.modeling.modeling_dart_base import RegionPreTrainedModel

GRID = 4
DINOV2 = ENCODERS["dartified"]["encoder_config"]
DEEP = {
    "dart": {"num_hidden_layers": 2},
    "dart_vim": {"num_hidden_layers": 2},
    "dart_rmt": {},
    "dartified": {"encoder_config": {**DINOV2, "num_hidden_layers": 2, "drop_path_rate": 0.9}},
}
OURS = [name for name in ENCODERS if name != "dartified"]


def make_model(model_type: str, num_layers: int = 0, **settings) -> RegionPreTrainedModel:
    settings = {
        "num_patches": 12,
        **DEEP[model_type],
        "initializer_range": 0.2,
        "score_normalization": "image",
        **settings,
    }
    return tiny_classifier(model_type=model_type, scorer="encoder", scorer_layers=num_layers, **settings).double()


def pixels(count: int = 2, height: int = 40, width: int = 28) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def small(images: torch.Tensor, size: int) -> torch.Tensor:
    return interpolate(images, (size, size), mode="bilinear", antialias=True)


def literal_map(model: RegionPreTrainedModel, images: torch.Tensor, num_layers: int) -> torch.Tensor:
    """The map by its definition, with a patch convolution in place of regions."""
    base, model_type = model.base_model, model.config.model_type
    images = small(images, GRID * model.config.patch_size)
    if model_type == "dart_rmt":
        features = base.stem(images)
        for stage in base.stages[:num_layers]:
            features = stage(features)
        return small(features, GRID)
    tokenizer, kernel = base.tokenizer, base.tokenizer.projection
    patches = conv2d(images, kernel.weight, kernel.bias, stride=model.config.patch_size)
    class_position, positions = tokenizer.position_embeddings.split([1, GRID**2], dim=1)
    tokens = patches.flatten(2).mT + positions
    place = 0 if model_type == "dart" else GRID**2 // 2
    class_token = (base.cls_token + class_position).expand(len(images), -1, -1)
    hidden = torch.cat([tokens[:, :place], class_token, tokens[:, place:]], dim=1)
    for layer in base.layers[:num_layers]:
        hidden = layer(hidden)
    hidden = torch.cat([hidden[:, :place], hidden[:, place + 1 :]], dim=1)
    return hidden.mT.reshape(len(images), -1, GRID, GRID)


@torch.no_grad()
@pytest.mark.parametrize("num_layers", [0, 1, 2])
@pytest.mark.parametrize("model_type", OURS)
def test_the_head_reads_the_map_of_the_first_layers(model_type, num_layers):
    model = make_model(model_type, num_layers)
    expected = literal_map(model, pixels(), num_layers)
    assert expected.shape[1] == model.config.layer_widths[num_layers]
    torch.testing.assert_close(model.base_model.look(pixels(), num_layers), expected)
    logits = model.scorer.head(expected)
    standardized = (logits - logits.mean(dim=(1, 2), keepdim=True)) / logits.std(dim=(1, 2), keepdim=True)
    scores = model(pixels(), output_regions=True).regions.scores
    torch.testing.assert_close(scores, model.scorer.head.squash(standardized))
    torch.testing.assert_close(model.score(pixels()), scores)
    assert scores.std() > 0.01


@pytest.mark.parametrize("model_type", ENCODERS)
def test_it_owns_its_head_only(model_type):
    model = make_model(model_type, 1)
    owned = {name.split(".")[0] for name in model.scorer.state_dict()}
    assert owned == {"head", "statistics", "trunk_loaded"}
    assert not model.scorer.is_dead
    with pytest.raises(ValueError, match=r"no pretrained weights: it reads the model's own first layers\.$"):
        model.load_pretrained_scorer()
    with pytest.raises(ValueError, match="scorer='encoder' needs the model's method `look` as an argument, got None"):
        model.scorer(pixels())


@pytest.mark.parametrize("model_type", ENCODERS)
def test_looking_teaches_the_layers_nothing_and_has_no_randomness(model_type):
    """In training too, where RMT's BatchNorm keeps statistics and layers are left out at random."""
    model = make_model(model_type, 2, drop_path_rate=0.9)
    expected = model.score(pixels())
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scores = model.score(pixels())
    torch.testing.assert_close(scores, expected)
    assert all(module.training for name, module in model.named_modules() if ".trunk" not in name)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.look(pixels(), 2).requires_grad
    scores.square().sum().backward()
    assert {name.split(".")[-3] for name, value in model.named_parameters() if value.grad is not None} == {"head"}


@torch.no_grad()
@pytest.mark.parametrize("model_type", OURS)
def test_hidden_states_are_those_of_the_regions(model_type):
    """Not those of the look, which runs the same layers."""
    model = make_model(model_type, 1)
    out = model.base_model(pixels(), output_hidden_states=True)
    inputs = model.base_model.tokenizer(pixels(), look=model.base_model.look)[:-1]
    expected = model.base_model.encode(*inputs, output_hidden_states=True)
    assert len(out.hidden_states) == len(expected.hidden_states) == 3
    torch.testing.assert_close(out.hidden_states, expected.hidden_states)
    as_tuple = model.base_model(pixels(), output_hidden_states=True, output_regions=True, return_dict=False)
    assert len(as_tuple) == 4
    torch.testing.assert_close(as_tuple[:2], (out.last_hidden_state, out.pooler_output))
