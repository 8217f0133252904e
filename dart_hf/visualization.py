"""Pictures of where a model's tokens went: region outlines over the image, and the density beside it."""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from dart_hf.modeling.region_partition import Regions

# Density is drawn relative to an even spread, from a quarter of it (blue) to four times as much (orange). All of the
# colours are bright enough to show on a dark photograph.
NORM = LogNorm(1 / 4, 4, clip=True)
COLOURS = LinearSegmentedColormap.from_list("density", ["#2b4bff", "#19c8ff", "#ffffff", "#ffe100", "#ff8c00"])
TICKS = {1 / 4: "¼×", 1 / 2: "½×", 1: "1×", 2: "2×", 4: "4×"}
PANEL_INCHES = 4.5


def draw_regions(
    pixel_values: torch.Tensor,
    regions: Regions,
    titles: Sequence[str] | None = None,
    with_scores: bool = False,
    columns: int = 4,
    image_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    image_std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> Figure:
    """Draw what the model saw with an outline around the region of every token.

    An outline's colour says how many tokens there are for its area, compared with an even spread: blue is sparse,
    orange is dense. A region that leaves its band at the right border goes on at the left of the next one; it is drawn
    open there, and the two ends have the same number beside the image.

    Args:
        pixel_values: (B, C, H, W) or (C, H, W), as the model got them.
        regions: Of the same images: `model(pixel_values, output_regions=True).regions`.
        titles: A title for each image; the number of tokens is added.
        with_scores: Whether to draw the density that the regions follow, in the same colours, beside each image.
        columns: Most images in a row.
        image_mean, image_std: What the pixel values were normalised with, to be undone.

    Returns:
        A figure, to save with [`save_figure`] or to show in a notebook.

    Raises:
        ValueError: The arguments do not belong together.
    """
    images = _shown_images(pixel_values, image_mean, image_std)
    placed = _place(regions, images)
    titles = [""] * len(images) if titles is None else list(titles)
    if len(titles) != len(images):
        raise ValueError(f"titles must have one entry per image, got {len(titles)} for {len(images)} images.")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}.")

    panels = 2 if with_scores else 1
    across = min(columns, len(images))
    down = -(-len(images) // across)
    height, width = images.shape[1:3]
    figure = Figure(
        figsize=(across * panels * PANEL_INCHES + 1, down * (PANEL_INCHES * height / width + 0.5) + 0.4),
        layout="compressed",
    )
    axes = figure.subplots(down, across * panels, squeeze=False).reshape(-1, panels)
    for row, image, title, places in zip(axes, images, titles, placed, strict=False):
        _draw_outlines(row[0], image, places)
        row[0].set_title(f"{title} · {places.num_tokens} tokens" if title else f"{places.num_tokens} tokens")
        if with_scores:
            row[1].imshow(places.density, cmap=COLOURS, norm=NORM, extent=(0, width, height, 0))
            row[1].set_title("density")
    for axis in axes.flat:
        axis.set_axis_off()
    bar = figure.colorbar(ScalarMappable(NORM, COLOURS), ax=axes, ticks=list(TICKS), shrink=0.6, aspect=30, pad=0.01)
    bar.ax.set_yticklabels(TICKS.values())
    bar.ax.minorticks_off()
    bar.set_label("tokens per area, relative to an even spread")
    if any(places.wraps.any() for places in placed):
        figure.supxlabel("The same number at both sides: one region, which goes on in the next band.", fontsize=7)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike) -> Path:
    """Write a figure in the format that the file's name ends in, whole or not at all.

    Raises:
        ValueError: The ending is no picture format that matplotlib writes.
        FileNotFoundError: The folder does not exist.
    """
    path = checked_picture_path(path)
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:].lower(), dpi=150, bbox_inches="tight")
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content.getvalue())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def checked_picture_path(path: str | os.PathLike) -> Path:
    """The path, if [`save_figure`] could write there; it raises the same errors."""
    path = Path(path)
    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise ValueError(f"Cannot write {str(path)!r}: its name must end in one of .{', .'.join(sorted(formats))}.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"Cannot write {str(path)!r}: there is no folder {str(path.parent)!r}.")
    return path


@dataclass
class _Places:
    """The rectangles of one image, in pixels, those without area left out.

    Args:
        boxes: (M, 4) as x0, y0, x1, y1, in the order of the strip.
        relative: (M,) tokens for the area of the rectangle's region, as a multiple of an even spread.
        wraps: (M,) whether the next rectangle belongs to the same region.
        density: (G, G) as a multiple of the mean.
        num_tokens: N.
    """

    boxes: np.ndarray
    relative: np.ndarray
    wraps: np.ndarray
    density: np.ndarray
    num_tokens: int


def _shown_images(pixel_values: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """(B, C, H, W) or (C, H, W), normalised -> (B, H, W, C) in [0, 1]."""
    if not isinstance(pixel_values, torch.Tensor):
        raise ValueError(f"pixel_values must be a tensor as the model got it, got {type(pixel_values).__name__}.")
    if pixel_values.ndim == 3:
        pixel_values = pixel_values[None]
    if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
        raise ValueError(
            f"pixel_values must have the shape (images, 3, height, width), got {tuple(pixel_values.shape)}."
        )
    images = pixel_values.detach().float().cpu() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    return images.clamp(0, 1).permute(0, 2, 3, 1).numpy()


def _place(regions: Regions, images: np.ndarray) -> list[_Places]:
    height, width = images.shape[1:3]
    bands, num_tokens = regions.row_edges.shape[1] - 1, regions.strip_edges.shape[1] - 1
    size = (
        len(regions.row_edges),
        round(regions.row_edges[0, -1].item()),
        round(regions.strip_edges[0, -1].item() / bands),
    )
    if size != images.shape[:3]:
        raise ValueError(
            f"regions must be those of pixel_values, {len(images)} of {height}×{width} pixels; "
            f"got {size[0]} of {size[1]}×{size[2]}."
        )
    boxes, tokens = (tensor.detach().cpu().numpy() for tensor in regions.boxes())
    scores = regions.scores.detach().double().cpu().numpy()
    return [
        _places_of_one(*one, height * width / num_tokens, num_tokens) for one in zip(boxes, tokens, scores, strict=True)
    ]


def _places_of_one(
    boxes: np.ndarray, tokens: np.ndarray, scores: np.ndarray, even_area: float, num_tokens: int
) -> _Places:
    sides = boxes[:, 2:] - boxes[:, :2]
    areas = np.bincount(tokens, weights=sides.prod(axis=1), minlength=num_tokens)
    seen = (sides > 1e-3).all(axis=1)
    boxes, tokens = boxes[seen], tokens[seen]
    mean = scores.mean()
    return _Places(
        boxes=boxes,
        relative=even_area / areas[tokens],
        wraps=np.append(tokens[1:] == tokens[:-1], False),
        # Scores that say nothing gave an even spread.
        density=scores / mean if np.isfinite(mean) and mean > 0 else np.ones_like(scores),
        num_tokens=num_tokens,
    )


def _draw_outlines(axis: Axes, image: np.ndarray, places: _Places) -> None:
    height, width = image.shape[:2]
    axis.imshow(image, extent=(0, width, height, 0))
    x0, y0, x1, y1 = places.boxes.T
    goes_on = places.wraps
    comes_from = np.roll(goes_on, 1)
    lines, density = [], []
    for start, end, drawn in [
        ((x0, y0), (x1, y0), np.ones_like(goes_on)),
        ((x0, y1), (x1, y1), np.ones_like(goes_on)),
        ((x0, y0), (x0, y1), ~comes_from),
        ((x1, y0), (x1, y1), ~goes_on),
    ]:
        lines.append(np.stack([np.stack(start, axis=1), np.stack(end, axis=1)], axis=1)[drawn])
        density.append(places.relative[drawn])
    lines, density = np.concatenate(lines), np.concatenate(density)
    # Neighbours share a side: the denser one shows.
    order = np.argsort(density, kind="stable")
    lines, density = lines[order], density[order]
    style = {"capstyle": "projecting", "clip_on": False}
    axis.add_collection(LineCollection(lines, linewidths=1.8, colors="black", alpha=0.35, **style), autolim=False)
    outlines = LineCollection(lines, linewidths=0.9, cmap=COLOURS, norm=NORM, **style)
    outlines.set_array(density)
    axis.add_collection(outlines, autolim=False)
    for number, piece in enumerate(np.flatnonzero(goes_on), start=1):
        for x, piece_shown, text, side in [
            (width, piece, f" ▸{number}", "left"),
            (0, piece + 1, f"{number}▸ ", "right"),
        ]:
            middle = places.boxes[piece_shown, [1, 3]].mean()
            axis.text(x, middle, text, ha=side, va="center", fontsize=6, color="0.3")
