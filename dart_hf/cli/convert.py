"""`dart-hf convert`."""

from typing import Annotated

import typer

from dart_hf.cli.options import NewFolder
from dart_hf.cli.quiet import quiet_loading

EXAMPLE = (
    "dart-hf convert yinkx3/DART --variant darvit-tiny --output darvit-tiny; or from a pretrained ViT: "
    "dart-hf convert --from vit timm/deit_tiny_patch16_224.fb_in1k --output dart-deit-tiny"
)


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="--from dart: a checkpoint file of the authors, or their Hub repository, yinkx3/DART. "
            "--from vit: the folder or Hub id of a ViT or DeiT of transformers or timm, with or without a classifier.",
        ),
    ],
    output: NewFolder,
    kind: Annotated[
        str, typer.Option("--from", metavar="dart|vit", help="A DART checkpoint of the authors, or a pretrained ViT.")
    ] = "dart",
    variant: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="dart: the published model, e.g. darvim-tiny. It chooses the file in the authors' repository. A local "
            "file needs it only if its name does not say it.",
        ),
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="dart: convert the averaged weights.")] = False,
    partition: Annotated[
        str | None,
        typer.Option(
            metavar="uniform|flow|grid",
            help="vit: 'uniform' (default) gives the ViT's own logits; 'flow' needs training.",
        ),
    ] = None,
    scorer: Annotated[
        str | None, typer.Option(metavar="NAME", help="vit: the scorer. Default: that of the preset.")
    ] = None,
    scorer_weights: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|imagenet", help="vit: weights of the trunk: a local file, or 'imagenet' to download."
        ),
    ] = None,
    score_grid_size: Annotated[
        int | None,
        typer.Option(
            metavar="G",
            min=1,
            help="vit: side of the score grid and the position table. Default: "
            "the number of patches along a side of the image.",
        ),
    ] = None,
) -> None:
    """Convert a checkpoint of the DART authors (ViT, Vision Mamba or RMT), or a pretrained ViT.

    The result is a folder that from_pretrained reads.
    """
    options_by_kind = {
        "dart": {"variant": variant, "ema": ema or None},
        "vit": {
            "partition": partition,
            "scorer": scorer,
            "scorer_weights": scorer_weights,
            "score_grid_size": score_grid_size,
        },
    }
    if kind not in options_by_kind:
        raise ValueError(f"--from must be 'dart' or 'vit', got {kind!r}.")
    for other, options in options_by_kind.items():
        given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
        if other != kind and given:
            raise ValueError(f"{given[0]} goes with --from {other}, got --from {kind}.")
    options = {name: value for name, value in options_by_kind[kind].items() if value is not None}

    quiet_loading()
    if kind == "dart":
        from dart_hf.conversion.original import convert_checkpoint

        folder = convert_checkpoint(source, output, **options)
    else:
        from dart_hf.conversion.vit import convert_vit

        folder = convert_vit(source, output, report=typer.echo, **options)
    typer.echo(f"Wrote {folder}")
