"""`dart-hf dartify`."""

from pathlib import Path
from typing import Annotated

import typer

from dart_hf.cli.quiet import bars_on_terminals_only, quiet_loading

EXAMPLE = "dart-hf dartify --model facebook/dinov2-small --data photos --num-patches 64,128,196 --output dinov2-dart"


def dartify(
    context: typer.Context,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            metavar="FOLDER",
            help="Where the model goes: a new or an empty folder; with --resume the run's.",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER_OR_ID",
            help="The pretrained encoder: a ViT, DeiT, I-JEPA, DINOv2, DINOv3, CLIP or SigLIP of transformers, or a "
            "ViT of timm. Required.",
        ),
    ] = None,
    num_patches: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,…",
            help="Token budgets, separated by commas. The first becomes the model's own; each batch learns with one of "
            "them. Required.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER_OR_ID",
            help="Images to learn from, without labels: any folder of images, nested or not, parquet files, or "
            "a data set's id on the Hugging Face Hub. Without it the model is only switched.",
        ),
    ] = None,
    partition: Annotated[
        str, typer.Option(metavar="flow|grid|uniform", help="How the image is cut into regions.")
    ] = "flow",
    scorer: Annotated[str, typer.Option(metavar="NAME", help="What tells where the small regions go.")] = "detail",
    steps: Annotated[int, typer.Option(metavar="N", min=0, help="Batches to learn from; 0 only switches.")] = 1000,
    batch_size: Annotated[int, typer.Option(metavar="B", min=1, help="Images in one batch.")] = 16,
    learning_rate: Annotated[float, typer.Option(metavar="RATE", min=0, help="The highest learning rate.")] = 1e-4,
    lora: Annotated[
        int | None,
        typer.Option(
            metavar="RANK", min=1, help="Let only low-rank updates of this rank and the scorer learn. Needs peft."
        ),
    ] = None,
    freeze_encoder: Annotated[
        bool, typer.Option("--freeze-encoder", help="Let only the scorer and the patch embedding learn.")
    ] = False,
    teacher_size: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS", min=1, help="Side of the images that the original reads. Default: the model's own."
        ),
    ] = None,
    held_out: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of the images to measure the similarity on, at most 500.")
    ] = 0.1,
    seed: Annotated[int, typer.Option(metavar="SEED", help="Seed of all that is random.")] = 0,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run in --output from its last checkpoint, with its settings."),
    ] = False,
) -> None:
    """Give a pretrained vision encoder region tokens, and let it learn from itself on images without labels.

    The original is the teacher: the new model learns to give its features, with fewer tokens.
    """
    if resume:
        given = [name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"]
        if changed := sorted({*given} - {"output", "resume"}):
            context.fail(f"--{changed[0].replace('_', '-')} cannot change when a run is resumed.")
    elif model is None or num_patches is None:
        context.fail(f"Missing option '--{'model' if model is None else 'num-patches'}'.")

    quiet_loading()
    bars_on_terminals_only()
    from dart_hf.evaluation.run import parse_budgets
    from dart_hf.retrofit.run import DartifySettings, run_dartify

    settings = None
    if not resume:
        settings = DartifySettings(
            model=model,
            num_patches=parse_budgets(num_patches),
            data=data,
            partition=partition,
            scorer=scorer,
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            lora=lora,
            freeze_encoder=freeze_encoder,
            teacher_size=teacher_size,
            held_out=held_out,
            seed=seed,
        )
    run_dartify(settings, output, resume, say=typer.echo)
