"""Sampling: image, regions -> patches. Two linear interpolations in pure functions. Pixel centres are integers."""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .region_partition import Regions


def sample_regions(pixel_values: Tensor, regions: Regions, patch_size: int) -> Tensor:
    """Resample each of N regions of images (B, C, H, W) to P×P pixels: (B, N, P·P·C), in the images' dtype.

    A patch is stored column by column, (P columns, P rows, C), because the second interpolation reads a strip column
    with its P rows at once. [`patch_images`] gives ordinary images.
    """
    strip = sample_bands(pixel_values, regions.row_edges, patch_size)
    return sample_strip(strip, regions.strip_edges, patch_size)


def sample_bands(pixel_values: Tensor, row_edges: Tensor, patch_size: int) -> Tensor:
    """Resample every band to P rows and lay the bands end to end, as a strip (B, R·W, P·C).

    From images (B, C, H, W) and edges (B, R + 1) in pixels, with P = `patch_size`.
    """
    batch_size, num_channels, height, width = pixel_values.shape
    rows = pixel_values.permute(0, 2, 3, 1).reshape(batch_size * height, width * num_channels)
    y = _positions(row_edges, patch_size)
    above = y.detach().floor().clamp(0, height - 1)
    weight = (y - above).clamp(0, 1)
    first = above.long() + torch.arange(batch_size, device=y.device)[:, None] * height
    second = first + (above < height - 1)
    bands = blend_rows(rows, torch.stack([first, second], dim=-1), torch.stack([1 - weight, weight], dim=-1))
    bands = bands.view(batch_size, -1, patch_size, width, num_channels).transpose(2, 3)
    return bands.reshape(batch_size, -1, patch_size * num_channels)


def sample_strip(strip: Tensor, strip_edges: Tensor, patch_size: int) -> Tensor:
    """Resample every region of the strip to P columns: (B, N, P·P·C), column by column.

    From a strip (B, R·W, P·C) and edges (B, N + 1) in strip pixels. Beyond its last column the strip is zero.
    """
    batch_size, length, _ = strip.shape
    x = _positions(strip_edges, patch_size)
    left = x.detach().floor().clamp(0, length - 1)
    # The weights of the two columns. A column beyond the strip has the weight 0.
    right_weight = x - left
    left_weight = (1 - right_weight).clamp(min=0) * (x.detach() < length)
    right_weight = right_weight * (left < length - 1)
    first = left.long() + torch.arange(batch_size, device=x.device)[:, None] * length
    second = first + (left < length - 1)
    indices, weights = torch.stack([first, second], dim=-1), torch.stack([left_weight, right_weight], dim=-1)
    return blend_rows(strip.flatten(0, 1), indices, weights).view(batch_size, strip_edges.shape[1] - 1, -1)


def blend_rows(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of pairs of rows of a table (rows, F): (M, F), in the table's dtype.

    `indices` (…, 2) are the two rows of each of the M sums, and `weights` (…, 2) their factors. On a CPU the result has
    a first derivative only, outside `torch.compile`.
    """
    indices, weights = indices.view(-1, 2), weights.view(-1, 2).to(table.dtype)
    if table.device.type == "cpu" and not torch.compiler.is_compiling():
        # One pass forward and one backward. Nothing as large as the result is kept between them.
        return embedding_bag(indices, table, mode="sum", per_sample_weights=weights)
    first, second = (table.index_select(0, index) for index in indices.unbind(1))
    return first * weights[:, :1] + second * weights[:, 1:]


def patch_images(patches: Tensor, patch_size: int) -> Tensor:
    """Patches (B, N, P·P·C) of [`sample_regions`] as images (B, N, C, P, P)."""
    return patches.unflatten(2, (patch_size, patch_size, -1)).permute(0, 1, 4, 3, 2)


def _positions(edges: Tensor, num_samples: int) -> Tensor:
    """`num_samples` positions in each interval, its end excluded: (B, K + 1) -> (B, K·num_samples)."""
    steps = torch.arange(num_samples, device=edges.device, dtype=edges.dtype) / num_samples
    starts, ends = edges[:, :-1, None], edges[:, 1:, None]
    return (starts + (ends - starts) * steps).flatten(1)
