"""The command line: `dart-hf COMMAND`. Each command reads its options and calls the library.

The library raises ValueError, OSError and ImportError for what its user can mend; here these become one line and exit
code 2. What a command needs beyond the models is imported inside it.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from dart_hf.version import __version__

# What typer raises for a wrong option or argument. It has no public name of its own.
UsageError = typer.BadParameter.__bases__[0]


class _Commands(TyperGroup):
    """Commands whose users see their mistakes in one line."""

    def main(self, *args: Any, standalone_mode: bool = True, **settings: Any) -> Any:
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **settings)
        try:
            sys.exit(super().main(*args, standalone_mode=False, **settings))
        except UsageError as error:
            command = error.ctx.command_path if error.ctx else "dart-hf"
            _stop(f"{error.format_message().rstrip('.')}; see '{command} --help'.", 2)
        except (ValueError, OSError, ImportError) as error:
            _stop(str(error) or type(error).__name__, 2)
        except typer.Abort:
            _stop("stopped", 130)


def _stop(message: str, exit_code: int) -> NoReturn:
    typer.echo(f"dart-hf: {' '.join(message.split())}", err=True)
    sys.exit(exit_code)


app = typer.Typer(cls=_Commands, add_completion=False, pretty_exceptions_enable=False)

Model = Annotated[
    str, typer.Option("--model", metavar="FOLDER_OR_ID", help="The model's folder, or its id on the Hugging Face Hub.")
]
NumPatches = Annotated[
    int | None,
    typer.Option("--num-patches", metavar="N", min=1, help="Token budget; the model's own without this option."),
]


@app.callback(invoke_without_command=True)
def dart_hf(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """DART: vision transformers whose tokens follow the content of the image."""
    if version:
        typer.echo(f"dart-hf {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command(epilog="Example: dart-hf quickstart --output quickstart")
def quickstart(
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the results go.")] = Path("quickstart"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 1400,
    num_patches: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens per picture.")] = 49,
    seed: Annotated[int, typer.Option(help="Of the pictures and the training.")] = 0,
) -> None:
    """Train a small DART to read digits on photographs, test it, and draw where it looks (minutes on two cores)."""
    from dart_hf.quickstart import run_quickstart

    run_quickstart(output, steps=steps, num_patches=num_patches, seed=seed, say=typer.echo)


@app.command(epilog="Example: dart-hf convert yinkx3/DART --variant darvit-tiny --output darvit-tiny")
def convert(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A file of the authors, or their Hub repository, yinkx3/DART.")
    ],
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the model goes; a new or empty folder.")],
    variant: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Which published model it is, if the file does not say; which file to fetch."
        ),
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Take the averaged weights.")] = False,
) -> None:
    """Convert a checkpoint of the DART authors into a folder that from_pretrained reads."""
    _quiet_loading()
    from dart_hf.conversion.original import convert_checkpoint

    folder = convert_checkpoint(checkpoint, output, variant=variant, ema=ema)
    typer.echo(f"Wrote {folder}")


@app.command(epilog="Example: dart-hf predict cat.jpg dog.jpg --model darvit-tiny --top-k 3")
def predict(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Image files.")],
    model: Model,
    num_patches: NumPatches = None,
    top_k: Annotated[int, typer.Option(metavar="K", min=1, help="How many labels for each image.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Print the likeliest labels of images, with their probabilities."""
    _check_files(images)
    _quiet_loading()
    from dart_hf.prediction import load_model
    from dart_hf.prediction import predict as predict_images

    predictions = predict_images(*load_model(model), images, num_patches=num_patches, top_k=top_k, progress=True)
    if as_json:
        typer.echo(json.dumps([asdict(prediction) for prediction in predictions], indent=2, ensure_ascii=False))
    else:
        for prediction in predictions:
            typer.echo(prediction.image)
            for answer in prediction.answers:
                typer.echo(f"{answer.probability:8.1%}  {answer.label}")


