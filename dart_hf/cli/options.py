"""Options that several commands have. An option has the same name and meaning in all of them."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

MODEL_HELP = "The model's folder, or its id on the Hugging Face Hub."
Model = Annotated[str, typer.Option("--model", metavar="FOLDER_OR_ID", help=MODEL_HELP)]
# For commands that took the model as an argument in version 0.1. `resolve_model` requires the option there.
ModelOrArgument = Annotated[str | None, typer.Option("--model", metavar="FOLDER_OR_ID", help=f"{MODEL_HELP} Required.")]
TAKES_OLD_ARGUMENTS = {"allow_extra_args": True}
NumPatches = Annotated[
    int | None,
    typer.Option("--num-patches", metavar="N", min=1, help="Token budget. Default: the model's own."),
]
NewFolder = Annotated[
    Path, typer.Option("--output", metavar="FOLDER", help="Where the model goes: a new or an empty folder.")
]

Data = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="FOLDER_OR_ID",
        help="Images in one folder for each class, parquet or other files, or a data set's id on the Hugging Face Hub.",
    ),
]
Subset = Annotated[
    str | None, typer.Option("--subset", metavar="NAME", help="The subset, if the data set has several.")
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", metavar="N", min=1, help="Use at most N images, spread evenly over the data set."),
]
BatchSize = Annotated[int, typer.Option("--batch-size", metavar="B", min=1, help="Images in one batch.")]
SkipUnreadable = Annotated[
    bool, typer.Option("--skip-unreadable", help="Leave out images that cannot be read, and count them.")
]
Workers = Annotated[
    int,
    typer.Option(
        "--workers",
        metavar="N",
        min=0,
        help="Processes that read images. On a CPU they compete with the model, which gets slower.",
    ),
]


def resolve_model(context: typer.Context, model: str | None, arguments: list[str], command: str) -> str:
    """Return the value of `--model`, or the argument that stood for it in version 0.1, with a warning.

    Args:
        context: The command's context, for errors.
        model: Value of `--model`.
        arguments: Arguments that are too many in the new spelling.
        command: The command in its new spelling, but for `--model`.
    """
    if model is None and len(arguments) == 1:
        new_spelling = f"{command} --model {shlex.quote(arguments[0])}"
        typer.echo(f"dart-hf: the model as an argument is deprecated; write: {new_spelling}", err=True)
        return arguments[0]
    if arguments:
        context.fail(f"Got unexpected extra arguments: {' '.join(arguments)}")
    if model is None:
        context.fail("Missing option '--model'.")
    return model
