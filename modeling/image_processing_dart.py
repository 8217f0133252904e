"""Prepare: images -> pixel_values (B, 3, H, W).

The default is the transform that the published checkpoints were evaluated with: short side to 512 pixels (bicubic), the
central 448×448, values to [0, 1], ImageNet mean and standard deviation.
"""

import base64
import io
import math
import os
import struct
from collections.abc import Iterator
from http.client import HTTPException
from typing import Any
from urllib.request import urlopen

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as tvF
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
    load_image,
)

# A strip of 2×5,000 pixels would become 512×1,280,000 before the crop to 448. So the parts of an image that are further
# out than this many times the crop are cut off first.
LONGEST_ASPECT = 32
DOWNLOAD_SECONDS = 30
# What PIL's plugins and a broken download raise.
READING_ERRORS = (
    *(OSError, ValueError, SyntaxError, EOFError, RuntimeError, struct.error, Image.DecompressionBombError),
    HTTPException,
)


class DartImageProcessor(TorchvisionBackend):
    """Turns images into the `pixel_values` of a DART model.

    Takes one image or a list: PIL images, paths, URLs, numpy arrays and torch tensors (H×W, H×W×C, C×H×W; four
    dimensions are a batch).

    PIL images and files are turned as their EXIF orientation says, then converted to RGB by PIL, which drops
    transparency. transformers' pipelines do this before any processor sees an image, so an image has the same pixels
    whichever way it comes. Images with 16 or 32 bits a channel (modes I;16, I and F) are refused, because PIL clips
    them; pipelines cannot refuse them.

    Arrays become RGB too: grey is repeated, transparency dropped. An array that can be read both ways is read with
    three channels (1×1×3 is one RGB pixel), else channels first; `input_data_format` overrules that. The type of the
    values tells their range:

    - integers go from 0 to 255, booleans are 0 and 255;
    - 16-bit unsigned integers go from 0 to 65535 and keep their precision: they are scaled by 1/65535 where others are
      scaled by 1/255. A `rescale_factor` other than 1/255 is applied to them as it is;
    - floating point values go from 0 to 255, as everywhere in transformers, or from 0 to 1 with `do_rescale=False`. An
      image whose largest value is at most 1 is refused without that, because it would come out black.

    `do_convert_rgb=False` leaves the channels and bits of any image as they are.

    Raises:
        ValueError: An image has no pixels, NaN or infinite pixels, values out of range, a wrong number of channels, or
            too many bits. Or every resized image would be smaller than `crop_size`.
        OSError: A file is missing, unreadable, or has too many bits.
    """

    do_convert_rgb = True
    do_resize = True
    size = {"shortest_edge": 512}
    default_to_square = False
    resample = PILImageResampling.BICUBIC
    do_center_crop = True
    crop_size = {"height": 448, "width": 448}
    do_rescale = True
    do_normalize = True
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD

    def to_dict(self) -> dict[str, Any]:
        # A pipeline also looks for a video processor. Without a name it would take this class's remote code for one,
        # and ask the user to trust it even if this package is installed.
        return {**super().to_dict(), "video_processor_type": "none"}

    def preprocess(self, images: ImageInput, *args: Any, **kwargs: Any) -> BatchFeature:
        """Prepare one image or a list of images; see the class."""
        names = ("do_convert_rgb", "input_data_format", "do_rescale", "rescale_factor", "do_normalize")
        convert_rgb, data_format, *scaling = (kwargs.get(name, getattr(self, name, None)) for name in names)
        white = _white(*scaling)
        tensors = [_to_tensor(image, convert_rgb, data_format, white) for image in _flatten(images, convert_rgb)]
        if not tensors:
            raise ValueError("images is empty; give at least one image.")
        kwargs |= {"do_convert_rgb": False, "input_data_format": ChannelDimension.FIRST}
        return super().preprocess(tensors, *args, **kwargs)

    def _preprocess(
        self,
        images: list[torch.Tensor],
        do_resize: bool,
        size: SizeDict,
        do_center_crop: bool,
        crop_size: SizeDict,
        disable_grouping: bool | None,
        **kwargs: Any,
    ) -> BatchFeature:
        if do_center_crop and not (crop_size and crop_size.height and crop_size.width):
            raise ValueError(f"crop_size must have a height and a width, got {dict(crop_size or {})}.")
        if do_resize and do_center_crop:
            _check_crop(size, crop_size)
        if do_resize and do_center_crop and size.shortest_edge and not size.longest_edge:
            images = [_trim(image, size.shortest_edge, max(crop_size.height, crop_size.width)) for image in images]
        # Images of one size are resized in a stack. In a stack with others, 8-bit images would be resized without
        # rounding.
        if len({image.dtype for image in images}) > 1:
            disable_grouping = True
        features = super()._preprocess(
            images,
            do_resize=do_resize,
            size=size,
            do_center_crop=do_center_crop,
            crop_size=crop_size,
            disable_grouping=disable_grouping,
            **kwargs,
        )
        if isinstance(features["pixel_values"], torch.Tensor):
            # The memory format that the model reads; otherwise it would have to copy the pixels.
            features["pixel_values"] = features["pixel_values"].contiguous(memory_format=torch.channels_last)
        return features

    def center_crop(self, image: torch.Tensor, size: SizeDict, **kwargs: Any) -> torch.Tensor:
        """Torchvision's crop, as published. It rounds half a pixel of border, which the backend's crop rounds down."""
        return tvF.center_crop(image, [size.height, size.width])

    def rescale_and_normalize(
        self,
        images: torch.Tensor,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | list[float] | None,
        image_std: float | list[float] | None,
    ) -> torch.Tensor:
        """Rescale and normalise (B, C, H, W)."""
        white = _white(do_rescale, rescale_factor, do_normalize)
        if images.is_floating_point() and white is not None:
            # Bicubic interpolation overshoots at edges. Resizing clips that in 8 bits, but not in floating point.
            images = images.clamp(0, white)
        return super().rescale_and_normalize(images, do_rescale, rescale_factor, do_normalize, image_mean, image_std)


