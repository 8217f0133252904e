"""Partition: scores -> regions. Pure geometry in pure functions.

An image of H×W pixels is cut into R bands of rows. The bands are laid end to end as a *strip* R·W pixels long, and the
strip is cut into N regions; band i occupies strip columns i·W … (i + 1)·W. Every partition is such a pair of edges.
The rules are those of DART (arXiv 2506.10390) as its published checkpoints were trained.
"""

import math
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.utils import ModelOutput

QUANTILE_EPSILON = 1e-8


class RegionBoxes(NamedTuple):
    """The regions of a batch of images as rectangles. M = N + R - 1, for N regions in R bands.

    Args:
        boxes: (B, M, 4), each x0, y0, x1, y1 in pixels.
        tokens: (B, M), the index of the region, and of its token, that each rectangle belongs to.
    """

    boxes: Tensor
    tokens: Tensor


@dataclass
class Regions(ModelOutput):
    """The regions of a batch of images: the places of their tokens.

    Args:
        scores: (B, G, G), the scores that the partition follows. Ones for the uniform partition.
        row_edges: (B, R + 1) pixels, from 0 to H: band i covers rows `row_edges[i]` … `row_edges[i + 1]`.
        strip_edges: (B, N + 1) strip pixels, from 0 to R·W: region t covers `strip_edges[t]` … `strip_edges[t + 1]`.
            [`grid_regions`] may start a little later.
    """

    scores: torch.FloatTensor | None = None
    row_edges: torch.FloatTensor | None = None
    strip_edges: torch.FloatTensor | None = None

    def boxes(self) -> RegionBoxes:
        """The regions as rectangles of the image.

        A region that crosses the right border of its band continues at the left of the next one, so it has several
        rectangles. A rectangle has no area where a region edge and a band border coincide.
        """
        num_bands, num_patches = self.row_edges.shape[1] - 1, self.strip_edges.shape[1] - 1
        width = self.strip_edges[:, -1:] / num_bands
        borders = width * torch.arange(1, num_bands, device=width.device)
        cuts = torch.cat([self.strip_edges, borders], dim=1).sort(dim=1).values
        starts, ends = cuts[:, :-1], cuts[:, 1:]
        middles = (starts + ends) / 2
        bands = (middles / width).floor().long().clamp(0, num_bands - 1)
        tokens = torch.searchsorted(self.strip_edges[:, 1:].contiguous(), middles.contiguous(), right=True)
        top, bottom = self.row_edges.gather(1, bands), self.row_edges.gather(1, bands + 1)
        boxes = torch.stack([starts - bands * width, top, ends - bands * width, bottom], dim=-1)
        return RegionBoxes(boxes, tokens.clamp(max=num_patches - 1))


def bands_for_budget(num_patches: int, height: int, width: int) -> int:
    """R = round(√(N·H/W)), at least 1: bands about as high as a region is wide."""
    return max(1, round(math.sqrt(num_patches * height / width)))


