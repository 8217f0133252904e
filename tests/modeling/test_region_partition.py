"""Partitions: properties for all score grids, budgets and image sizes."""

import math
import re

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dart_hf.modeling.region_partition import (
    PARTITIONS,
    Regions,
    band_weights,
    bands_for_budget,
    check_grid_budget,
    density,
    flow_regions,
    grid_regions,
    position_weights,
    quantiles,
    region_centers,
    uniform_regions,
)

SPECIAL_SCORES = {
    "constant": lambda grid, cell: torch.full_like(grid, 0.3),
    "zeros": lambda grid, cell: torch.zeros_like(grid),
    "one_hot": lambda grid, cell: with_cell(torch.zeros_like(grid), cell, 1.0),
    "huge": lambda grid, cell: grid * torch.finfo(grid.dtype).max / 2,
    "tiny": lambda grid, cell: grid * torch.finfo(grid.dtype).tiny,
    "nan": lambda grid, cell: with_cell(grid, cell, math.nan),
    "infinite": lambda grid, cell: with_cell(grid, cell, math.inf),
    "minus_infinite": lambda grid, cell: with_cell(grid, cell, -math.inf),
    "negative": lambda grid, cell: grid - 0.5,
    "arbitrary": lambda grid, cell: grid,
    "spiky": lambda grid, cell: grid**30,
}


def with_cell(grid: torch.Tensor, cell: int, value: float) -> torch.Tensor:
    """`value` in one cell of every image; -1 is the last cell."""
    grid = grid.clone()
    grid.flatten(1)[:, cell] = value
    return grid


def draw_scores(kind: str, seed: int, grid_size: int, dtype: torch.dtype, cell: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    grid = torch.rand(2, grid_size, grid_size, generator=generator, dtype=torch.float64)
    scores = grid.to(dtype)
    # The second image is always arbitrary, so the tests would notice an effect of one image on another.
    return torch.cat([SPECIAL_SCORES[kind](scores[:1], cell % grid_size**2), scores[1:]])


@st.composite
def cases(draw, partitions=("flow", "grid", "uniform")):
    """(partition, scores, num_patches, height, width) with a budget that the partition accepts."""
    partition = draw(st.sampled_from(partitions))
    height, width = draw(st.integers(1, 300)), draw(st.integers(1, 300))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    kind, seed = draw(st.sampled_from(list(SPECIAL_SCORES))), draw(st.integers(0, 99))
    grid_size, cell = draw(st.integers(1, 16)), draw(st.integers(-1, 255))
    scores = draw_scores(kind, seed, grid_size, dtype, cell)
    num_patches = draw(st.integers(1, 120))
    if partition == "grid":
        assume(num_patches % bands_for_budget(num_patches, height, width) == 0)
    return partition, scores, num_patches, height, width


@settings(max_examples=200, deadline=None)
@given(cases())
def test_every_pixel_belongs_to_exactly_one_region(case):
    """Edges increase from zero to the full length, so the rectangles tile the image."""
    partition, scores, num_patches, height, width = case
    regions = PARTITIONS[partition](scores, num_patches, height, width)
    bands = bands_for_budget(num_patches, height, width)
    for edges, count, length in [(regions.row_edges, bands, height), (regions.strip_edges, num_patches, bands * width)]:
        assert edges.shape == (2, count + 1)
        assert edges.dtype == scores.dtype
        assert (edges[:, 0] == 0).all()
        assert (edges[:, -1] == length).all()
        assert (edges.diff(dim=1) >= 0).all()
    boxes, tokens = regions.boxes()
    assert boxes.shape == (2, num_patches + bands - 1, 4)
    assert ((tokens >= 0) & (tokens < num_patches)).all()
    x0, y0, x1, y1 = boxes.double().unbind(dim=-1)
    slack = 1e-9 if scores.dtype == torch.float64 else 1e-2
    assert (x0 >= -slack).all() and (x1 <= width + slack).all() and (x1 >= x0 - slack).all()
    assert (y0 >= 0).all() and (y1 <= height).all()
    area = ((x1 - x0) * (y1 - y0)).sum(dim=1)
    torch.testing.assert_close(area, torch.full_like(area, height * width), rtol=1e-3 if slack > 1e-3 else 1e-9, atol=0)


@settings(max_examples=200, deadline=None)
@given(cases(partitions=("flow", "grid")))
def test_gradients_are_finite(case):
    partition, scores, num_patches, height, width = case
    scores.requires_grad_(True)
    regions = PARTITIONS[partition](scores, num_patches, height, width)
    weights = torch.rand(regions.strip_edges.shape[1], generator=torch.Generator().manual_seed(0)).to(scores.dtype)
    total = (regions.strip_edges * weights).sum() / width + regions.row_edges.sum() / height
    total = total + (position_weights(regions, 4, 4) * torch.arange(16)).sum()
    (gradient,) = torch.autograd.grad(total, scores)
    assert gradient.isfinite().all()


@settings(max_examples=100, deadline=None)
@given(
    cases(partitions=("flow", "grid")),
    st.sampled_from(["constant", "zeros", "nan", "infinite", "minus_infinite", "tiny"]),
)
def test_an_image_without_usable_scores_gets_the_uniform_partition(case, kind):
    partition, scores, num_patches, height, width = case
    useless = SPECIAL_SCORES[kind](torch.rand(1, *scores.shape[1:], dtype=scores.dtype), -1)
    uniform = uniform_regions(useless, num_patches, height, width)
    mixed = PARTITIONS[partition](torch.cat([scores, useless]), num_patches, height, width)
    alone = PARTITIONS[partition](scores, num_patches, height, width)
    assert torch.equal(mixed.row_edges[2:], uniform.row_edges)
    assert torch.equal(mixed.strip_edges[2:], uniform.strip_edges)
    assert torch.equal(mixed.row_edges[:2], alone.row_edges)
    assert torch.equal(mixed.strip_edges[:2], alone.strip_edges)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 99), st.integers(1, 16), st.integers(1, 10), st.integers(1, 10))
