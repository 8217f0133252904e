"""Placing tokens back, against its definition and by its properties."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dart_hf.modeling.region_partition import (
    PARTITIONS,
    Regions,
    bands_for_budget,
    flow_regions,
    grid_regions,
    uniform_regions,
)
from dart_hf.modeling.region_projection import place_back

CHANNELS = 2


@st.composite
def cases(draw) -> tuple[torch.Tensor, Regions, int, int, tuple[int, int]]:
    """The arguments of `place_back`: two images, random tokens, any partition, in float64."""
    height, width, num_patches = draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    scores = torch.rand(2, 5, 5, generator=generator, dtype=torch.float64) ** draw(st.sampled_from([1, 20]))
    partition = draw(st.sampled_from(list(PARTITIONS)))
    settings = {}
    if partition == "grid":
        assume(num_patches % bands_for_budget(num_patches, height, width) == 0)
        settings["first_edge"] = draw(st.sampled_from([0.0, 2.0]))
    regions = PARTITIONS[partition](scores, num_patches, height, width, **settings)
    tokens = torch.randn(2, num_patches, CHANNELS, generator=generator, dtype=torch.float64)
    return tokens, regions, height, width, (draw(st.integers(1, 9)), draw(st.integers(1, 9)))


def place_back_by_definition(tokens, regions, height, width, map_size) -> tuple[torch.Tensor, torch.Tensor]:
    """The map, and the area of each of its cells that regions cover, rectangle by rectangle."""
    rows, columns = map_size
    total, area = (
        torch.zeros(2, CHANNELS, rows, columns, dtype=torch.float64),
        torch.zeros(2, 1, rows, columns).double(),
    )
    boxes, owners = regions.boxes()
    for image in range(2):
        for (x0, y0, x1, y1), owner in zip(boxes[image].tolist(), owners[image].tolist(), strict=True):
            for i in range(rows):
                for j in range(columns):
                    high = min(y1, (i + 1) * height / rows) - max(y0, i * height / rows)
                    wide = min(x1, (j + 1) * width / columns) - max(x0, j * width / columns)
                    overlap = max(high, 0) * max(wide, 0)
                    total[image, :, i, j] += overlap * tokens[image, owner]
                    area[image, :, i, j] += overlap
    return total / area, area


@settings(max_examples=60, deadline=None)
@given(cases())
def test_a_cell_is_the_average_of_its_tokens_by_area(case):
    expected, area = place_back_by_definition(*case)
    covered = (area > 1e-9).expand_as(expected)
    torch.testing.assert_close(place_back(*case)[covered], expected[covered], rtol=0, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_constant_tokens_give_a_constant_map(case):
    tokens, *rest = case
    constant = tokens[:, :1].expand_as(tokens)
    feature_map = place_back(constant, *rest)
    torch.testing.assert_close(feature_map, tokens[:, 0, :, None, None].expand_as(feature_map), rtol=0, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_the_sum_over_the_image_stays(case):
    tokens, regions, height, width, (rows, columns) = case
    assume((regions.strip_edges[:, 0] == 0).all())
    x0, y0, x1, y1 = (boxes := regions.boxes()).boxes.unbind(-1)
    areas = torch.zeros(2, tokens.shape[1]).double().scatter_add(1, boxes.tokens, (x1 - x0) * (y1 - y0))
    in_map = place_back(*case).sum(dim=(2, 3)) * (height * width / (rows * columns))
    torch.testing.assert_close(in_map, (tokens * areas[..., None]).sum(dim=1), rtol=1e-10, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.floats(1, 40))
def test_a_uniform_grid_is_only_reshaped(rows, columns, side):
    """To the bit: a retrofitted encoder on its own grid is compared with the original."""
    height, width = round(rows * side), round(columns * side)
    assume(bands_for_budget(rows * columns, height, width) == rows)
    regions = uniform_regions(torch.ones(2, 5, 5), rows * columns, height, width)
    tokens = torch.randn(2, rows * columns, CHANNELS)
    reshaped = tokens.mT.unflatten(2, (rows, columns))
    assert torch.equal(place_back(tokens, regions, height, width, (rows, columns)), reshaped)


def test_cells_before_the_first_edge_take_the_first_token():
    scores = torch.rand(2, 5, 5, dtype=torch.float64)
    regions = grid_regions(scores, 4, 16, 16, first_edge=2.0)
    tokens = torch.randn(2, 4, CHANNELS, dtype=torch.float64)
    feature_map = place_back(tokens, regions, 16, 16, (16, 16))
    torch.testing.assert_close(feature_map[:, :, 0, :2], tokens[:, 0, :, None].expand(-1, -1, 2))


def test_gradients_reach_tokens_and_edges():
    torch.manual_seed(0)
    scores = torch.rand(2, 4, 4, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(2, 7, CHANNELS, dtype=torch.float64, requires_grad=True)

    def placed(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return place_back(tokens, flow_regions(scores, 7, 12, 16), 12, 16, (3, 5))

    assert torch.autograd.gradcheck(placed, (tokens, scores))
    (gradient,) = torch.autograd.grad(placed(tokens, scores).square().sum(), scores)
    assert (gradient != 0).any()


def test_half_precision_is_averaged_in_float32():
    torch.manual_seed(0)
    regions = flow_regions(torch.rand(2, 5, 5), 30, 64, 64)
    tokens = torch.randn(2, 30, CHANNELS).bfloat16()
    expected = place_back(tokens.float(), regions, 64, 64, (4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(place_back(tokens, regions, 64, 64, (4, 4)), expected.bfloat16())
        assert torch.equal(place_back(tokens.float(), regions, 64, 64, (4, 4)), expected)


class Placing(torch.nn.Module):
    def forward(self, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return place_back(tokens, flow_regions(scores, 30, 64, 64), 64, 64, (6, 4))


def test_exports_for_any_batch_and_compiles():
    example, other = ((torch.randn(size, 30, CHANNELS), torch.rand(size, 5, 5)) for size in (2, 3))
    batch = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Placing(), example, dynamic_shapes=(batch, batch)).module()
    compiled = torch.compile(Placing(), fullgraph=True, backend="aot_eager")
    for placing in (program, compiled):
        torch.testing.assert_close(placing(*other), Placing()(*other))


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        self.numel = max(
            self.numel, *(each.numel() for each in torch.utils._pytree.tree_leaves(outputs) if torch.is_tensor(each)), 0
        )
        return outputs


def test_memory_does_not_grow_with_tokens_times_cells():
    num_patches, side = 400, 50
    regions = flow_regions(torch.rand(1, 5, 5), num_patches, 64, 64)
    with LargestTensor() as largest:
        place_back(torch.randn(1, num_patches, CHANNELS), regions, 64, 64, (side, side))
    assert largest.numel < num_patches * side * side / 100


@pytest.mark.parametrize("map_size", [(0, 4), (4, -1)])
def test_a_map_without_cells_is_refused(map_size):
    regions = uniform_regions(torch.ones(1, 5, 5), 4, 8, 8)
    with pytest.raises(ValueError, match="map_size must be a height and a width of at least 1, got"):
        place_back(torch.zeros(1, 4, CHANNELS), regions, 8, 8, map_size)


def test_tokens_with_a_class_token_are_refused():
    regions = uniform_regions(torch.ones(1, 5, 5), 4, 8, 8)
    with pytest.raises(ValueError, match=r"tokens must have shape \(batch, 4, channels\).* got \(1, 5, 2\)"):
        place_back(torch.zeros(1, 5, CHANNELS), regions, 8, 8, (2, 2))
