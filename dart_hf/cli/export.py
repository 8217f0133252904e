"""`dart-hf export`."""

import functools
from pathlib import Path
from typing import Annotated

import typer

from dart_hf.cli.options import TAKES_OLD_ARGUMENTS, ModelOrArgument, NumPatches, resolve_model
from dart_hf.cli.quiet import quiet_loading

EXAMPLE = "dart-hf export --model darvit-tiny --output darvit-tiny-onnx --format onnx"
CONTEXT_SETTINGS = TAKES_OLD_ARGUMENTS


def export(
    context: typer.Context,
    model: ModelOrArgument = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where the program and its settings go: a new or an empty folder. Default: the name of the model and "
            "of the format, in the current folder.",
        ),
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            metavar="onnx|torch", help="model.onnx (needs the extra 'export'), or model.pt2 for torch.export.load."
        ),
    ] = "onnx",
    num_patches: NumPatches = None,
    int8: Annotated[
        bool,
        typer.Option("--int8", help="ONNX: linear layers in 8 bits. Smaller and faster on a CPU, but less exact."),
    ] = False,
) -> None:
    """Write a model as a program for ONNX or PyTorch runtimes, and check that it computes the same.

    The batch size is free. Image size and token budget are fixed.
    """
    model = resolve_model(context, model, context.args, "dart-hf export")
    quiet_loading()
    from dart_hf.export import export_model
    from dart_hf.files import absolute_source

    output = output or Path(f"{Path(absolute_source(model)).name}-{format}")
    # To stderr, so that stdout holds the result alone.
    report = functools.partial(typer.echo, err=True)
    done = export_model(model, output, format=format, num_patches=num_patches, int8=int8, report=report)
    channels, height, width = done.input_shape
    typer.echo(f"Wrote {done.path}, for pixel_values of shape (batch, {channels}, {height}, {width})")
    before = "In float32 its" if int8 else "Its"
    typer.echo(f"{before} logits differ from PyTorch's by at most {done.deviation:.3%} of the largest.")
    if done.int8_deviation is not None:
        typer.echo(f"int8 changes them by {done.int8_deviation:.1%} (root mean square).")
