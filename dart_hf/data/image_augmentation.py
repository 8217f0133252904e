"""Augmentation of one training image, by timm's and torchvision's transforms."""

from collections.abc import Callable

import PIL.Image
import torch
from timm.data import create_transform
from torchvision.transforms import v2
from transformers import BaseImageProcessor

from dart_hf.modeling.image_processing_dart import upright_rgb


def training_transform(
    image_processor: BaseImageProcessor,
    auto_augment: str | None = None,
    random_erasing: float = 0.0,
    crop_scale: float = 1.0,
    horizontal_flip: float = 0.5,
    color_jitter: float = 0.0,
) -> Callable[[PIL.Image.Image], torch.Tensor]:
    """timm's training transform with the size, mean and standard deviation of an image processor.

    Args:
        image_processor: It must crop (`crop_size`) and normalise.
        auto_augment: timm's name of a policy, such as "rand-m9-mstd0.5-inc1" (RandAugment as in DeiT).
        random_erasing: Probability that a rectangle of the image becomes noise.
        crop_scale: Smallest share of the image's area in a random crop. With 1 the crop is the largest central square.
        horizontal_flip: Probability of a mirror image.
        color_jitter: Strength of random brightness, contrast and saturation. It has no effect beside `auto_augment`.

    Returns:
        A function that turns a PIL image into a normalised tensor (3, H, W).

    Raises:
        ValueError: A probability or share is out of range, or timm has no policy `auto_augment`.
    """
    shares = {"random_erasing": random_erasing, "horizontal_flip": horizontal_flip, "color_jitter": color_jitter}
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be from 0 to 1, got {value}.")
    if not 0 < crop_scale <= 1:
        raise ValueError(f"crop_scale must be above 0 and at most 1, got {crop_scale}.")
    size = image_processor.crop_size
    try:
        augment = create_transform(
            (3, size["height"], size["width"]),
            is_training=True,
            auto_augment=auto_augment,
            re_prob=random_erasing,
            re_mode="pixel",
            scale=(crop_scale, 1.0),
            # A crop with another aspect ratio than the image is smaller than the image, so crop_scale=1 has none.
            ratio=(3 / 4, 4 / 3) if crop_scale < 1 else (1.0, 1.0),
            hflip=horizontal_flip,
            color_jitter=color_jitter,
            interpolation="bicubic",
            mean=tuple(image_processor.image_mean),
            std=tuple(image_processor.image_std),
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(
            f"auto_augment={auto_augment!r} is no policy of timm's such as 'rand-m9-mstd0.5-inc1'."
        ) from error
    return v2.Compose([upright_rgb, augment])