def read_image(path: str | os.PathLike, do_convert_rgb: bool = True) -> Image.Image:
    """Read an image file, or an image at an http(s) or data URL, as [`upright_rgb`], or only upright in its own mode.

    transformers' `load_image` gives the same pixels, but reads error pages as images and clips images of 16 bits.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: The file or URL cannot be read as an image, or the image has more than 8 bits a channel.
    """
    path = os.fspath(path)
    try:
        with Image.open(_content(path)) as image:
            return upright_rgb(image) if do_convert_rgb else ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise
    except READING_ERRORS as error:
        shown = path if len(path) <= 100 else f"{path[:100]}…"
        raise OSError(f"Cannot read {shown!r} as an image: {error}") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """An image as a model gets it, by the rule of transformers' pipelines: turned as EXIF says, then converted to RGB.

    Raises:
        ValueError: The image has 16 or 32 bits a channel (modes I;16, I and F), which RGB would clip.
        OSError: The image's file is damaged.
    """
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"mode {image.mode!r} has 16 or 32 bits a channel, which RGB would clip; save the image with 8 bits a "
            "channel, or give the image processor its pixels as an array."
        )
    return load_image(image)


def _content(path: str) -> str | io.BytesIO:
    """The path of a file, or the bytes at a URL, for PIL to open."""
    if path.startswith(("http://", "https://")):
        with urlopen(path, timeout=DOWNLOAD_SECONDS) as answer:
            return io.BytesIO(answer.read())
    if path.startswith("data:image/"):
        return io.BytesIO(base64.b64decode(path.partition(",")[2], validate=True))
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no image file {path!r}.")
    return path


def _flatten(images: Any, do_convert_rgb: bool | None) -> Iterator[Image.Image | np.ndarray | torch.Tensor]:
    """The single images in lists and batches; paths and URLs are read."""
    if isinstance(images, (list, tuple)):
        for entry in images:
            yield from _flatten(entry, do_convert_rgb)
    elif isinstance(images, (str, os.PathLike)):
        yield read_image(images, bool(do_convert_rgb))
    elif isinstance(images, Image.Image):
        yield images
    elif not isinstance(images, (np.ndarray, torch.Tensor)):
        raise ValueError(f"An image must be a PIL image, array, tensor, path or URL, got {type(images).__name__}.")
    elif images.ndim == 4:
        yield from images
    elif images.ndim in (2, 3):
        yield images
    else:
        raise ValueError(f"An image array must have 2 or 3 dimensions, or 4 for a batch; got {tuple(images.shape)}.")


def _to_tensor(
    image: Image.Image | np.ndarray | torch.Tensor,
    do_convert_rgb: bool | None,
    data_format: str | ChannelDimension | None,
    white: float | None,
) -> torch.Tensor:
    """One image as (C, H, W): uint8, or float32 if 8 bits do not hold its values. `white` is the value of white."""
    if isinstance(image, Image.Image):
        image, data_format = _pil_to_array(image, do_convert_rgb), ChannelDimension.LAST
    if isinstance(image, np.ndarray):
        image = _array_to_tensor(image)
    if image.ndim == 2:
        image, data_format = image[None], ChannelDimension.FIRST
    if do_convert_rgb:
        data_format = _channel_dimension(image, data_format)
    elif data_format is None:
        data_format = infer_channel_dimension_format(image, num_channels=(1, 3, 4))
    if data_format == ChannelDimension.LAST:
        image = image.permute(2, 0, 1)
    if image.numel() == 0:
        raise ValueError(f"An image has no pixels: it is {image.shape[-2]} high and {image.shape[-1]} wide.")
    image = _checked_values(image, white)
    if not do_convert_rgb:
        return image
    # Two and four channels have transparency as their last one.
    return image[: 3 if len(image) > 2 else 1].expand(3, -1, -1)


