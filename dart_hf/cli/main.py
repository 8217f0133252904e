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


INTERRUPTED = 130


class _Commands(TyperGroup):
    """Commands whose users see their mistakes in one line."""

    def main(self, *args: Any, standalone_mode: bool = True, **settings: Any) -> Any:
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **settings)
        try:
            exit_code = super().main(*args, standalone_mode=False, **settings)
        except UsageError as error:
            command = error.ctx.command_path if error.ctx else "dart-hf"
            _stop(f"{error.format_message().rstrip('.')}; see '{command} --help'.", 2)
        except (ValueError, OSError, ImportError) as error:
            _stop(str(error) or type(error).__name__, 2)
        except typer.Abort:
            exit_code = INTERRUPTED
        if exit_code == INTERRUPTED:
            _stop("stopped", INTERRUPTED)
        sys.exit(exit_code)


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

Data = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="FOLDER_OR_ID",
        help="Images in one folder for each class, parquet or other files, or a data set's id on the Hugging Face Hub.",
    ),
]
Subset = Annotated[str | None, typer.Option(metavar="NAME", help="The data set's subset, where it has several.")]
Limit = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Use N images at most, evenly spread over the data set.")
]
BatchSize = Annotated[int, typer.Option(metavar="B", min=1, help="Images at once.")]
SkipUnreadable = Annotated[
    bool, typer.Option("--skip-unreadable", help="Leave out images that cannot be read, and say how many.")
]
Workers = Annotated[
    int,
    typer.Option(
        min=0, help="Processes that read images. On a CPU they take time from the model, and its speed falls."
    ),
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


@app.command(
    epilog="Example: dart-hf convert yinkx3/DART --variant darvit-tiny --output darvit-tiny; or from a pretrained ViT: "
    "dart-hf convert --from vit timm/deit_tiny_patch16_224.fb_in1k --output dart-deit-tiny"
)
def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="--from dart: a file of the authors, or their Hub repository, yinkx3/DART. --from vit: the folder or "
            "Hub id of a ViT or DeiT of transformers or timm, with a classifier or without.",
        ),
    ],
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the model goes; a new or empty folder.")],
    kind: Annotated[
        str, typer.Option("--from", metavar="dart|vit", help="A DART of the authors, or a pretrained ViT.")
    ] = "dart",
    variant: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="dart: which published model it is, e.g. darvim-tiny, if the file does not say; which file to fetch.",
        ),
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="dart: take the averaged weights.")] = False,
    partition: Annotated[
        str | None,
        typer.Option(
            metavar="uniform|flow|grid",
            help="vit: uniform, the default, computes what the ViT does; flow is to be trained.",
        ),
    ] = None,
    scorer: Annotated[
        str | None, typer.Option(metavar="NAME", help="vit: the scorer's trunk; that of the preset without it.")
    ] = None,
    scorer_weights: Annotated[
        str | None,
        typer.Option(metavar="FILE|imagenet", help="vit: the trunk's weights, a local file or a download."),
    ] = None,
    score_grid_size: Annotated[
        int | None,
        typer.Option(metavar="G", min=1, help="vit: side of the score grid and the position table; 14 without it."),
    ] = None,
) -> None:
    """Convert a checkpoint of the DART authors (ViT, Vision Mamba or RMT), or a pretrained ViT.

    The result is a folder that from_pretrained reads.
    """
    of_kind = {
        "dart": {"variant": variant, "ema": ema or None},
        "vit": {
            "partition": partition,
            "scorer": scorer,
            "scorer_weights": scorer_weights,
            "score_grid_size": score_grid_size,
        },
    }
    if kind not in of_kind:
        raise ValueError(f"--from must be 'dart' or 'vit', got {kind!r}.")
    for other, options in of_kind.items():
        given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
        if other != kind and given:
            raise ValueError(f"{given[0]} goes with --from {other}, got --from {kind}.")
    options = {name: value for name, value in of_kind[kind].items() if value is not None}

    _quiet_loading()
    if kind == "dart":
        from dart_hf.conversion.original import convert_checkpoint

        folder = convert_checkpoint(source, output, **options)
    else:
        from dart_hf.conversion.vit import convert_vit

        folder = convert_vit(source, output, say=typer.echo, **options)
    typer.echo(f"Wrote {folder}")


@app.command(
    epilog="Example: dart-hf train --data photos --output flowers --model dart-tiny --new-head",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def train(context: typer.Context) -> None:
    """Fine-tune a model on images, or train one from scratch."""
    _quiet_loading()
    _bars_on_terminals_only()
    from dart_hf.training.command import parse_settings, run_training, training_help

    if "--help" in context.args or not context.args:
        typer.echo(training_help())
    else:
        run_training(parse_settings(context.args), say=typer.echo)


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
    from dart_hf.evaluation.prediction import predict as predict_images
    from dart_hf.hub.loading import load_model

    predictions = predict_images(*load_model(model), images, num_patches=num_patches, top_k=top_k, progress=True)
    if as_json:
        typer.echo(json.dumps([asdict(prediction) for prediction in predictions], indent=2, ensure_ascii=False))
    else:
        for prediction in predictions:
            typer.echo(prediction.image)
            for answer in prediction.answers:
                typer.echo(f"{answer.probability:8.1%}  {answer.label}")


@app.command(epilog="Example: dart-hf evaluate --model darvit-tiny --data photos --num-patches 121,196 --plot plot.png")
def evaluate(
    model: Model,
    data: Data,
    split: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Which images; without it the data's validation images, else its test ones."),
    ] = None,
    held_out: Annotated[
        float,
        typer.Option(
            metavar="SHARE", min=0, max=0.99, help="Evaluate with the training images that train held out: 0.1 of them."
        ),
    ] = 0.0,
    subset: Subset = None,
    num_patches: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,…", help="Token budgets, with commas between; the model's own one without this option."
        ),
    ] = None,
    batch_size: BatchSize = 32,
    limit: Limit = None,
    score_normalization: Annotated[
        str | None,
        typer.Option(
            metavar="running|image|batch",
            help="How scores are standardised; the model's own way without this option, but for 'batch' (a converted "
            "model's) it is 'image', so that no answer depends on the other images of a batch.",
        ),
    ] = None,
    skip_unreadable: SkipUnreadable = False,
    workers: Workers = 0,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write the results as JSON; overwritten.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where to draw accuracy against tokens: .png, .pdf, .svg, …; overwritten."),
    ] = None,
) -> None:
    """Measure a classifier's accuracy and speed on a data set, at several token budgets in one pass.

    Images per second are those of the model alone: reading and preparing images is not counted.
    """
    _quiet_loading()
    _bars_on_terminals_only()
    from dart_hf.evaluation.classification import parse_budgets, run_evaluation

    run_evaluation(
        model,
        data,
        budgets=parse_budgets(num_patches) if num_patches is not None else (),
        subset=subset,
        split=split,
        held_out=held_out,
        limit=limit,
        batch_size=batch_size,
        score_normalization=score_normalization,
        skip_unreadable=skip_unreadable,
        workers=workers,
        output=output,
        plot=plot,
        say=typer.echo,
        progress=True,
    )


