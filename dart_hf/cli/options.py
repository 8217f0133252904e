"""Options that several commands have. An option has the same name and meaning in all of them."""

from pathlib import Path
from typing import Annotated

import typer

MODEL_HELP = "The model's folder, or its id on the Hugging Face Hub."
Model = Annotated[str, typer.Option("--model", metavar="FOLDER_OR_ID", help=MODEL_HELP)]
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
