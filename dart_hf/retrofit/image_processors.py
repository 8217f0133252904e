"""Image processors of a dartified model and of its teacher."""

import copy

import numpy as np
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import SizeDict

NORMALIZATION = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")


def check_same_normalization(image_processor: BaseImageProcessor, original: BaseImageProcessor) -> None:
    """Raise a ValueError unless an image processor normalises as the original's."""
    for name in NORMALIZATION:
        given, expected = (getattr(processor, name, None) for processor in (image_processor, original))
        if not np.array_equal(given, expected):
            raise ValueError(
                f"The image processor must normalise as the original's, with {name}={expected}, got {given}."
            )


def resized_processor(image_processor: BaseImageProcessor, side: int) -> BaseImageProcessor:
    """An image processor that shows the same part of an image in `side`×`side` pixels.

    Raises:
        ValueError: `side` is below 1.
    """
    if side < 1:
        raise ValueError(f"teacher_size must be at least 1, got {side}.")
    factor = side / side_of(image_processor)
    resized = copy.deepcopy(image_processor)
    size = {name: round(factor * value) for name, value in dict(image_processor.size).items() if value is not None}
    resized.size = SizeDict(**size)
    if image_processor.crop_size:
        resized.crop_size = SizeDict(height=side, width=side)
    return resized


def side_of(image_processor: BaseImageProcessor) -> int:
    """The height in pixels of the images that an image processor gives."""
    crops = getattr(image_processor, "do_center_crop", False)
    size = image_processor.crop_size if crops else image_processor.size
    return size["height"] or size["shortest_edge"]
