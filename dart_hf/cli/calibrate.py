"""`dart-hf calibrate`."""

from typing import Annotated

import typer

from dart_hf.cli.options import BatchSize, Data, Limit, Model, NewFolder, SkipUnreadable, Subset, Workers
from dart_hf.cli.quiet import bars_on_terminals_only, quiet_loading

EXAMPLE = "dart-hf calibrate --model darvit-tiny --data photos --limit 2000 --output darvit-tiny-running"


def calibrate(
    model: Model,
    data: Data,
    output: NewFolder,
    split: Annotated[str, typer.Option(metavar="NAME", help="Split to read. Its images need no labels.")] = "train",
    subset: Subset = None,
    limit: Limit = None,
    batch_size: BatchSize = 32,
    skip_unreadable: SkipUnreadable = False,
    workers: Workers = 0,
) -> None:
    """Compute a model's running score statistics from images, without training.

    Afterwards no prediction of a converted model depends on the other images of its batch.
    """
    quiet_loading()
    bars_on_terminals_only()
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
    for count, reason in ((done.num_unreadable, "could not be read"), (done.num_unusable, "have no usable scores")):
        if count:
            typer.echo(f"{count:,} more images {reason} and are left out.")
