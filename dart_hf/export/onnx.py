"""Export a model as a program that runs without this package: ONNX, or PyTorch's own export format.

An export is a folder: the program, and beside it the model's `config.json`, which has the labels, and the image
processor's `preprocessor_config.json`. Nothing is written that was not loaded again and compared with the model.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.nn.functional import interpolate
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from dart_hf.export.onnx_scan import replace_scans, scans_as_nodes
from dart_hf.files import atomic_folder, check_output_folder
from dart_hf.hub.loading import load_model

# Format -> the program's file, and the packages that writing and checking it needs.
FORMATS = {"onnx": ("model.onnx", ("onnx", "onnxscript", "onnxruntime")), "torch": ("model.pt2", ())}
# Largest difference from PyTorch's logits, as a share of the largest logit. In float32 the edges of regions are known
# to a thousandth of a pixel, and on images of noise that is felt: up to 0.3% with random weights. A wrong program is
# off by its whole value.
TOLERANCE = 0.01
# Root mean square of the difference that 8-bit weights and activations may make, as a share of the logits' own.
INT8_TOLERANCE = 0.1
# Modules whose linear layers never compute in 8 bits.
IN_FLOAT32 = (".tokenizer", ".forward_scan", ".backward_scan")
# Neither 0 nor 1, which the tracer takes for a constant.
EXAMPLE_BATCH = 2


@dataclass(frozen=True)
class Export:
    """A program that was written.

    Args:
        path: Its file.
        input_shape: (C, H, W) of the images that it takes; their number is free.
        deviation: Largest difference between its logits and the model's, as a share of the largest logit. With int8,
            of the float32 program that was quantised.
        int8_deviation: With int8, the root mean square of what that changes in the logits, as a share of their own.
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
    progress: bool = False,
) -> Export:
    """Export an image classification model: `pixel_values` (B, C, H, W) in float32 -> `logits` (B, num_labels).

    The batch size is free. H and W are what the model's image processor makes of any picture; if that differs from
    picture to picture, both are `config.image_size`. They and the token budget are fixed, because they decide how many
    bands an image is cut into. A model in half precision is exported in float32.

    Args:
        source: The model, as for [`load_model`].
        output: Folder to write; it must not exist or be empty. It appears complete or not at all.
        format: `"onnx"` writes `model.onnx`, `"torch"` writes `model.pt2` for `torch.export.load`.
        num_patches: Token budget; the model's own without it.
        int8: Whether the encoder's linear layers compute in 8 bits (ONNX only). The ranges of their inputs are measured
            over each batch, so that an image's logits depend a little on the other images. What decides on the regions,
            and on Vision Mamba's time steps, stays in float32.
        progress: Whether to show a progress bar on a terminal.

    Raises:
        ValueError: An argument is out of range; the source is no DART classifier, or its scorer is dead; the program
            does not agree with the model; or 8 bits change the logits too much.
        OSError: The model cannot be found or read, or `output` is in use.
        ImportError: Packages that the format needs are not installed.
    """
    output = Path(output)
    _check_arguments(output, format, num_patches, int8)
    model, processor = load_model(source)
    model.require_scorer_weights()
    model = model.cpu().float()
    model.config.dtype = torch.float32
    if num_patches is not None:
        model.config.num_patches = num_patches
    input_shape = (model.config.num_channels, *_image_size(processor, model.config.image_size))
    batches = _test_batches(input_shape)
    expected = [_logits_of(model, batch) for batch in batches]

    with tqdm(total=3, unit="step", leave=False, disable=None if progress else True) as bar:
        bar.set_description("Tracing")
        with scans_as_nodes() if format == "onnx" else nullcontext():
            program = _trace(model, input_shape)
        bar.update()
        with atomic_folder(output) as folder:
            path = folder / FORMATS[format][0]
            bar.set_description("Writing")
            (_write_onnx if format == "onnx" else _write_torch)(program, path)
            bar.update()
            bar.set_description("Checking")
            deviation = _largest_deviation(_read(path), batches, expected)
            # Written so that NaN is refused.
            if not deviation <= TOLERANCE:
                raise ValueError(
                    f"The exported program does not agree with PyTorch: their logits differ by {deviation:.2%} of the "
                    f"largest, and at most {TOLERANCE:.0%} is accepted; nothing was written."
                )
            int8_deviation = _quantise(path, batches, expected) if int8 else None
            # The folder has the image processor's code, but not the model's.
            model.config.auto_map = None
            model.config.save_pretrained(folder)
            processor.save_pretrained(folder)
            bar.update()
    return Export(output / path.name, input_shape, deviation, int8_deviation)


def _check_arguments(output: Path, format: str, num_patches: int | None, int8: bool) -> None:
    """Find what is wrong before a model is loaded."""
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(map(repr, FORMATS))}, got {format!r}.")
    if int8 and format != "onnx":
        raise ValueError(f"int8 needs format='onnx', got {format!r}.")
    if num_patches is not None and num_patches < 1:
        raise ValueError(f"num_patches must be at least 1, got {num_patches}.")
    check_output_folder(output)
    absent = [package for package in FORMATS[format][1] if find_spec(package) is None]
    if absent:
        raise ImportError(
            f"format={format!r} needs {', '.join(absent)}, not installed here: pip install 'dart-hf[export]'."
        )


