"""Count the regions on an object, to see in numbers where the tokens went."""

from typing import Any

import torch
from datasets import Dataset
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_utils import PreTrainedModel

from dart_hf.modeling.region_partition import Regions

BATCH_SIZE = 90


def regions_on_boxes(regions: Regions, boxes: torch.Tensor) -> torch.Tensor:
    """Count the regions on a box of each image. A region counts with the share of its area that is inside the box.

    For an even partition this is the number of regions times the box's share of the image.

    Args:
        regions: The regions of B images.
        boxes: (B, 4) as x0, y0, x1, y1 in pixels.

    Returns:
        (B,), from 0 to the number of regions.
    """
    rectangles, tokens = regions.boxes()[:2]
    boxes = boxes.to(rectangles)[:, None]
    areas = (rectangles[..., 2:] - rectangles[..., :2]).prod(dim=-1)
    starts = torch.maximum(rectangles[..., :2], boxes[..., :2])
    ends = torch.minimum(rectangles[..., 2:], boxes[..., 2:])
    inside = (ends - starts).clamp(min=0).prod(dim=-1)
    # A region can have several rectangles.
    none = areas.new_zeros(areas.shape[0], regions.strip_edges.shape[1] - 1)
    areas, inside = none.scatter_add(1, tokens, areas), none.scatter_add(1, tokens, inside)
    return torch.where(areas > 0, inside / areas, 0).sum(dim=1)


@torch.no_grad()
def count_regions_on_boxes(
    model: PreTrainedModel, image_processor: BaseImageProcessor, data: Dataset
) -> dict[str, float]:
    """The mean of [`regions_on_boxes`] over a data set, with the model's own partition and with the even one.

    Args:
        model: Any DART model; it is put in evaluation mode.
        image_processor: It must not change the size of the images, because the boxes are in their pixels.
        data: Columns `image` and `box`.

    Returns:
        `learned`: the mean with the partition of the model's configuration. `uniform`: with the even partition.
    """
    model.eval()
    learned = model.config.partition
    try:
        counts = {"learned": _mean_count(model, image_processor, data)}
        model.config.partition = "uniform"
        counts["uniform"] = _mean_count(model, image_processor, data)
    finally:
        model.config.partition = learned
    return counts


def _mean_count(model: PreTrainedModel, image_processor: BaseImageProcessor, data: Dataset) -> float:
    def count(rows: dict[str, Any]) -> torch.Tensor:
        pixel_values = image_processor(rows["image"], return_tensors="pt")["pixel_values"].to(model.device)
        base = model.base_model
        regions = base.tokenizer.regions(pixel_values, num_patches=None, look=base.look)
        return regions_on_boxes(regions, torch.tensor(rows["box"]))

    return torch.cat([count(rows) for rows in data.iter(BATCH_SIZE)]).double().mean().item()
