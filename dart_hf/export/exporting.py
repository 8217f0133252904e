"""Export a model as a program that runs without this package: ONNX, or PyTorch's own export format.

An export is a folder with the program, the model's `config.json` with the names of the labels, and the image
processor's `preprocessor_config.json`. Each program is loaded again and compared with the model before it appears.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from dart_hf.environment import require_packages
from dart_hf.export import onnx as onnx_format
from dart_hf.export import torch as torch_format
from dart_hf.export.checking import EXAMPLE_BATCH, ProgramCheck
from dart_hf.export.onnx_scan import scans_as_nodes
from dart_hf.files import atomic_folder, check_output_folder
from dart_hf.hub.loading import load_model

FORMATS = {"onnx": onnx_format, "torch": torch_format}


@dataclass(frozen=True)
class Export:
    """A program that was written.

    Args:
        path: Its file.
        input_shape: (C, H, W) of its images; any number of images makes a batch.
        deviation: The largest difference between its logits and the model's, as a share of the largest logit. With
            int8, this is that of the float32 program that was quantized.
        int8_deviation: With int8, the root mean square of what 8 bits change in the logits, as a share of the logits'
            own; else None.
    """

    path: Path
    input_shape: tuple[int, int, int]
    deviation: float
    int8_deviation: float | None


def export_model(
    source: str | os.PathLike,
    output: str | os.PathLike,
    format: str = "onnx",
    num_patches: int | None = None,
    int8: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Export:
    """Export an image classification model: `pixel_values` (B, C, H, W) in float32 -> `logits` (B, num_labels).

    The batch size is free. H and W are the size that the model's image processor gives to images, or
    `config.image_size` if the image processor gives images different sizes. Image size and token budget are fixed,
    because they decide how many bands an image is cut into. A model in half precision is exported in float32.

    Args:
        source: The model, as for [`load_model`].
        output: Folder to write. It must be new or empty, and appears complete or not at all.
        format: `"onnx"` writes `model.onnx`, `"torch"` writes `model.pt2` for `torch.export.load`.
        num_patches: Token budget; by default the model's own.
        int8: Let the encoder's linear layers compute in 8 bits (ONNX only). The range of their inputs is measured over
            each batch, so that the logits of an image depend a little on the other images. The regions, and the time
            steps of a Vision Mamba, stay in float32.
        report: Called with a line before each step, which can take minutes for a large model.

    Raises:
        ValueError: An argument is out of range; the source is no DART classifier, or its scorer has no weights; the
            program does not agree with the model; or 8 bits change the logits too much.
        OSError: The model cannot be found or read, or `output` is in use.
        ImportError: Packages that the format needs are not installed.
    """
    output = Path(output)
    _check_arguments(output, format, num_patches, int8)
    written_as = FORMATS[format]
    model, processor = load_model(source)
    model.require_scorer_weights()
    model = model.cpu().float()
    model.config.dtype = torch.float32
    if num_patches is not None:
        model.config.num_patches = num_patches
    input_shape = (model.config.num_channels, *_image_size(processor, model.config.image_size))
    check = ProgramCheck(lambda pixel_values: _logits(model, pixel_values), input_shape)

    report("Tracing the model …")
    with scans_as_nodes() if format == "onnx" else nullcontext():
        program = trace(model, input_shape)
    with atomic_folder(output) as folder:
        path = folder / written_as.FILE_NAME
        report(f"Writing {path.name} …")
        written_as.write_program(program, path)
        report(f"Comparing {path.name} with the model …")
        deviation = check.deviation(written_as.read_program(path))
        int8_deviation = None
        if int8:
            report("Quantizing the encoder's linear layers to 8 bits …")
            written_as.quantize_encoder(path)
            int8_deviation = check.int8_deviation(written_as.read_program(path))
        # The folder has no model code, so the configuration must not refer to it.
        model.config.auto_map = None
        model.config.save_pretrained(folder)
        processor.save_pretrained(folder)
    return Export(output / path.name, input_shape, deviation, int8_deviation)


def trace(model: PreTrainedModel, input_shape: tuple[int, int, int]) -> torch.export.ExportedProgram:
    """The model as a program for images (C, H, W) in batches of any size."""
    example = torch.zeros(EXAMPLE_BATCH, *input_shape)
    shapes = {"pixel_values": {0: torch.export.Dim("batch", min=1)}}
    return torch.export.export(_LogitsOfModel(model).eval(), (example,), dynamic_shapes=shapes, strict=False)


class _LogitsOfModel(nn.Module):
    """A model as a function of one tensor that returns one tensor."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).logits


@torch.inference_mode()
def _logits(model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    return model(pixel_values).logits.clone()


def _check_arguments(output: Path, format: str, num_patches: int | None, int8: bool) -> None:
    """Find mistakes before a model is loaded."""
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(map(repr, FORMATS))}, got {format!r}.")
    if int8 and format != "onnx":
        raise ValueError(f"int8 needs format='onnx', got {format!r}.")
    if num_patches is not None and num_patches < 1:
        raise ValueError(f"num_patches must be at least 1, got {num_patches}.")
    check_output_folder(output)
    require_packages(f"format={format!r}", "export", *FORMATS[format].PACKAGES)


def _image_size(processor: BaseImageProcessor, image_size: int) -> tuple[int, int]:
    """Height and width that the processor gives to images of any shape, or `image_size` twice if there is no such."""
    images = [Image.new("RGB", (image_size + extra, image_size + 40 - extra)) for extra in (0, 40)]
    sizes = {tuple(processor(image, return_tensors="pt").pixel_values.shape[-2:]) for image in images}
    return sizes.pop() if len(sizes) == 1 else (image_size, image_size)
