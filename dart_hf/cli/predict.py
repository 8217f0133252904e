"""`dart-hf predict`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dart_hf.cli.options import Model, NumPatches
from dart_hf.cli.quiet import quiet_loading

EXAMPLE = "dart-hf predict cat.jpg dog.jpg --model darvit-tiny --top-k 3"


def predict(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Image files.")],
    model: Model,
    num_patches: NumPatches = None,
    top_k: Annotated[int, typer.Option(metavar="K", min=1, help="How many labels for each image.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Print the most likely labels of images, with their probabilities."""
    # Find a wrong name before the model is loaded.
    for path in images:
        if not path.is_file():
            raise FileNotFoundError(f"There is no image file {str(path)!r}.")
    quiet_loading()
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
