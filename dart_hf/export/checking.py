"""Compare an exported program with its model, on images that are computed here."""

from collections.abc import Callable

import torch
from torch.nn.functional import interpolate

# The largest accepted difference from PyTorch's logits, as a share of the largest logit. float32 gives the edges of
# regions to a thousandth of a pixel, which changes logits by up to 0.3% on images of noise with random weights. A wrong
# program is off by its whole value.
TOLERANCE = 0.01
# The largest accepted root mean square of what 8 bits change, as a share of that of the logits.
INT8_TOLERANCE = 0.1
# The tracer would take 0 or 1 for a constant.
EXAMPLE_BATCH = 2


class ProgramCheck:
    """The logits that an exported program must give for some images.

    Args:
        run: The model as a function: pixel_values -> logits.
        input_shape: (C, H, W) of the images.
    """

    def __init__(self, run: Callable[[torch.Tensor], torch.Tensor], input_shape: tuple[int, int, int]) -> None:
        self.batches = example_batches(input_shape)
        self.expected = torch.cat([run(batch) for batch in self.batches])

    def deviation(self, run: Callable[[torch.Tensor], torch.Tensor]) -> float:
        """The largest difference of a program's logits, as a share of the largest logit.

        Raises:
            ValueError: It is above [`TOLERANCE`] or NaN.
        """
        deviation = float(self._differences(run).abs().max() / self.expected.abs().max())
        if not deviation <= TOLERANCE:
            raise ValueError(
                f"The exported program does not agree with PyTorch: their logits differ by {deviation:.2%} of the "
                f"largest, and at most {TOLERANCE:.0%} is accepted; nothing was written."
            )
        return deviation

    def int8_deviation(self, run: Callable[[torch.Tensor], torch.Tensor]) -> float:
        """The root mean square of a quantized program's differences, as a share of that of the logits.

        Raises:
            ValueError: It is above [`INT8_TOLERANCE`] or NaN.
        """
        deviation = float(self._differences(run).square().mean().sqrt() / self.expected.square().mean().sqrt())
        if not deviation <= INT8_TOLERANCE:
            raise ValueError(
                f"int8 changes the logits by {deviation:.0%}, and at most {INT8_TOLERANCE:.0%} is accepted; nothing "
                "was written. Export in float32."
            )
        return deviation

    def _differences(self, run: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return torch.cat([run(batch) for batch in self.batches]) - self.expected


def example_batches(input_shape: tuple[int, int, int]) -> list[torch.Tensor]:
    """Smooth images and noise, of mean 0 and variance 1, in batches of several sizes."""
    generator = torch.Generator().manual_seed(0)
    smooth = _smooth_images(5, input_shape, generator)
    noise = torch.randn(EXAMPLE_BATCH + 1, *input_shape, generator=generator)
    return [smooth[:1], smooth[:EXAMPLE_BATCH], smooth, noise[:1], noise]


def _smooth_images(count: int, input_shape: tuple[int, int, int], generator: torch.Generator) -> torch.Tensor:
    """Random images (count, C, H, W) that vary as photographs do: equally at every scale, and alike in all channels."""
    num_channels, *size = input_shape
    images = torch.zeros(count, num_channels, *size)
    for cells in (2, 4, 8, 16, 32, 64):
        grey = torch.randn(count, 1, cells, cells, generator=generator)
        colour = torch.randn(count, num_channels, cells, cells, generator=generator)
        images += interpolate(grey + 0.3 * colour, size, mode="bicubic", antialias=True)
    mean, deviation = images.mean(dim=(1, 2, 3), keepdim=True), images.std(dim=(1, 2, 3), keepdim=True)
    return (images - mean) / deviation