@app.command(epilog="Example: dart-hf visualize cat.jpg --model darvit-tiny --output regions.png --scores")
def visualize(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="An image file.")],
    model: Model,
    output: Annotated[
        Path,
        typer.Option(metavar="FILE", help="The picture to write: .png, .pdf, .svg or another format of matplotlib."),
    ],
    num_patches: NumPatches = None,
    scores: Annotated[bool, typer.Option("--scores", help="Draw the density beside the image.")] = False,
) -> None:
    """Draw the regions of a model's tokens over an image."""
    _check_files([image])
    _quiet_loading()
    from dart_hf.prediction import visualize as visualize_image

    visualize_image(image, model, output, num_patches=num_patches, with_scores=scores)
    typer.echo(f"Wrote {output}")


@app.command(epilog="Example: dart-hf export darvit-tiny --output darvit-tiny-onnx --format onnx")
def export(
    model: Annotated[
        str,
        typer.Argument(metavar="FOLDER_OR_ID", help="The model's folder, or its id on the Hugging Face Hub."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where the program and its settings go; a new or empty folder. Without it the model's name and the "
            "format's, here.",
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
        bool, typer.Option("--int8", help="Faster on a CPU and smaller, less exact: linear layers in 8 bits (ONNX).")
    ] = False,
) -> None:
    """Write a model as a program for ONNX or PyTorch runtimes, and check that it computes the same.

    The batch size is free; image size and token budget are fixed.
    """
    _quiet_loading()
    from dart_hf.export import export_model

    output = output or Path(f"{Path(model).name}-{format}")
    done = export_model(model, output, format=format, num_patches=num_patches, int8=int8, progress=True)
    channels, height, width = done.input_shape
    typer.echo(f"Wrote {done.path}, for pixel_values of shape (batch, {channels}, {height}, {width})")
    before = "In float32 its" if int8 else "Its"
    typer.echo(f"{before} logits differ from PyTorch's by at most {done.deviation:.3%} of the largest.")
    if done.int8_deviation is not None:
        typer.echo(f"int8 changes them by {done.int8_deviation:.1%} (root mean square).")


@app.command(epilog="Example: dart-hf benchmark --output results --models 'DART-S@392,DeiT-B@224' --batch-size 16")
def benchmark(
    output: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER", help="Where benchmark.json and the plots go; made if missing, overwritten if not."
        ),
    ] = Path("benchmark"),
    models: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Names or patterns, separated by commas: DART-Ti@… and DART-S@… with 121, 196, 288 or 392 tokens; "
            "DeiT-… (timm) and ViT-… (transformers) as Ti@, S@ and B@224, S@384, S@448 pixels.",
        ),
    ] = "*",
    device: Annotated[str, typer.Option(help="'cpu' or 'cuda'.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="'float32', 'bfloat16' or 'float16'; training uses autocast.")] = "float32",
    attention: Annotated[str, typer.Option(help="'sdpa', or 'eager' for plain matrix products.")] = "sdpa",
    batch_size: Annotated[int, typer.Option(metavar="B", min=1, help="Images at once.")] = 8,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch; its own choice without.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile every model with torch.compile.")] = False,
    compile_mode: Annotated[
        str, typer.Option(metavar="MODE", help="Of torch.compile, such as 'reduce-overhead' for CUDA graphs.")
    ] = "default",
    rounds: Annotated[int, typer.Option(min=1, help="How often each model has its turn.")] = 5,
    calls: Annotated[int, typer.Option(min=1, help="Timed calls in a turn.")] = 2,
    training: Annotated[bool, typer.Option(help="Measure training steps too.")] = True,
    memory: Annotated[bool, typer.Option(help="Measure peak memory too.")] = True,
) -> None:
    """Measure speed and memory beside timm's DeiT and transformers' ViT, taking turns (half an hour on two cores)."""
    from dart_hf.benchmark import Settings, run_benchmark

    settings = Settings(
        device=device,
        dtype=dtype,
        attention=attention,
        batch_size=batch_size,
        threads=threads,
        compile=compiled,
        compile_mode=compile_mode,
        rounds=rounds,
        calls=calls,
        training=training,
        memory=memory,
    )
    names = [name.strip() for name in models.split(",") if name.strip()]
    run_benchmark(output, settings, names, say=typer.echo)


def _check_files(paths: list[Path]) -> None:
    """Find a wrong name before a model is loaded."""
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"There is no image file {str(path)!r}.")


def _quiet_loading() -> None:
    """Without transformers' bar and report for the loading of weights; what they would warn of is an error here."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
