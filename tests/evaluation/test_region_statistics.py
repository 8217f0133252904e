"""Counting the regions on a box."""

import pytest
import torch

from dart_hf.data.digits_on_photos import digits_on_photos
from dart_hf.evaluation.region_statistics import count_regions_on_boxes, regions_on_boxes
from dart_hf.modeling.region_partition import Regions, flow_regions, uniform_regions
from dart_hf.quickstart import small_dart


def boxes(*edges: tuple[float, float, float, float]) -> torch.Tensor:
    return torch.tensor(edges)


def test_whole_image_has_all_regions():
    scores = torch.rand(3, 14, 14, generator=torch.Generator().manual_seed(0)) + 0.1
    whole = boxes((0, 0, 48, 32)).expand(3, -1)
    for num_patches in (1, 7, 24):
        regions = flow_regions(scores, num_patches, 32, 48)
        torch.testing.assert_close(regions_on_boxes(regions, whole), torch.full((3,), float(num_patches)))


def test_even_regions_count_by_area():
    regions = uniform_regions(torch.ones(4, 14, 14), 16, 32, 32)
    inside = boxes((8, 8, 16, 16), (4, 4, 12, 20), (0, 0, 4, 4), (5, 5, 5, 9))
    torch.testing.assert_close(regions_on_boxes(regions, inside), torch.tensor([1.0, 2.0, 0.25, 0.0]))


def test_region_over_two_bands_counts_once():
    # Two bands of 4 rows and 8 columns; the second of three regions ends the first band and begins the second.
    regions = Regions(
        scores=torch.ones(1, 14, 14), row_edges=boxes((0, 4, 8))[0][None], strip_edges=torch.tensor([[0.0, 6, 10, 16]])
    )
    assert regions_on_boxes(regions, boxes((6, 0, 8, 4))).item() == pytest.approx(0.5)
    assert regions_on_boxes(regions, boxes((0, 0, 8, 8))).item() == pytest.approx(3)


def test_regions_without_area_do_not_count():
    regions = Regions(
        scores=torch.ones(1, 14, 14), row_edges=torch.tensor([[0.0, 8]]), strip_edges=torch.tensor([[0.0, 4, 4, 8]])
    )
    assert regions_on_boxes(regions, boxes((0, 0, 8, 8))).item() == pytest.approx(2)


def test_count_is_the_mean_over_the_data():
    data = digits_on_photos("test", 1, 32, (16, 24)).select(range(100))
    model, image_processor = small_dart([str(digit) for digit in range(10)], 32, 16)
    counts = count_regions_on_boxes(model, image_processor, data)
    share = torch.tensor([(x1 - x0) * (y1 - y0) / 32**2 for x0, y0, x1, y1 in data["box"]]).mean().item()
    assert counts["uniform"] == pytest.approx(16 * share, rel=1e-5)
    assert counts["learned"] != pytest.approx(counts["uniform"], rel=1e-3)
    assert model.config.partition == "flow"
    assert not model.training


def test_partition_is_restored_after_an_error():
    model, image_processor = small_dart(["0", "1"], 32, 16)
    with pytest.raises(KeyError):
        count_regions_on_boxes(model, image_processor, digits_on_photos("test", 1, 32, (16, 24)).remove_columns("box"))
    assert model.config.partition == "flow"
