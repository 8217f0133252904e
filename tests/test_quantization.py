"""Quantisers of other packages on whole models: the logits stay close, and the scorer stays in float32."""

import copy

import pytest
import torch
from helpers.tiny_models import ENCODERS, tiny_classifier
from torch import nn
from transformers import AutoModelForImageClassification, QuantoConfig

PIXELS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def quanto_everything(model):
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)


def quanto_without_scorer(model):
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8, exclude="*scorer*")
    quanto.freeze(model)


def torchao_everything(model):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())


def torchao_without_scorer(model):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(
        model,
        torchao.Int8WeightOnlyConfig(),
        filter_fn=lambda module, name: isinstance(module, nn.Linear) and "scorer" not in name,
    )


@pytest.fixture(params=ENCODERS)
def model(request):
    return tiny_classifier(("a", "b", "c"), request.param, score_normalization="image")


@torch.no_grad()
def run(model):
    return model(PIXELS, output_regions=True)


def check(quantized, model, scorer_is_kept):
    found, expected = run(quantized), run(model)
    error = (found.logits - expected.logits).abs().max() / expected.logits.abs().max()
    # Other regions are other tokens.
    assert 0 < error < (0.05 if scorer_is_kept else 0.5)
    kept = {type(parameter) for parameter in quantized.scorer.parameters()} == {nn.Parameter}
    assert kept == scorer_is_kept
    assert {value.dtype for value in quantized.scorer.state_dict().values() if value.is_floating_point()} == {
        torch.float32
    }
    if scorer_is_kept:
        torch.testing.assert_close(found.regions.strip_edges, expected.regions.strip_edges, rtol=1e-4, atol=1e-4)
    # A quantiser replaces layers of torch. This one reads patches, so it must not look like a layer of torch.
    assert type(quantized.get_input_embeddings()) is type(model.get_input_embeddings())


@pytest.mark.parametrize(
    ("quantize", "scorer_is_kept"),
    [
        (quanto_everything, False),
        (quanto_without_scorer, True),
        (torchao_everything, False),
        (torchao_without_scorer, True),
    ],
)
def test_a_quantised_model_gives_close_logits(model, quantize, scorer_is_kept):
    quantized = copy.deepcopy(model)
    quantize(quantized)
    check(quantized, model, scorer_is_kept)


def test_a_quantization_config_can_leave_the_scorer_in_float32(model, tmp_path):
    pytest.importorskip("optimum.quanto")
    model.save_pretrained(tmp_path)
    config = QuantoConfig(weights="int8", modules_to_not_convert=[".*scorer"])
    quantized = AutoModelForImageClassification.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    assert any(type(parameter) is not nn.Parameter for parameter in quantized.parameters())
    check(quantized, model, scorer_is_kept=True)
