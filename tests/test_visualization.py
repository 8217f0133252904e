"""Drawings of regions show the regions, and files are written completely or not at all."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from skimage import data

from dart_hf import DartImageProcessor
from dart_hf.modeling.region_partition import flow_regions, grid_regions, uniform_regions
from dart_hf.visualization import draw_regions, save_figure

SIDE = 64


@pytest.fixture(scope="module")
def pixel_values() -> torch.Tensor:
    processor = DartImageProcessor(size=SIDE, crop_size=SIDE)
    return processor([data.coffee(), data.chelsea()], return_tensors="pt").pixel_values


def scores(batch_size: int = 2) -> torch.Tensor:
    """The right half four times as dense as the left."""
    return torch.ones(batch_size, 8, 8).index_fill_(2, torch.arange(4, 8), 4.0)


def outlines(axis) -> tuple[np.ndarray, np.ndarray]:
    """The coloured segments (S, 2, 2) of a drawing, and the density (S,) that colours them."""
    (collection,) = [each for each in axis.collections if each.get_array() is not None]
    assert isinstance(collection, LineCollection)
    return np.array(collection.get_segments()), np.array(collection.get_array())


def numbers(axis) -> dict[str, list[tuple[float, float]]]:
    """Number beside the image -> its positions."""
    found: dict[str, list[tuple[float, float]]] = {}
    for text in axis.texts:
        found.setdefault(text.get_text().strip(" ▸"), []).append(text.get_position())
    return found


def test_even_grid_has_four_sides_per_token_and_one_colour(pixel_values):
    figure = draw_regions(pixel_values, uniform_regions(scores(), 16, SIDE, SIDE))
    segments, density = outlines(figure.axes[0])
    assert len(segments) == 4 * 16
    assert set(np.unique(segments)) == {0, 16, 32, 48, 64}
    np.testing.assert_allclose(density, 1, rtol=1e-5)
    assert numbers(figure.axes[0]) == {}
    assert not figure.get_supxlabel()


def test_colour_shows_the_tokens_per_area(pixel_values):
    axis = draw_regions(pixel_values, grid_regions(scores(), 100, SIDE, SIDE)).axes[0]
    segments, density = outlines(axis)
    # Of 10 columns, 8 lie in the right half: 1.6 times an even spread there, 0.4 times on the left.
    middles = segments.mean(axis=1)[:, 0]
    np.testing.assert_allclose(density[middles > SIDE / 2 + 0.01], 1.6, rtol=1e-4)
    np.testing.assert_allclose(density[middles < SIDE / 2 - 0.01], 0.4, rtol=1e-4)
    # Two neighbours share a side, and the denser one is drawn last.
    assert (np.diff(density) >= 0).all()


def test_wrapped_region_is_open_and_numbered_at_both_ends(pixel_values):
    regions = uniform_regions(scores(), 10, SIDE, SIDE)  # 3 bands of 3⅓ regions: two of them wrap
    figure = draw_regions(pixel_values, regions)
    segments, _ = outlines(figure.axes[0])
    assert len(segments) == 4 * (10 + 2) - 2 * 2
    vertical, band = segments[segments[:, 0, 0] == segments[:, 1, 0]], SIDE / 3
    for side, rows in ((0, [0, band]), (SIDE, [2 * band, SIDE])):
        np.testing.assert_allclose(vertical[vertical[:, 0, 0] == side][:, :, 1], [rows], rtol=1e-5)
    found = numbers(figure.axes[0])
    assert sorted(found) == ["1", "2"]
    for number, ends in found.items():
        expected = [(SIDE, band * (int(number) - 0.5)), (0, band * (int(number) + 0.5))]
        np.testing.assert_allclose(ends, expected, rtol=1e-5)
    assert "next band" in figure.get_supxlabel()


@pytest.mark.parametrize("value", [None, 0.0, float("nan"), float("inf")])
def test_scores_are_drawn_as_density_beside_the_image(pixel_values, value):
    """Unusable scores as an even density."""
    given = scores() if value is None else torch.full((2, 8, 8), value)
    figure = draw_regions(pixel_values, flow_regions(given, 10, SIDE, SIDE), with_scores=True)
    pictures = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in pictures] == ["10 tokens", "density"] * 2
    expected = given[0] / given[0].mean() if value is None else torch.ones(8, 8)
    np.testing.assert_allclose(pictures[1].images[0].get_array(), expected, rtol=1e-6)
    np.testing.assert_allclose(pictures[1].images[0].get_extent(), (0, SIDE, SIDE, 0))


def test_images_are_those_the_model_saw_in_rows_with_titles(pixel_values):
    images = pixel_values[[0, 1, 0, 1, 0]]
    figure = draw_regions(images, uniform_regions(scores(5), 9, SIDE, SIDE), titles=list("abcde"), columns=3)
    assert [axis.get_title() for axis in figure.axes[:6]] == [*(f"{title} · 9 tokens" for title in "abcde"), ""]
    assert sum(len(axis.images) for axis in figure.axes[:6]) == 5
    seen = DartImageProcessor(size=SIDE, crop_size=SIDE, do_normalize=False)(data.chelsea(), return_tensors="np")
    shown = figure.axes[1].images[0]
    np.testing.assert_allclose(shown.get_array(), seen.pixel_values[0].transpose(1, 2, 0), atol=1e-6)
    assert tuple(shown.get_extent()) == (0, SIDE, SIDE, 0)


@pytest.mark.parametrize(
    ("shape", "settings", "sentence"),
    [
        ((2, 3, SIDE, SIDE), {"titles": ["one"]}, "titles must have one entry per image, got 1 for 2"),
        ((2, 3, SIDE, SIDE), {"columns": 0}, "columns must be at least 1, got 0"),
        ((2, 3, SIDE, 32), {}, "regions must be those of pixel_values, 2 of 64×32 pixels; got 2 of 64×64"),
        ((3, 3, SIDE, SIDE), {}, "3 of 64×64 pixels; got 2 of 64×64"),
        ((2, 5, SIDE, SIDE), {}, r"shape \(images, 3, height, width\), got \(2, 5, 64, 64\)"),
        ((SIDE, SIDE), {}, r"got \(64, 64\)"),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused(shape, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        draw_regions(torch.zeros(shape), uniform_regions(scores(), 9, SIDE, SIDE), **settings)


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.PDF", b"%PDF"), ("a.svg", b"<?xml")])
def test_ending_of_the_name_decides_the_format(pixel_values, tmp_path, name, start):
    """Images in half precision and scores with gradients can be drawn, and pyplot keeps none of our figures."""
    regions = uniform_regions(scores(1).requires_grad_(), 9, SIDE, SIDE)
    path = save_figure(draw_regions(pixel_values[0].bfloat16().requires_grad_(), regions), tmp_path / name)
    assert path.read_bytes().startswith(start)
    assert [each.name for each in tmp_path.iterdir()] == [name]
    assert not pyplot.get_fignums()


def test_bad_paths_and_failed_writes_keep_the_old_file(tmp_path, monkeypatch):
    path = save_figure(Figure(), tmp_path / "regions.png")
    old = path.read_bytes()
    with pytest.raises(ValueError, match=r"must end in one of .*\.png"):
        save_figure(Figure(), tmp_path / "regions.doc")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*missing"):
        save_figure(Figure(), tmp_path / "missing" / "regions.png")

    def fail(self, content):
        # A part of the content is written before the disk is full.
        with self.open("wb") as file:
            file.write(content[:100])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        save_figure(Figure(), path)
    assert path.read_bytes() == old
    assert [each.name for each in tmp_path.iterdir()] == ["regions.png"]
