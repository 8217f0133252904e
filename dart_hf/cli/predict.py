"""`dart-hf predict`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dart_hf.cli.options import Model, NumPatches, SkipUnreadable
from dart_hf.cli.quiet import quiet_loading

EXAMPLE = "dart-hf predict cat.jpg photos --model darvit-tiny --top-k 3"


def predict(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Image files, and folders of images.")],
    model: Model,
    num_patches: NumPatches = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            min=1,
            help="How many labels for each image. Default: 5; for a multi-label model all above 50%.",
        ),
    ] = None,
    skip_unreadable: SkipUnreadable = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Print the most likely labels of images with their probabilities, or the numbers of a regression.

    Files that cannot be read are named on stderr. The exit code is then 2, unless --skip-unreadable is given.
    """
    quiet_loading()
    from dart_hf.evaluation.prediction import image_files
    from dart_hf.evaluation.prediction import predict as predict_images
    from dart_hf.hub.loading import load_model

    # Find a wrong name before the model is loaded.
    files = image_files(images)
    predictions = predict_images(*load_model(model), files, num_patches=num_patches, top_k=top_k, progress=True)
    readable = [prediction for prediction in predictions if prediction.error is None]
    if as_json:
        answers = [
            {"image": prediction.image, "answers": list(map(asdict, prediction.answers))} for prediction in readable
        ]
        typer.echo(json.dumps(answers, indent=2, ensure_ascii=False))
    else:
        for prediction in readable:
            typer.echo("\n".join(prediction.lines()))
    for prediction in predictions:
        if prediction.error is not None:
            typer.echo(f"dart-hf: {prediction.error}", err=True)
    if len(readable) < len(predictions) and not skip_unreadable:
        raise typer.Exit(2)