def test_mirrored_scores_mirror_the_grid(seed, grid_size, rows, columns):
    scores = draw_scores("arbitrary", seed, grid_size, torch.float64) + 0.01
    height, width = 16 * rows, 16 * columns
    num_patches = rows * columns
    assume(bands_for_budget(num_patches, height, width) == rows)
    regions = grid_regions(scores, num_patches, height, width)
    mirrored = grid_regions(scores.flip(2), num_patches, height, width)
    torch.testing.assert_close(mirrored.row_edges, regions.row_edges, rtol=0, atol=1e-5)
    inner = regions.strip_edges[:, 1:columns]
    torch.testing.assert_close(mirrored.strip_edges[:, 1:columns], width - inner.flip(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("num_patches", "height", "width"), [(1, 1, 1), (49, 112, 112), (12, 60, 80), (7, 31, 200)])
def test_uniform_regions_are_the_limit_of_flow_regions(num_patches, height, width):
    scores = torch.ones(1, 14, 14, dtype=torch.float64)
    regions = uniform_regions(scores, num_patches, height, width)
    bands = bands_for_budget(num_patches, height, width)
    rows = torch.arange(bands + 1, dtype=torch.float64) * height / bands
    columns = torch.arange(num_patches + 1, dtype=torch.float64) * bands * width / num_patches
    assert torch.equal(regions.row_edges[0], rows)
    assert torch.equal(regions.strip_edges[0], columns)
    # Almost equal scores use the general rule, with the same result.
    nearly = scores + 1e-7 * torch.rand(1, 14, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flow = flow_regions(nearly, num_patches, height, width)
    torch.testing.assert_close(flow.strip_edges, regions.strip_edges, rtol=0, atol=1e-2)
    torch.testing.assert_close(flow.row_edges, regions.row_edges, rtol=0, atol=1e-2)


def test_quantiles_split_the_mass_equally():
    weights = torch.rand(3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mass = weights / weights.sum(dim=1, keepdim=True)
    found = quantiles(mass, 7)
    cumulative = torch.cat([torch.zeros(3, 1, dtype=torch.float64), mass.cumsum(1)], dim=1)
    cell = found.long()
    at_quantile = cumulative.gather(1, cell) + (found - cell) * mass.gather(1, cell)
    expected = (torch.arange(1, 7, dtype=torch.float64) / 7).expand(3, -1)
    torch.testing.assert_close(at_quantile, expected, rtol=0, atol=1e-7)


def test_a_quantile_on_a_cell_border_lies_before_empty_cells():
    found = quantiles(torch.tensor([[0.25, 0.25, 0.0, 0.5]], dtype=torch.float64), 2)
    torch.testing.assert_close(found, torch.tensor([[2.0]], dtype=torch.float64), rtol=0, atol=1e-6)


def test_dense_cells_get_small_regions():
    scores = torch.full((1, 8, 8), 0.1)
    scores[:, 2:4, 5:7] = 1.0
    boxes, _ = flow_regions(scores, 64, 128, 128).boxes()
    x = (boxes[0, :, 0] + boxes[0, :, 2]) / 2
    y = (boxes[0, :, 1] + boxes[0, :, 3]) / 2
    inside = ((x > 80) & (x < 112) & (y > 32) & (y < 64)).sum()
    assert inside > 2 * 4  # a uniform partition has 4 centres there


def test_density_sums_to_one_and_marks_unusable_images():
    scores = torch.stack([torch.rand(4, 4), torch.zeros(4, 4), torch.full((4, 4), math.nan)])
    mass, usable = density(scores)
    torch.testing.assert_close(mass.sum(dim=(1, 2)), torch.ones(3))
    assert usable.flatten().tolist() == [True, False, False]
    torch.testing.assert_close(mass[1:], torch.full((2, 4, 4), 1 / 16))


def test_position_weights_are_averages():
    regions = flow_regions(torch.rand(2, 6, 6, dtype=torch.float64), 30, 90, 70)
    shares = position_weights(regions, 6, 6)
    assert shares.shape == (2, 30, 36)
    for weights in (band_weights(regions.row_edges, 6), shares):
        torch.testing.assert_close(weights.sum(dim=2), torch.ones_like(weights[..., 0]))
    uniform = uniform_regions(torch.ones(1, 5, 5, dtype=torch.float64), 25, 100, 100)
    torch.testing.assert_close(position_weights(uniform, 5, 5)[0], torch.eye(25, dtype=torch.float64))
    oblong = uniform_regions(torch.ones(1, 5, 5, dtype=torch.float64), 15, 60, 100)
    torch.testing.assert_close(position_weights(oblong, 3, 5)[0], torch.eye(15, dtype=torch.float64))


def test_centers_are_those_of_the_boxes():
    regions = flow_regions(torch.rand(2, 6, 6, dtype=torch.float64), 30, 90, 70)
    boxes, tokens = regions.boxes()
    areas = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    moments = areas[..., None] * torch.stack([boxes[..., 1] + boxes[..., 3], boxes[..., 0] + boxes[..., 2]], -1) / 2
    for image, owners, area, moment in zip(region_centers(regions), tokens, areas, moments, strict=True):
        total = torch.zeros(30, dtype=torch.float64).index_add(0, owners, area)
        expected = torch.zeros(30, 2, dtype=torch.float64).index_add(0, owners, moment) / total[:, None]
        torch.testing.assert_close(image, expected / torch.tensor([90.0, 70]))


@pytest.mark.parametrize(
    ("num_patches", "height", "width", "nearest"),
    [(195, 448, 448, "182 and 196"), (392, 448, 448, "380 and 400"), (7, 448, 224, "6 and 8")],
)
def test_the_error_for_an_unusable_grid_budget_names_the_nearest_budgets(num_patches, height, width, nearest):
    with pytest.raises(ValueError, match=f"num_patches={num_patches} does not fill .* nearest budgets .* {nearest}"):
        grid_regions(torch.rand(1, 14, 14), num_patches, height, width)
    for budget in nearest.split(" and "):
        grid_regions(torch.rand(1, 14, 14), int(budget), height, width)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 400))
def test_the_named_grid_budgets_are_always_usable(num_patches, height, width):
    assume(num_patches % bands_for_budget(num_patches, height, width) != 0)
    with pytest.raises(ValueError, match="nearest budgets") as caught:
        check_grid_budget(num_patches, height, width)
    for budget in re.findall(r"\d+", str(caught.value).partition("that do are")[2]):
        check_grid_budget(int(budget), height, width)


def test_first_edge_moves_only_the_first_edge_of_a_grid():
    scores = torch.rand(2, 14, 14)
    plain, published = grid_regions(scores, 196, 448, 448), grid_regions(scores, 196, 448, 448, first_edge=2.0)
    assert (plain.strip_edges[:, 0] == 0).all()
    assert (published.strip_edges[:, 0] == 2).all()
    assert torch.equal(plain.strip_edges[:, 1:], published.strip_edges[:, 1:])


def test_a_region_over_two_bands_has_two_boxes():
    regions = Regions(
        scores=torch.ones(1, 2, 2),
        row_edges=torch.tensor([[0.0, 30, 40]]),
        strip_edges=torch.tensor([[0.0, 60, 150, 200]]),
    )
    found = regions.boxes()
    boxes, tokens = found
    assert found.boxes is boxes and found.tokens is tokens
    assert boxes[0].tolist() == [[0, 0, 60, 30], [60, 0, 100, 30], [0, 30, 50, 40], [50, 30, 100, 40]]
    assert tokens[0].tolist() == [0, 1, 1, 2]
