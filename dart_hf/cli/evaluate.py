"""`dart-hf evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from dart_hf.cli.options import BatchSize, Data, Limit, Model, SkipUnreadable, Subset, Workers
from dart_hf.cli.quiet import bars_on_terminals_only, quiet_loading

EXAMPLE = "dart-hf evaluate --model darvit-tiny --data photos --num-patches 121,196 --plot plot.png"


def evaluate(
    model: Model,
    data: Data,
    split: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Split to evaluate on. Default: 'validation', else 'test'."),
    ] = None,
    held_out: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            min=0,
            max=0.99,
            help="Evaluate on the images that 'train --held-out SHARE' held out. held_out.json in the model's folder "
            "names them.",
        ),
    ] = 0.0,
    subset: Subset = None,
    num_patches: Annotated[
        str | None,
        typer.Option(metavar="N,N,…", help="Token budgets, separated by commas. Default: the model's own."),
    ] = None,
    batch_size: BatchSize = 32,
    limit: Limit = None,
    score_normalization: Annotated[
        str | None,
        typer.Option(
            metavar="running|image|batch",
            help="How scores are standardised. Default: the model's own way; but 'image' for a model with 'batch' (a "
            "converted one), so that no answer depends on the other images of a batch.",
        ),
    ] = None,
    skip_unreadable: SkipUnreadable = False,
    workers: Workers = 0,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the results to this file as JSON, and overwrite it.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw accuracy over tokens to this file (.png, .pdf, .svg, …), and overwrite it."
        ),
    ] = None,
) -> None:
    """Measure a classifier's accuracy and speed on a data set, at several token budgets in one pass.

    Images per second are those of the model alone: reading and preparing images is not counted.
    """
    quiet_loading()
    bars_on_terminals_only()
    from dart_hf.evaluation.run import parse_budgets, run_evaluation

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
        report=typer.echo,
        progress=True,
    )
