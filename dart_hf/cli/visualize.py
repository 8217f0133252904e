"""`dart-hf visualize`."""

from pathlib import Path
from typing import Annotated

import typer

from dart_hf.cli.options import Model, NumPatches
from dart_hf.cli.quiet import quiet_loading

EXAMPLE = "dart-hf visualize cat.jpg --model darvit-tiny --output regions.png --scores"


def visualize(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="An image file.")],
    model: Model,
    output: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="Image file to write: .png, .pdf, .svg or another format of matplotlib. Overwritten."
        ),
    ],
    num_patches: NumPatches = None,
    scores: Annotated[bool, typer.Option("--scores", help="Draw the density beside the image.")] = False,
) -> None:
    """Draw the regions of a model's tokens over an image."""
    # Find a wrong name before the model is loaded.
    if not image.is_file():
        raise FileNotFoundError(f"There is no image file {str(image)!r}.")
    quiet_loading()
    from dart_hf.hub.loading import load_model
    from dart_hf.visualization import checked_picture_path, draw_model_regions, save_figure

    checked_picture_path(output)
    loaded, processor = load_model(model, needs_classifier=False)
    save_figure(draw_model_regions(loaded, processor, image, num_patches=num_patches, with_scores=scores), output)
    typer.echo(f"Wrote {output}")