@app.command(
    epilog="Example: dart-hf calibrate --model darvit-tiny --data photos --limit 2000 --output darvit-tiny-running"
)
def calibrate(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the model goes; a new or empty folder.")],
    split: Annotated[str, typer.Option(metavar="NAME", help="Which images; they need no labels.")] = "train",
    subset: Subset = None,
    limit: Limit = None,
    batch_size: BatchSize = 32,
    skip_unreadable: SkipUnreadable = False,
    workers: Workers = 0,
) -> None:
    """Take a model's running score statistics from images, without training.

    Afterwards no prediction of a converted model depends on the other images of its batch.
    """
    _quiet_loading()
    _bars_on_terminals_only()
    from dart_hf.evaluation.calibration import calibrate_model

    done = calibrate_model(
        model,
        data,
        output,
        subset=subset,
        split=split,
        limit=limit,
        batch_size=batch_size,
        skip_unreadable=skip_unreadable,
        workers=workers,
        progress=True,
    )
    typer.echo(
        f"Wrote {output}: scores of {done.num_images:,} images have mean {done.mean:.4g}, variance {done.variance:.4g}."
    )
    for count, what in ((done.num_unreadable, "could not be read"), (done.num_unusable, "have no usable scores")):
        if count:
            typer.echo(f"{count:,} more images {what} and are left out.")


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
    from dart_hf.evaluation.prediction import visualize as visualize_image

    visualize_image(image, model, output, num_patches=num_patches, with_scores=scores)
    typer.echo(f"Wrote {output}")


@app.command(epilog="Example: dart-hf publish flowers user/dart-flowers --license apache-2.0 --private")
def publish(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="The model's folder, as train or convert wrote it. It is only read."),
    ],
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO_ID", help="Where it goes, such as user/model; made if missing.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private, if it is new.")] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Branch, made if missing; 'main' without this option.")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request to the branch instead.")] = False,
    message: Annotated[str | None, typer.Option(help="Title of the commit.")] = None,
    license: Annotated[
        str | None, typer.Option(metavar="NAME", help="Licence of the weights, such as apache-2.0 or cc-by-nc-4.0.")
    ] = None,
    example: Annotated[
        Path | None,
        typer.Option(metavar="IMAGE", help="For the page's widget; without this option FOLDER/example.png, if any."),
    ] = None,
) -> None:
    """Publish a model on the Hugging Face Hub, in one commit, and load it back to compare.

    Log in with 'hf auth login' before, or set HF_TOKEN. If it fails, run it again.
    """
    _quiet_loading()
    from dart_hf.hub.publishing import publish as publish_model

    try:
        done = publish_model(
            folder,
            repo_id,
            private=private or None,
            revision=revision,
            create_pr=create_pr,
            commit_message=message,
            license=license,
            example=example,
        )
    except KeyboardInterrupt as stop:
        # What there is on the Hub by now.
        typer.echo("\n".join(getattr(stop, "__notes__", [])), err=True)
        raise
    if not done.is_new:
        typer.echo(f"The Hub has this model already: {done.url}, commit {done.commit}")
    else:
        typer.echo(f"Published {done.pull_request or done.url}, commit {done.commit}")
    typer.echo("Loaded back from there, it gives the logits of the local model.")
    if done.keeps_card_text:
        typer.echo("The model card keeps the text that somebody wrote; without its README.md there is a new one.")
    if done.omits_evaluation:
        typer.echo(
            f"Left out: {folder / 'evaluation.json'} is not of these weights; 'dart-hf evaluate' writes it anew."
        )
    if done.license is None:
        typer.echo("The model card states no licence; --license names one.")


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
    from dart_hf.export.onnx import export_model

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
            help="Names or patterns, separated by commas: DART-Ti@… and DART-S@… with 121, 196, 288 or 392 tokens, "
            "DART-Vim-Ti@… and DART-Vim-S@… with 196 or 392, DART-RMT-S@196 and DART-RMT-L6@196; "
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
    """Measure speed and memory beside timm's DeiT and transformers' ViT, taking turns."""
    from dart_hf.benchmark.timing import Settings, run_benchmark

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


def _bars_on_terminals_only() -> None:
    """Without `datasets`' bars where nobody watches them: they would fill a file with what they draw."""
    if not sys.stderr.isatty():
        from datasets import disable_progress_bars

        disable_progress_bars()
