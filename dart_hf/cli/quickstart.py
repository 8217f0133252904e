"""`dart-hf quickstart`."""

from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "dart-hf quickstart --output quickstart"


def quickstart(
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the results go.")] = Path("quickstart"),
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Training steps.")] = 1400,
    num_patches: Annotated[int, typer.Option(metavar="N", min=1, help="Token budget.")] = 49,
    scorer: Annotated[
        str, typer.Option(metavar="NAME", help="What scores the image: conv, detail or encoder, which need no weights.")
    ] = "conv",
    seed: Annotated[int, typer.Option(metavar="N", help="Random seed of the images and the training.")] = 0,
) -> None:
    """Train a small DART to read digits on photographs, test it, and draw where it looks (minutes on two cores)."""
    from dart_hf.quickstart import run_quickstart

    run_quickstart(output, steps=steps, num_patches=num_patches, scorer=scorer, seed=seed, report=typer.echo)