def density(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (B, G, G) divided by their sum, and which images they are usable for.

    usable (B, 1) is False for images whose scores say nothing: constant, all zero, negative, infinite or NaN. These
    images get the uniform density and no gradient.
    """
    highest, lowest = scores.detach().amax(dim=(1, 2)), scores.detach().amin(dim=(1, 2))
    # Below this bound the gradient of the normalisation overflows, so such scores count as zero.
    smallest = torch.finfo(scores.dtype).tiny ** 0.5
    # A NaN makes both extremes NaN, and every comparison with NaN is False.
    usable = (lowest >= 0) & (highest > lowest) & (highest > smallest) & (highest < math.inf)
    usable, highest = usable[:, None, None], highest[:, None, None]
    # Dividing by the highest first keeps the sum of huge scores finite.
    scores = torch.where(usable, scores, 1) / torch.where(usable, highest, 1)
    return scores / scores.sum(dim=(1, 2), keepdim=True), usable[:, :, 0]


def quantiles(density: Tensor, num_parts: int) -> Tensor:
    """Equal-mass quantiles of a piecewise-constant density (B, n): (B, K - 1) in cell units [0, n], never decreasing.

    For probability q, with j the first cell whose cumulative sum reaches q, that is j + (q − the sum before j)/p_j. The
    probabilities are 1/K … (K - 1)/K, for `num_parts` K.
    """
    cumulative = density.cumsum(dim=1)
    mass = torch.arange(1, num_parts, device=density.device).to(density.dtype) / num_parts
    # The first cell whose cumulative sum reaches the mass, found by counting the cells before it. The count is monotone
    # in the mass even if the sums are rounded, needs no sorted input, and exports.
    cell = (cumulative[:, None, :] < mass[:, None]).sum(dim=2).clamp(max=density.shape[1] - 1)
    before = pad(cumulative, (1, 0))[:, :-1].gather(1, cell)
    # Above 1 only through rounding, and in the last cell if the sum stays below 1.
    within = ((mass - before) / (density.gather(1, cell) + QUANTILE_EPSILON)).clamp(0, 1)
    return cell + within


def cell_coverage(edges: Tensor, num_cells: int) -> Tensor:
    """The part of each of n unit cells inside each interval: edges (B, K + 1), in cell units [0, n] -> (B, K, n)."""
    cells = torch.arange(num_cells, device=edges.device, dtype=edges.dtype)
    filled = (edges[:, :, None] - cells).clamp(0, 1)
    return filled[:, 1:] - filled[:, :-1]


def band_weights(row_edges: Tensor, grid_size: int) -> Tensor:
    """The share of each grid row in each band: edges (B, R + 1) in pixels -> (B, R, G). A band's shares sum to 1."""
    coverage = cell_coverage(row_edges * (grid_size / row_edges[:, -1:]), grid_size)
    return coverage / coverage.sum(dim=2, keepdim=True).clamp(min=1e-6)


def position_weights(regions: Regions, rows: int, columns: int) -> Tensor:
    """The share of each cell of a position table of rows×columns cells in each of N regions: (B, N, rows·columns).

    The shares of a region sum to 1, those of a region without width to 0.
    """
    num_bands = regions.row_edges.shape[1] - 1
    num_cells = num_bands * columns
    coverage = cell_coverage(regions.strip_edges * (num_cells / regions.strip_edges[:, -1:]), num_cells)
    coverage = coverage / (coverage.sum(dim=2, keepdim=True) + 1e-12)
    by_band = coverage.unflatten(2, (num_bands, columns))
    return torch.einsum("bnrc,brg->bngc", by_band, band_weights(regions.row_edges, rows)).flatten(2)


def region_centers(regions: Regions) -> Tensor:
    """The centre of mass of each of N regions as fractions of height and width: (B, N, 2), each y, x.

    A region without width has its centre at its edge.
    """
    num_bands = regions.row_edges.shape[1] - 1
    bands = torch.arange(num_bands, device=regions.strip_edges.device)
    # In bands: band i covers i … i + 1 of the strip.
    edges = regions.strip_edges * (num_bands / regions.strip_edges[:, -1:])
    starts = (edges[:, :-1, None] - bands).clamp(0, 1)
    ends = (edges[:, 1:, None] - bands).clamp(0, 1)
    borders = regions.row_edges / regions.row_edges[:, -1:]
    areas = (ends - starts) * (borders[:, 1:] - borders[:, :-1])[:, None]
    shares = areas / areas.sum(dim=2, keepdim=True).clamp(min=1e-12)
    y = (shares * ((borders[:, :-1] + borders[:, 1:]) / 2)[:, None]).sum(dim=2)
    x = (shares * (starts + ends) / 2).sum(dim=2)
    return torch.stack([y, x], dim=-1)


def uniform_regions(scores: Tensor, num_patches: int, height: int, width: int) -> Regions:
    """The flow partition of constant scores, exactly: R equal bands, N equal regions along the strip.

    With N = R·C this is the plain grid of patches. `scores` (B, G, G) only give batch size, dtype and device.
    """
    bands = bands_for_budget(num_patches, height, width)
    row_edges = torch.arange(bands + 1, device=scores.device) * height
    strip_edges = torch.arange(num_patches + 1, device=scores.device) * (bands * width)
    return Regions(
        scores=scores,
        row_edges=(row_edges.to(scores.dtype) / bands).expand(scores.shape[0], -1),
        strip_edges=(strip_edges.to(scores.dtype) / num_patches).expand(scores.shape[0], -1),
    )


def flow_regions(scores: Tensor, num_patches: int, height: int, width: int) -> Regions:
    """DART-Flow: bands of equal mass, then regions of equal mass along the strip of bands.

    Args:
        scores: (B, G, G), float32 or float64.
        num_patches: Any N ≥ 1.
        height, width: Of the image, in pixels.
    """
    uniform = uniform_regions(scores, num_patches, height, width)
    grid_size, bands = scores.shape[1], uniform.row_edges.shape[1] - 1
    mass, usable = density(scores)
    row_edges = torch.where(usable, _row_edges(mass, bands, height), uniform.row_edges)

    strip = (band_weights(row_edges, grid_size) @ mass).flatten(1)
    strip = strip / strip.sum(dim=1, keepdim=True)
    edges = _with_ends(quantiles(strip, num_patches) * (width / grid_size), 0, bands * width)
    return Regions(scores=scores, row_edges=row_edges, strip_edges=torch.where(usable, edges, uniform.strip_edges))


def grid_regions(scores: Tensor, num_patches: int, height: int, width: int, first_edge: float = 0.0) -> Regions:
    """DART-Grid: R bands of equal mass, each cut by the same C columns of equal mass.

    Args:
        scores: (B, G, G), float32 or float64.
        num_patches: N = R·C with R = round(√(N·H/W)).
        height, width: Of the image, in pixels.
        first_edge: Where the strip starts, in pixels. The published RMT weights were trained with 2.

    Raises:
        ValueError: N does not factor; names the nearest budgets that do.
    """
    check_grid_budget(num_patches, height, width)
    uniform = uniform_regions(scores, num_patches, height, width)
    grid_size, bands = scores.shape[1], uniform.row_edges.shape[1] - 1
    mass, usable = density(scores)
    row_edges = torch.where(usable, _row_edges(mass, bands, height), uniform.row_edges)

    columns = _renormalised(mass.sum(dim=1))
    inner = quantiles(columns, num_patches // bands) * (width / grid_size)
    starts = torch.arange(bands, device=scores.device)[:, None] * width
    edges = starts + pad(inner.clamp(max=width), (1, 0))[:, None]
    edges = torch.where(usable, _with_ends(edges.flatten(1)[:, 1:], 0, bands * width), uniform.strip_edges)
    if first_edge:
        edges = torch.cat([edges[:, 1:2].clamp(max=first_edge), edges[:, 1:]], dim=1)
    return Regions(scores=scores, row_edges=row_edges, strip_edges=edges)


PARTITIONS = {"flow": flow_regions, "grid": grid_regions, "uniform": uniform_regions}


def check_grid_budget(num_patches: int, height: int, width: int) -> None:
    """Raise a ValueError that names the nearest budgets unless `num_patches` fills R bands evenly."""

    def fits(budget: int) -> bool:
        return budget % bands_for_budget(budget, height, width) == 0

    if not fits(num_patches):
        rows = bands_for_budget(num_patches, height, width)
        lower = next((n for n in range(num_patches - 1, 0, -1) if fits(n)), None)
        upper = next(n for n in count(num_patches + 1) if fits(n))
        nearest = f"{upper}" if lower is None else f"{lower} and {upper}"
        raise ValueError(
            f"num_patches={num_patches} does not fill the {rows} rows of a grid over "
            f"{height}×{width} pixels; the nearest budgets that do are {nearest}."
        )


def _row_edges(mass: Tensor, bands: int, height: int) -> Tensor:
    """Band edges (B, R + 1) in pixels: quantiles of the row masses of a density (B, G, G)."""
    rows = _renormalised(mass.sum(dim=2))
    return _with_ends(quantiles(rows, bands) * (height / mass.shape[1]), 0, height)


def _renormalised(mass: Tensor) -> Tensor:
    return mass / (mass.sum(dim=1, keepdim=True) + QUANTILE_EPSILON)


def _with_ends(inner: Tensor, first: float, last: float) -> Tensor:
    """Add a first and a last edge to inner edges (B, K - 1). Both are exact, without rounding."""
    inner = inner.clamp(first, last)
    return torch.cat([inner.new_full((inner.shape[0], 1), first), inner, inner.new_full((inner.shape[0], 1), last)], 1)