def _pil_to_array(image: Image.Image, do_convert_rgb: bool | None) -> np.ndarray:
    """(H, W, 3), or (H, W) or (H, W, C) in the image's own mode without conversion."""
    name = getattr(image, "filename", "") or f"an image of mode {image.mode!r}"
    try:
        return np.array(upright_rgb(image) if do_convert_rgb else ImageOps.exif_transpose(image))
    except READING_ERRORS as error:
        kind = ValueError if isinstance(error, ValueError) else OSError
        raise kind(f"Cannot read {name}: {error}") from error


def _array_to_tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype.kind not in "buif":
        raise ValueError(f"An image array must hold numbers, got dtype {array.dtype}.")
    # Torch takes neither the other byte order nor negative strides, and warns of read-only memory.
    return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))


def _channel_dimension(image: torch.Tensor, given: str | ChannelDimension | None) -> ChannelDimension:
    """Tell if an array is (C, H, W) or (H, W, C). Three channels are the likeliest."""
    sides = [ChannelDimension.FIRST, ChannelDimension.LAST] if given is None else [ChannelDimension(given)]
    for channels in (3, 4, 1, 2):
        for side in sides:
            if image.shape[0 if side == ChannelDimension.FIRST else 2] == channels:
                return side
    raise ValueError(
        "An image must have 1 (grey), 2 (grey and alpha), 3 (RGB) or 4 (RGBA) channels, "
        f"first or last; got an array of shape {tuple(image.shape)}."
    )


def _white(do_rescale: bool | None, rescale_factor: float | None, do_normalize: bool | None) -> float | None:
    """The value of white, which rescaling turns into 1 or normalisation expects to be 1; None without both."""
    if do_rescale:
        return 1 / rescale_factor
    return 1.0 if do_normalize else None


def _checked_values(image: torch.Tensor, white: float | None) -> torch.Tensor:
    """(C, H, W) in uint8 or float32. A ValueError says why the values cannot be those of an image."""
    if image.dtype == torch.uint8:
        return image
    if image.dtype == torch.bool:
        return image.to(torch.uint8) * 255
    if image.dtype == torch.uint16 and white is not None and math.isclose(white, 255):
        return image.to(torch.float32) / 257
    if not image.is_floating_point() and image.dtype != torch.uint16:
        low, high = (int(value) for value in image.to(torch.int64).aminmax())
        if low < 0 or high > 255:
            raise ValueError(
                f"Integer pixels must be from 0 to 255, got {low} to {high}; "
                "pass 16-bit images as unsigned 16-bit integers."
            )
        return image.to(torch.uint8)
    image = image.to(torch.float32)
    low, high = (float(value) for value in image.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("An image has NaN or infinite pixels.")
    if white is None:
        return image
    if white > 1 and 0 < high <= 1:
        raise ValueError(
            f"The largest pixel is {high:g} where {white:g} is white; "
            "pass do_rescale=False if the values go from 0 to 1 already."
        )
    # Computed values may be off by rounding; rescaling clips them.
    if low < -1e-3 * white or high > 1.001 * white:
        raise ValueError(f"Pixels must be from 0 to {white:g}, got {low:g} to {high:g}.")
    return image


def _trim(image: torch.Tensor, shortest_edge: int, crop: int) -> torch.Tensor:
    """Cut off the parts of (C, H, W) that lie far outside the central crop after resizing."""
    height, width = image.shape[-2:]
    longest = math.ceil(LONGEST_ASPECT * min(height, width) * max(1, crop / shortest_edge))
    top, left = max(0, (height - longest) // 2), max(0, (width - longest) // 2)
    return image[:, top : height - top, left : width - left]


def _check_crop(size: SizeDict, crop_size: SizeDict) -> None:
    """Raise a ValueError if every resized image is smaller than its crop."""
    if size.shortest_edge:
        fits = size.shortest_edge >= min(crop_size.height, crop_size.width)
    else:
        fits = not size.height or (size.height >= crop_size.height and size.width >= crop_size.width)
    if not fits:
        given = " × ".join(str(size[side]) for side in ("shortest_edge", "height", "width") if size[side])
        raise ValueError(
            f"size ({given}) is smaller than crop_size ({crop_size.height} × {crop_size.width}), which would give "
            "every image black borders; give a crop_size that fits."
        )


__all__ = ["DartImageProcessor"]
