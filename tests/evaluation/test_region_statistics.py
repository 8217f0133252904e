"""Counting the regions on a box."""

import pytest
import torch

from dart_hf.data.digits_on_photos import digits_on_photos
from dart_hf.evaluation.region_statistics import count_regions_on_boxes, regions_on_boxes
from dart_hf.modeling.region_partition import Regions, flow_regions
from dart_hf.quickstart import small_dart


def test_whole_image_has_all_regions():
    scores = torch.rand(3, 14, 14, generator=torch.Generator().manual_seed(0)) + 0.1
    whole = torch.tensor([[0.0, 0, 48, 32]]).expand(3, -1)
    for num_patches in (1, 7, 24):
        found = regions_on_boxes(flow_regions(scores, num_patches, 32, 48), whole)
        torch.testing.assert_close(found, torch.full((3,), float(num_patches)))


@pytest.mark.parametrize(
    ("row_edges", "strip_edges", "boxes", "expected"),
    [
        # 16 even regions count by area.
        ([0, 8, 16, 24, 32], [8 * i for i in range(17)], [(8, 8, 16, 16), (4, 4, 12, 20), (0, 0, 4, 4)], [1, 2, 0.25]),
        ([0, 8, 16, 24, 32], [8 * i for i in range(17)], [(5, 5, 5, 9)], [0]),
        # Two bands of 4 rows and 8 columns; the second of three regions ends the first band and begins the second.
        ([0, 4, 8], [0, 6, 10, 16], [(6, 0, 8, 4), (0, 0, 8, 8)], [0.5, 3]),
        # A region without area does not count.
        ([0, 8], [0, 4, 4, 8], [(0, 0, 8, 8)], [2]),
    ],
)
def test_regions_count_by_the_share_on_the_box(row_edges, strip_edges, boxes, expected):
    for box, count in zip(boxes, expected, strict=True):
        regions = Regions(torch.ones(1, 14, 14), torch.tensor([row_edges]).float(), torch.tensor([strip_edges]).float())
        assert regions_on_boxes(regions, torch.tensor([box]).float()).item() == pytest.approx(count)


def test_count_is_the_mean_over_the_data_and_the_partition_is_restored():
    data = digits_on_photos("test", 1, 32, (16, 24)).select(range(100))
    model, image_processor = small_dart([str(digit) for digit in range(10)], 32, 16)
    counts = count_regions_on_boxes(model, image_processor, data)
    share = torch.tensor([(x1 - x0) * (y1 - y0) / 32**2 for x0, y0, x1, y1 in data["box"]]).mean().item()
    assert counts["uniform"] == pytest.approx(16 * share, rel=1e-5)
    assert counts["learned"] != pytest.approx(counts["uniform"], rel=1e-3)
    assert model.config.partition == "flow" and not model.training
    with pytest.raises(KeyError):
        count_regions_on_boxes(model, image_processor, data.remove_columns("box"))
    assert model.config.partition == "flow"
