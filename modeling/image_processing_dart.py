"""Prepare: images -> pixel_values (B, 3, H, W).

The default is the transform that the published checkpoints were evaluated with: short side to 512 pixels (bicubic), the
central 448×448, values to [0, 1], ImageNet mean and standard deviation.
"""

import base64
import io
import math
import os
from collections.abc import Iterator
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
    load_image,
)

# A strip of 2×5,000 pixels would become 512×1,280,000 before its central 448 are cropped. What lies outside this many
# times the crop is cut off first.
LONGEST_ASPECT = 32
DOWNLOAD_SECONDS = 30


class DartImageProcessor(TorchvisionBackend):
    """Turns images into the `pixel_values` of a DART model.

    Takes one image or a list: PIL images, paths, URLs, numpy arrays and torch tensors (H×W, H×W×C, C×H×W; four
    dimensions are a batch). Grey, palette and transparent images become RGB, on white where they are transparent. An
    array that can be read both ways is read with three channels (1×1×3 is one RGB pixel), else channels first;
    `input_data_format` overrules that. `do_convert_rgb=False` leaves the channels as they are.

    The type of an array's values tells their range:

    - integers go from 0 to 255, booleans are 0 and 255;
    - 16-bit unsigned integers (PIL's 16-bit grey too) go from 0 to 65535 and keep their precision: they are scaled by
      1/65535 where others are scaled by 1/255. A `rescale_factor` other than 1/255 is applied to them as it is;
    - floating point values go from 0 to 255, as everywhere in transformers, or from 0 to 1 with `do_rescale=False`. An
      image whose largest value is at most 1 is refused without that: it would come out black.

    Raises:
        ValueError: An image has no pixels, NaN or infinite pixels, values out of range, or a wrong number of channels.
            Or every resized image would be smaller than `crop_size`.
        OSError: A file is missing or unreadable.
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
        # A pipeline also looks for a video processor. Unless a type is named it takes this class's remote code for one,
        # and asks whether to trust that even where this package is installed.
        return {**super().to_dict(), "video_processor_type": "none"}

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Read what is a path or URL; leave everything else as it is."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(entry) for entry in image_url_or_urls]
        if isinstance(image_url_or_urls, (str, os.PathLike)):
            return read_image(image_url_or_urls)
        return image_url_or_urls

    def _prepare_images_structure(self, images: ImageInput, expected_ndims: int = 3) -> list[Any]:
        flat = list(_flatten(self.fetch_images(images)))
        if not flat:
            raise ValueError("images is empty; give at least one image.")
        return flat

    def process_image(
        self,
        image: Image.Image | np.ndarray | torch.Tensor,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        device: torch.device | None = None,
        do_rescale: bool | None = None,
        rescale_factor: float | None = None,
        do_normalize: bool | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """One image as (C, H, W): uint8, or float32 where 8 bits do not hold its values."""
        if isinstance(image, Image.Image):
            image, input_data_format = _pil_to_array(image, do_convert_rgb), ChannelDimension.LAST
        if isinstance(image, np.ndarray):
            image = _array_to_tensor(image)
        if image.ndim == 2:
            image, input_data_format = image[None], ChannelDimension.FIRST
        if do_convert_rgb:
            input_data_format = _channel_dimension(image, input_data_format)
        image = super().process_image(image, do_convert_rgb=False, input_data_format=input_data_format, device=device)
        if image.numel() == 0:
            raise ValueError(f"An image has no pixels: it is {image.shape[-2]} high and {image.shape[-1]} wide.")
        white = _white(do_rescale, rescale_factor, do_normalize)
        image = _checked_values(image, white)
        return _to_rgb(image, white or 1.0) if do_convert_rgb else image

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
        # Images of one size are stacked, and 8-bit images in one stack with others would be resized without rounding.
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
            # The model reads pixels with their channels side by side in memory, and would have to copy them.
            features["pixel_values"] = features["pixel_values"].contiguous(memory_format=torch.channels_last)
        return features

    def center_crop(self, image: torch.Tensor, size: SizeDict, **kwargs: Any) -> torch.Tensor:
        """Torchvision's own crop, as published: it rounds half a pixel of border where the backend's rounds down."""
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
            # Bicubic interpolation overshoots at edges. In 8 bits resizing clips that, so floating point does as well.
            images = images.clamp(0, white)
        return super().rescale_and_normalize(images, do_rescale, rescale_factor, do_normalize, image_mean, image_std)


def read_image(path: str | os.PathLike) -> Image.Image:
    """Read an image file upright (as its EXIF orientation says), or an image at an http(s) or data URL.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: The file or what is at the URL cannot be had or read as an image.
    """
    path = os.fspath(path)
    try:
        with Image.open(_content(path)) as image:
            return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        shown = path if len(path) <= 100 else f"{path[:100]}…"
        raise OSError(f"Cannot read {shown!r} as an image: {error}") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """The pixels that a model gets of a PIL image, whichever way it comes: turned as EXIF says, then RGB.

    transformers' pipelines do this before any image processor sees the image.

    Raises:
        ValueError: The image has 16 or 32 bits a channel (modes I;16, I, F), which RGB would clip.
        OSError: The file of the image is damaged.
    """
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"It has mode {image.mode!r}, 16 or 32 bits a pixel; save it with 8 bits a channel, or give the image "
            "processor its pixels as an array."
        )
    return load_image(image)


def _content(path: str) -> str | io.BytesIO:
    """What PIL can open: the path of a file, or the bytes at a URL."""
    if path.startswith(("http://", "https://")):
        with urlopen(path, timeout=DOWNLOAD_SECONDS) as answer:
            return io.BytesIO(answer.read())
    if path.startswith("data:image/"):
        return io.BytesIO(base64.b64decode(path.partition(",")[2], validate=True))
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no image file {path!r}.")
    return path


def _flatten(images: Any) -> Iterator[Image.Image | np.ndarray | torch.Tensor]:
    if isinstance(images, (list, tuple)):
        for entry in images:
            yield from _flatten(entry)
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


def _pil_to_array(image: Image.Image, do_convert_rgb: bool | None) -> np.ndarray:
    """(H, W) or (H, W, C); RGB and RGBA where the mode is another one of 8 bits and RGB is asked for."""
    try:
        if do_convert_rgb and not image.mode.startswith(("I", "F")):
            transparent = "A" in image.getbands() or "transparency" in image.info
            image = image.convert("RGBA" if transparent else "RGB")
        return np.array(image)
    except (OSError, SyntaxError, ValueError) as error:
        name = getattr(image, "filename", "") or f"an image of mode {image.mode!r}"
        raise OSError(f"Cannot read {name}: {error}.") from error


def _array_to_tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype.kind not in "buif":
        raise ValueError(f"An image array must hold numbers, got dtype {array.dtype}.")
    # Torch takes neither the other byte order nor negative strides, and warns of read-only memory.
    return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))


def _channel_dimension(image: torch.Tensor, given: str | ChannelDimension | None) -> ChannelDimension:
    """Which side of (C, H, W) or (H, W, C) holds the channels; three channels are the likeliest reading."""
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
    """The value of white: what rescaling brings to 1, or the 1 that normalisation expects; None without either."""
    if do_rescale:
        return 1 / rescale_factor
    return 1.0 if do_normalize else None


def _checked_values(image: torch.Tensor, white: float | None) -> torch.Tensor:
    """Bring (C, H, W) to uint8 or float32, or say in a sentence why its values are no image's."""
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
    # Who computed the values may have rounded; rescaling clips.
    if low < -1e-3 * white or high > 1.001 * white:
        raise ValueError(f"Pixels must be from 0 to {white:g}, got {low:g} to {high:g}.")
    return image


def _to_rgb(image: torch.Tensor, white: float) -> torch.Tensor:
    """(1…4, H, W) -> (3, H, W), on white where there is alpha."""
    if image.shape[0] in (2, 4):
        white = 255.0 if image.dtype == torch.uint8 else white
        colour, alpha = image[:-1].to(torch.float32), image[-1:].to(torch.float32) / white
        blended = colour * alpha + white * (1 - alpha)
        image = blended.round().to(torch.uint8) if image.dtype == torch.uint8 else blended
    return image.expand(3, -1, -1)


def _trim(image: torch.Tensor, shortest_edge: int, crop: int) -> torch.Tensor:
    """Cut off what lies far beyond a central crop of `crop` pixels once the short side is `shortest_edge` pixels."""
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
