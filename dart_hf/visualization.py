"""Draw where a model's tokens went: outlines of the regions over the image, and the density beside it.

Drawing needs matplotlib, from the extra `quickstart`. It is imported where it is used.
"""

import functools
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from dart_hf.environment import require_packages
from dart_hf.files import atomic_write
from dart_hf.modeling.region_partition import Regions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

# Density is drawn relative to an even spread, from a quarter of it (blue) to four times as much (orange). All colours
# are bright enough to show on a dark photograph.
LOWEST, HIGHEST = 1 / 4, 4
COLOURS = ("#2b4bff", "#19c8ff", "#ffffff", "#ffe100", "#ff8c00")
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
) -> "Figure":
    """Draw images with an outline around the region of every token.

    The colour of an outline shows how many tokens there are for its area, compared with an even spread: blue is sparse,
    orange is dense. A region that reaches the right border of its band continues at the left of the next band. It is
    drawn open at both places, with the same number beside the image.

    Args:
        pixel_values: (B, C, H, W) or (C, H, W), as the model got them.
        regions: The regions of the same images: `model(pixel_values, output_regions=True).regions`.
        titles: A title for each image; the number of tokens is added.
        with_scores: Also draw, beside each image, the density that the regions follow.
        columns: The largest number of images in a row.
        image_mean, image_std: The normalisation of the pixel values, which is undone.

    Returns:
        A figure, for [`save_figure`] or a notebook.

    Raises:
        ValueError: The arguments do not fit together.
        ImportError: matplotlib is not installed.
    """
    require_packages("Drawing", "quickstart", "matplotlib")
    from matplotlib.figure import Figure

    images = _shown_images(pixel_values, image_mean, image_std)
    rectangles = _rectangles_of_images(regions, images)
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
    colours = _density_colours()
    for row, image, title, parts in zip(axes, images, titles, rectangles, strict=False):
        _draw_outlines(row[0], image, parts)
        row[0].set_title(f"{title} · {parts.num_tokens} tokens" if title else f"{parts.num_tokens} tokens")
        if with_scores:
            row[1].imshow(parts.density, cmap=colours.cmap, norm=colours.norm, extent=(0, width, height, 0))
            row[1].set_title("density")
    for axis in axes.flat:
        axis.set_axis_off()
    bar = figure.colorbar(colours, ax=axes, ticks=list(TICKS), shrink=0.6, aspect=30, pad=0.01)
    bar.ax.set_yticklabels(TICKS.values())
    bar.ax.minorticks_off()
    bar.set_label("tokens per area, relative to an even spread")
    if any(parts.wraps.any() for parts in rectangles):
        figure.supxlabel("The same number at both sides: one region, which continues in the next band.", fontsize=7)
    return figure


def draw_model_regions(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    image: str | os.PathLike,
    num_patches: int | None = None,
    with_scores: bool = False,
) -> "Figure":
    """Run a model on an image file and draw the regions of its tokens.

    Args:
        model: A DART model; it needs no classifier.
        image_processor: Prepares the image.
        image: The file.
        num_patches: Token budget; by default the model's own.
        with_scores: As for [`draw_regions`].

    Raises:
        ValueError: An argument is out of range, or the file is no image.
        OSError: The file is missing or unreadable.
        ImportError: matplotlib is not installed.
    """
    require_packages("Drawing", "quickstart", "matplotlib")
    pixel_values = image_processor(image, return_tensors="pt").pixel_values
    with torch.inference_mode():
        outputs = model(pixel_values.to(model.device), num_patches=num_patches, output_regions=True)
    return draw_regions(
        pixel_values,
        outputs.regions,
        titles=[Path(image).name],
        with_scores=with_scores,
        image_mean=image_processor.image_mean,
        image_std=image_processor.image_std,
    )


def save_figure(figure: "Figure", path: str | os.PathLike) -> Path:
    """Write a figure in the format that the file's name ends in. The file is written completely or not at all.

    Raises:
        ValueError: The name does not end in a picture format that matplotlib writes.
        FileNotFoundError: The folder does not exist.
    """
    path = checked_picture_path(path)
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:].lower(), dpi=150, bbox_inches="tight")
    with atomic_write(path) as unfinished:
        unfinished.write_bytes(content.getvalue())
    return path