def _image_size(processor: BaseImageProcessor, image_size: int) -> tuple[int, int]:
    """Height and width that the processor gives to pictures of any shape; else `image_size` for both."""
    pictures = [Image.new("RGB", (image_size + extra, image_size + 40 - extra)) for extra in (0, 40)]
    sizes = {tuple(processor(picture, return_tensors="pt").pixel_values.shape[-2:]) for picture in pictures}
    return sizes.pop() if len(sizes) == 1 else (image_size, image_size)


# --- checking ---------------------------------------------------------------------------------------------------------


def _test_batches(input_shape: tuple[int, int, int]) -> list[torch.Tensor]:
    """Smooth images and noise, of mean 0 and variance 1, in batches of one, of the example's size and of others."""
    generator = torch.Generator().manual_seed(0)
    smooth = _smooth_images(5, input_shape, generator)
    noise = torch.randn(EXAMPLE_BATCH + 1, *input_shape, generator=generator)
    return [smooth[:1], smooth[:EXAMPLE_BATCH], smooth, noise[:1], noise]


def _smooth_images(count: int, input_shape: tuple[int, int, int], generator: torch.Generator) -> torch.Tensor:
    """Random images (count, C, H, W) that vary as photographs do: as much at every scale, and alike in all channels."""
    num_channels, *size = input_shape
    images = torch.zeros(count, num_channels, *size)
    for cells in (2, 4, 8, 16, 32, 64):
        grey = torch.randn(count, 1, cells, cells, generator=generator)
        colour = torch.randn(count, num_channels, cells, cells, generator=generator)
        images += interpolate(grey + 0.3 * colour, size, mode="bicubic", antialias=True)
    mean, deviation = images.mean(dim=(1, 2, 3), keepdim=True), images.std(dim=(1, 2, 3), keepdim=True)
    return (images - mean) / deviation


def _largest_deviation(
    run: Callable[[torch.Tensor], torch.Tensor], batches: list[torch.Tensor], expected: list[torch.Tensor]
) -> float:
    found, expected = torch.cat([run(batch) for batch in batches]), torch.cat(expected)
    return float((found - expected).abs().max() / expected.abs().max())


@torch.inference_mode()
def _logits_of(model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    return model(pixel_values).logits.clone()


def _read(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """The program in a file: pixel_values -> logits."""
    if path.suffix == ".pt2":
        return torch.no_grad()(torch.export.load(path).module())

    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda pixel_values: torch.from_numpy(session.run(["logits"], {"pixel_values": pixel_values.numpy()})[0])


# --- writing ----------------------------------------------------------------------------------------------------------


class _Logits(nn.Module):
    """A model as a function of one tensor to one tensor."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).logits


def _trace(model: PreTrainedModel, input_shape: tuple[int, int, int]) -> torch.export.ExportedProgram:
    example = torch.zeros(EXAMPLE_BATCH, *input_shape)
    shapes = {"pixel_values": {0: torch.export.Dim("batch", min=1)}}
    return torch.export.export(_Logits(model).eval(), (example,), dynamic_shapes=shapes, strict=False)


def _write_torch(program: torch.export.ExportedProgram, path: Path) -> None:
    torch.export.save(program, path)


def _write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    import onnx

    names: dict[str, Any] = {"input_names": ["pixel_values"], "output_names": ["logits"]}
    # The size is in the program already; this only names it.
    names["dynamic_shapes"] = {"pixel_values": {0: "batch"}}
    written = torch.onnx.export(program, dynamo=True, verbose=False, **names).model_proto
    replace_scans(written)
    onnx.save(written, path)


def _quantise(path: Path, batches: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Let the encoder's linear layers compute in 8 bits, in place; returns what that changes in the logits.

    One scale for every output of a layer: a single one per layer is slower and twice as far off.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    program = onnx.load(path)
    # It asks for what torch's exporter has done: constants folded, shapes inferred.
    add_pre_process_metadata(program)
    constants = {constant.name for constant in program.graph.initializer}
    layers = [
        node.name
        for node in program.graph.node
        if node.op_type == "MatMul" and node.input[1] in constants and _is_in_encoder(node)
    ]
    if not layers:
        # For onnxruntime an empty list means every layer.
        raise ValueError("int8 finds no linear layer of the encoder in the program; export in float32.")
    quantize_dynamic(program, path, per_channel=True, weight_type=QuantType.QInt8, nodes_to_quantize=layers)
    run = _read(path)
    found, exact = torch.cat([run(batch) for batch in batches]), torch.cat(expected)
    deviation = float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    if not deviation <= INT8_TOLERANCE:
        raise ValueError(
            f"int8 changes the logits by {deviation:.0%}, and at most {INT8_TOLERANCE:.0%} is accepted; nothing was "
            "written. Export in float32."
        )
    return deviation


def _is_in_encoder(node: Any) -> bool:
    """Whether an ONNX node comes from one of the encoder's layers. torch notes the modules that a node comes from.

    Vision Mamba's scans do not count: small time steps decide how far back a state remembers.
    """
    modules = {entry.key: entry.value for entry in node.metadata_props}.get("pkg.torch.onnx.name_scopes", "")
    return ".layers." in modules and not any(part in modules for part in IN_FLOAT32)
