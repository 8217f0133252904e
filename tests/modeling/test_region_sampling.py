"""Sampling of regions against its definition, pixel by pixel."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dart_hf.modeling.region_partition import Regions, flow_regions, uniform_regions
from dart_hf.modeling.region_sampling import patch_images, sample_regions


def sample_by_definition(image: torch.Tensor, row_edges: list, strip_edges: list, patch_size: int) -> torch.Tensor:
    """(C, H, W) -> (N, C, P, P), number by number."""
    channels, height, width = image.shape
    bands = len(row_edges) - 1

    def image_at(channel: int, y: float, column: int) -> float:
        above = min(max(math.floor(y), 0), height - 1)
        below = min(max(math.floor(y) + 1, 0), height - 1)
        weight = y - math.floor(y)
        return float(image[channel, above, column]) * (1 - weight) + float(image[channel, below, column]) * weight

    def strip_at(channel: int, row: int, column: int) -> float:
        if column >= bands * width:
            return 0.0
        band = column // width
        y = row_edges[band] + (row_edges[band + 1] - row_edges[band]) * row / patch_size
        return image_at(channel, y, column % width)

    patches = torch.zeros(len(strip_edges) - 1, channels, patch_size, patch_size, dtype=torch.float64)
    for token in range(len(strip_edges) - 1):
        for column in range(patch_size):
            x = strip_edges[token] + (strip_edges[token + 1] - strip_edges[token]) * column / patch_size
            weight = x - math.floor(x)
            for channel in range(channels):
                for row in range(patch_size):
                    left, right = (strip_at(channel, row, math.floor(x) + step) for step in (0, 1))
                    patches[token, channel, row, column] = left * (1 - weight) + right * weight
    return patches


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 999), st.integers(1, 9), st.integers(1, 12), st.integers(1, 12), st.integers(1, 3), st.integers(1, 5)
)
def test_sampling_computes_its_definition(seed, num_patches, height, width, channels, patch_size):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(2, channels, height, width, generator=generator, dtype=torch.float64)
    scores = torch.rand(2, 3, 3, generator=generator, dtype=torch.float64)
    regions = flow_regions(scores, num_patches, height, width)
    patches = patch_images(sample_regions(pixels, regions, patch_size), patch_size)
    for index in range(2):
        expected = sample_by_definition(
            pixels[index], regions.row_edges[index].tolist(), regions.strip_edges[index].tolist(), patch_size
        )
        torch.testing.assert_close(patches[index], expected, rtol=0, atol=1e-9)


def test_the_strip_is_zero_after_its_last_column():
    pixels = torch.ones(1, 1, 4, 4)
    edges = {"scores": torch.ones(1, 1, 1), "row_edges": torch.tensor([[0.0, 4]])}
    last = sample_regions(pixels, Regions(**edges, strip_edges=torch.tensor([[0.0, 3.5, 4]])), 2)
    # The columns of the second region, 3.5 and 3.75, are blended with zeros.
    assert last[0, 1].view(2, 2).tolist() == [[0.5, 0.5], [0.25, 0.25]]
    empty = sample_regions(pixels, Regions(**edges, strip_edges=torch.tensor([[0.0, 4, 4]])), 2)
    assert (empty[0, 1] == 0).all()


@pytest.mark.parametrize(("rows", "columns"), [(2, 3), (5, 5), (1, 4)])
def test_uniform_regions_of_patch_size_are_plain_patches(rows, columns):
    pixels = torch.randn(2, 3, 4 * rows, 4 * columns)
    regions = uniform_regions(torch.ones(2, 2, 2), rows * columns, 4 * rows, 4 * columns)
    images = patch_images(sample_regions(pixels, regions, 4), 4)
    plain = pixels.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
    assert torch.equal(images, plain)


def test_gradients_reach_pixels_and_edges():
    def sample(pixels, row_edges, strip_edges):
        # At the first and last edges, which lie on pixel centres, the interpolation has no derivative.
        row_edges, strip_edges = (
            torch.cat([torch.tensor([[0.0]]), edges, torch.tensor([[end]])], dim=1)
            for edges, end in ((row_edges, 7.0), (strip_edges, 18.0))
        )
        return sample_regions(pixels, Regions(scores=None, row_edges=row_edges, strip_edges=strip_edges), 3)

    pixels = torch.randn(1, 2, 7, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    row_edges, strip_edges = torch.tensor([[3.3]]).double(), torch.tensor([[4.21, 11.17]]).double()
    inputs = [tensor.requires_grad_() for tensor in (pixels, row_edges, strip_edges)]
    assert torch.autograd.gradcheck(sample, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_patches_have_the_dtype_of_the_pixels(dtype):
    regions = flow_regions(torch.rand(1, 4, 4), 9, 20, 20)
    assert sample_regions(torch.rand(1, 3, 20, 20, dtype=dtype), regions, 4).dtype == dtype


@pytest.mark.parametrize("pixels_need_gradients", [False, True])
def test_the_implementations_for_eager_and_compiled_code_agree(monkeypatch, pixels_need_gradients):
    """Eager code on a CPU samples in one pass, all other code gathers."""
    results = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(2, 3, 21, 30, generator=generator, dtype=torch.float64)
        pixels.requires_grad_(pixels_need_gradients)
        scores = torch.rand(2, 5, 5, generator=generator, dtype=torch.float64).requires_grad_()
        patches = sample_regions(pixels, flow_regions(scores, 11, 21, 30), 4)
        weights = torch.randn(patches.shape, generator=generator, dtype=torch.float64)
        inputs = [scores, pixels] if pixels_need_gradients else [scores]
        results.append((patches.detach(), *torch.autograd.grad((patches * weights).sum(), inputs)))
    for one_pass, gathers in zip(*results, strict=True):
        torch.testing.assert_close(one_pass, gathers)


def test_the_backward_pass_keeps_no_copy_of_the_patches():
    """It keeps the image, one strip for the gradient of the edges, and indices."""
    pixels = torch.randn(2, 3, 64, 96)
    scores = torch.rand(2, 5, 5).requires_grad_()
    regions = flow_regions(scores, 54, 64, 96)
    bands = regions.row_edges.shape[1] - 1
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.update({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()}) or tensor,
        lambda tensor: tensor,
    ):
        patches = sample_regions(pixels, regions, 8)
    strip = 2 * bands * 96 * 8 * 3 * 4
    samples = 2 * (bands + 54) * 8
    assert patches.requires_grad
    # About eight numbers for each sampled row and column.
    assert sum(kept.values()) <= pixels.nbytes + strip + samples * 100