def checked_picture_path(path: str | os.PathLike) -> Path:
    """Check that [`save_figure`] can write to a path: it raises the same errors, before there is a figure."""
    require_packages("Drawing", "quickstart", "matplotlib")
    from matplotlib.backend_bases import FigureCanvasBase

    path = Path(path)
    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise ValueError(f"Cannot write {str(path)!r}: its name must end in one of .{', .'.join(sorted(formats))}.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"Cannot write {str(path)!r}: there is no folder {str(path.parent)!r}.")
    return path


@functools.cache
def _density_colours() -> "ScalarMappable":
    """The colours of density, relative to an even spread."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    return ScalarMappable(LogNorm(LOWEST, HIGHEST, clip=True), LinearSegmentedColormap.from_list("density", COLOURS))


@dataclass
class _Rectangles:
    """The rectangles of one image that have an area.

    Args:
        boxes: (M, 4) as x0, y0, x1, y1 in pixels, in the order of the strip.
        relative: (M,) the tokens per area of the rectangle's region, as a multiple of an even spread.
        wraps: (M,) whether the next rectangle belongs to the same region.
        density: (G, G) as a multiple of its mean.
        num_tokens: The number of tokens, N.
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


def _rectangles_of_images(regions: Regions, images: np.ndarray) -> list[_Rectangles]:
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
    boxes, tokens = (tensor.detach().cpu().numpy() for tensor in regions.boxes()[:2])
    scores = regions.scores.detach().double().cpu().numpy()
    return [
        _rectangles_of_image(*image, height * width / num_tokens, num_tokens)
        for image in zip(boxes, tokens, scores, strict=True)
    ]


def _rectangles_of_image(
    boxes: np.ndarray, tokens: np.ndarray, scores: np.ndarray, even_area: float, num_tokens: int
) -> _Rectangles:
    sides = boxes[:, 2:] - boxes[:, :2]
    areas = np.bincount(tokens, weights=sides.prod(axis=1), minlength=num_tokens)
    seen = (sides > 1e-3).all(axis=1)
    boxes, tokens = boxes[seen], tokens[seen]
    mean = scores.mean()
    return _Rectangles(
        boxes=boxes,
        relative=even_area / areas[tokens],
        wraps=np.append(tokens[1:] == tokens[:-1], False),
        # Unusable scores gave an even spread.
        density=scores / mean if np.isfinite(mean) and mean > 0 else np.ones_like(scores),
        num_tokens=num_tokens,
    )


def _draw_outlines(axis: "Axes", image: np.ndarray, parts: _Rectangles) -> None:
    from matplotlib.collections import LineCollection

    height, width = image.shape[:2]
    axis.imshow(image, extent=(0, width, height, 0))
    x0, y0, x1, y1 = parts.boxes.T
    open_right = parts.wraps
    open_left = np.roll(open_right, 1)
    lines, density = [], []
    for start, end, drawn in [
        ((x0, y0), (x1, y0), np.ones_like(open_right)),
        ((x0, y1), (x1, y1), np.ones_like(open_right)),
        ((x0, y0), (x0, y1), ~open_left),
        ((x1, y0), (x1, y1), ~open_right),
    ]:
        lines.append(np.stack([np.stack(start, axis=1), np.stack(end, axis=1)], axis=1)[drawn])
        density.append(parts.relative[drawn])
    lines, density = np.concatenate(lines), np.concatenate(density)
    # Two neighbours share a side; the denser one is drawn last and stays visible.
    order = np.argsort(density, kind="stable")
    lines, density = lines[order], density[order]
    style = {"capstyle": "projecting", "clip_on": False}
    axis.add_collection(LineCollection(lines, linewidths=1.8, colors="black", alpha=0.35, **style), autolim=False)
    colours = _density_colours()
    outlines = LineCollection(lines, linewidths=0.9, cmap=colours.cmap, norm=colours.norm, **style)
    outlines.set_array(density)
    axis.add_collection(outlines, autolim=False)
    for number, piece in enumerate(np.flatnonzero(open_right), start=1):
        for x, piece_shown, text, side in [
            (width, piece, f" ▸{number}", "left"),
            (0, piece + 1, f"{number}▸ ", "right"),
        ]:
            middle = parts.boxes[piece_shown, [1, 3]].mean()
            axis.text(x, middle, text, ha=side, va="center", fontsize=6, color="0.3")
