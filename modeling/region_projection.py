"""Place back: tokens, regions -> a feature map over the image. Pure functions."""

import torch
from torch import Tensor
from transformers.utils.generic import maybe_autocast

from .region_partition import Regions


def place_back(tokens: Tensor, regions: Regions, height: int, width: int, map_size: tuple[int, int]) -> Tensor:
    """Spread the tokens of the regions over the image: (B, N, D) -> a map (B, D, h, w), in the tokens' dtype.

    Each cell of the map is the average of the tokens whose regions cover it, weighted by the area of overlap. So
    constant tokens give a constant map, the uniform partition at the map's size gives a reshape, and the sum of map ×
    cell area is the sum of token × region area.

    It is separable: tokens are averaged along the strip onto the map's columns in each band, then the bands onto the
    map's rows. It runs in float32 at least, with gradients to the tokens and to the edges.

    Args:
        tokens: (B, N, D), in the order of the regions; without class token and the like.
        regions: The regions of images of `height`×`width` pixels. Where the strip starts later than 0 (see
            [`grid_regions`]), cells before that are averages over their covered part, and cells without such a part
            take the first token.
        map_size: h and w, any from 1.

    Raises:
        ValueError: There is not one token for each region, or a side of the map is below 1.
    """
    num_rows, num_columns = map_size
    if min(map_size) < 1:
        raise ValueError(f"map_size must be a height and a width of at least 1, got {tuple(map_size)}.")
    num_regions = regions.strip_edges.shape[1] - 1
    if tokens.dim() != 3 or tokens.shape[1] != num_regions:
        raise ValueError(
            f"tokens must have shape (batch, {num_regions}, channels), one token for each region, got "
            f"{tuple(tokens.shape)}."
        )
    features = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    with maybe_autocast(tokens.device.type, enabled=False):
        bands, covered = average_along_strip(features, regions, width, num_columns)
        shares = band_shares(regions.row_edges, height, num_rows).to(features.dtype)
        area = torch.einsum("brh,brw->bhw", shares, covered)[:, None]
        total = torch.einsum("brh,brwd->bdhw", shares, bands * covered[..., None])
        feature_map = total / torch.where(area > 0, area, 1)
        return torch.where(area > 0, feature_map, features[:, 0, :, None, None]).to(tokens.dtype)


def average_along_strip(tokens: Tensor, regions: Regions, width: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """Average tokens (B, N, D) onto w columns of every band: (B, R, w, D).

    Also returns the part of each column that the strip covers, (B, R, w): 1, but for columns before its first edge.
    """
    batch_size, num_regions, _ = tokens.shape
    num_bands = regions.row_edges.shape[1] - 1
    num_cells = num_bands * num_columns
    edges = regions.strip_edges
    borders = cell_borders(num_cells, num_bands * width, edges)
    # Borders and edges together cut the strip into pieces, each of one region and one cell.
    inner = torch.maximum(borders[1:-1], edges[:, :1])
    cuts, origins = torch.cat([edges, inner], dim=1).sort(dim=1)
    lengths = cuts.diff(dim=1)
    is_edge = origins[:, :-1] <= num_regions
    # Pieces without length may lie before the first or behind the last edge.
    region = (is_edge.cumsum(dim=1) - 1).clamp(0, num_regions - 1)
    cell = (~is_edge).cumsum(dim=1)

    covered = lengths.new_zeros(batch_size, num_cells).scatter_add(1, cell, lengths)
    # A piece that is a whole cell has exactly the weight 1, so that a regular grid is only reshaped.
    weights = lengths / torch.where(covered > 0, covered, 1).gather(1, cell)
    image = torch.arange(batch_size, device=edges.device)[:, None]
    pieces = tokens.flatten(0, 1).index_select(0, (region + image * num_regions).flatten())
    pieces = pieces * weights.to(tokens.dtype).view(-1, 1)
    averages = tokens.new_zeros(batch_size * num_cells, tokens.shape[2])
    averages = averages.index_add(0, (cell + image * num_cells).flatten(), pieces)
    by_band = (batch_size, num_bands, num_columns)
    return averages.view(*by_band, -1), (covered / borders.diff()).to(tokens.dtype).view(by_band)


def band_shares(row_edges: Tensor, height: int, num_rows: int) -> Tensor:
    """The share of each band in each of h rows of a map: edges (B, R + 1) in pixels -> (B, R, h).

    The shares of a row sum to 1.
    """
    borders = cell_borders(num_rows, height, row_edges)
    overlap = row_edges[:, :, None].clamp(borders[:-1], borders[1:]).diff(dim=1)
    return overlap / overlap.sum(dim=1, keepdim=True)


def cell_borders(num_cells: int, length: int, like: Tensor) -> Tensor:
    """The n + 1 borders of n equal cells of `length` pixels, as [`uniform_regions`] rounds its edges."""
    return (torch.arange(num_cells + 1, device=like.device) * length).to(like.dtype) / num_cells
