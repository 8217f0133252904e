"""The region tokenizer: budgets, image sizes, precision, and errors for unsuitable input."""

import math

import pytest
import torch

from dart_hf.modeling.configuration_dart import DartConfig
from dart_hf.modeling.region_partition import bands_for_budget
from dart_hf.modeling.region_tokenizer import RegionTokenizer


def make_tokenizer(**settings) -> RegionTokenizer:
    torch.manual_seed(0)
    tokenizer = RegionTokenizer(
        DartConfig(**{"scorer": "conv", "hidden_size": 24, "patch_size": 4, "num_patches": 9, **settings})
    )
    torch.nn.init.normal_(tokenizer.position_embeddings)
    return tokenizer.eval()


@pytest.mark.parametrize("num_patches", [1, 2, 7, 50, 211])
@pytest.mark.parametrize("size", [(1, 1), (64, 64), (33, 190), (200, 17)])
def test_any_budget_fits_any_image(num_patches, size):
    tokens, _, regions = make_tokenizer()(torch.randn(2, 3, *size), num_patches)
    assert tokens.shape == (2, num_patches, 24)
    assert tokens.isfinite().all()
    assert regions.row_edges.shape == (2, bands_for_budget(num_patches, *size) + 1)
    assert regions.strip_edges.shape == (2, num_patches + 1)
    assert regions.scores.shape == (2, 14, 14)


def test_a_uniform_partition_is_a_plain_patch_embedding_without_scorer():
    tokenizer = make_tokenizer(partition="uniform", score_grid_size=4, num_patches=16)
    tokenizer.scorer.forward = None  # not callable: fails if it is run
    pixels = torch.randn(2, 3, 16, 16)
    tokens, _, regions = tokenizer(pixels)
    assert tokens.shape == (2, 16, 24)  # the configured budget
    kernel = tokenizer.projection
    plain = torch.nn.functional.conv2d(pixels, kernel.weight, kernel.bias, stride=4).flatten(2).transpose(1, 2)
    plain = plain + tokenizer.position_embeddings[:, 1:]
    torch.testing.assert_close(tokens, plain)
    assert (regions.scores == 1).all()


@pytest.mark.parametrize("partition", ["grid", "flow"])
def test_an_unusable_grid_budget_is_refused_before_statistics_change(partition):
    tokenizer, pixels = make_tokenizer(partition=partition).train(), torch.randn(2, 3, 32, 32)
    if partition == "grid":
        with pytest.raises(ValueError, match="nearest budgets that do are 12 and 16"):
            tokenizer(pixels, 13)
    assert tokenizer.scorer.statistics.num_batches_tracked == 0
    assert tokenizer(pixels, 16 if partition == "grid" else 13)[0].isfinite().all()
    assert tokenizer.scorer.statistics.num_batches_tracked == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_regions_are_computed_in_float32_at_least(dtype):
    tokens, _, regions = make_tokenizer().to(dtype)(torch.randn(2, 3, 64, 64, dtype=torch.float64))
    assert tokens.dtype == dtype
    assert {value.dtype for value in regions.values()} == {torch.promote_types(dtype, torch.float32)}


def test_an_image_of_nan_gets_uniform_regions_and_affects_no_other_image():
    tokenizer = make_tokenizer(score_normalization="image")
    pixels = torch.randn(3, 3, 40, 40)
    clean, _, _ = tokenizer(pixels)
    pixels[1, :, 3, 3] = math.nan
    spoiled, _, regions = tokenizer(pixels)
    assert torch.equal(clean[[0, 2]], spoiled[[0, 2]])
    uniform = torch.arange(10) * (regions.strip_edges[1, -1] / 9)
    torch.testing.assert_close(regions.strip_edges[1], uniform)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(3, 8, 8), r"must have shape \(batch, channels, height, width\), got \(3, 8, 8\)"),
        (torch.zeros(1, 1, 3, 8, 8), r"must have shape .* got \(1, 1, 3, 8, 8\)"),
        (torch.zeros(2, 1, 8, 8), "must have 3 channels, got 1"),
        (torch.zeros(2, 8, 8, 3), "must have 3 channels, got 8"),
        (torch.zeros(2, 3, 0, 8), "at least one pixel"),
        (torch.zeros(0, 3, 8, 8), "at least one image"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"must be floating point .* got torch\.uint8"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), r"must be floating point .* got torch\.int64"),
    ],
)
def test_unsuitable_pixel_values_are_refused(pixels, message):
    with pytest.raises(ValueError, match=message):
        make_tokenizer()(pixels)


@pytest.mark.parametrize("num_patches", [0, -4, 2.5, True, "9"])
def test_unsuitable_budgets_are_refused(num_patches):
    with pytest.raises(ValueError, match="num_patches must be an integer of at least 1"):
        make_tokenizer()(torch.zeros(1, 3, 8, 8), num_patches)
