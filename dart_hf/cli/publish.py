"""`dart-hf publish`."""

from pathlib import Path
from typing import Annotated

import typer

from dart_hf.cli.options import TAKES_OLD_ARGUMENTS, ModelOrArgument, resolve_model
from dart_hf.cli.quiet import quiet_loading

EXAMPLE = "dart-hf publish user/dart-flowers --model flowers --license apache-2.0 --private"
CONTEXT_SETTINGS = TAKES_OLD_ARGUMENTS


def publish(
    context: typer.Context,
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO_ID", help="Repository on the Hub, e.g. user/model. Created if missing.")
    ],
    model: ModelOrArgument = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Branch, created if missing. Default: 'main'.")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request to the branch instead.")] = False,
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="Title of the commit.")] = None,
    license: Annotated[
        str | None, typer.Option(metavar="NAME", help="Licence of the weights, e.g. apache-2.0 or cc-by-nc-4.0.")
    ] = None,
    example: Annotated[
        Path | None,
        typer.Option(
            metavar="IMAGE",
            help="Image for the widget of the model's page. Default: example.png in the model's folder.",
        ),
    ] = None,
) -> None:
    """Publish a model on the Hugging Face Hub in one commit, then load it back and compare.

    Log in with 'hf auth login' first, or set HF_TOKEN. If it fails, run it again.
    """
    old_arguments: list[str] = []
    if context.args:
        # Version 0.1: dart-hf publish FOLDER REPO_ID
        *old_arguments, repo_id = repo_id, *context.args
    model = resolve_model(context, model, old_arguments, f"dart-hf publish {repo_id}")
    quiet_loading()
    from dart_hf.hub.loading import local_folder
    from dart_hf.hub.publishing import publish as publish_model

    folder = local_folder(model)
    done = publish_model(
        folder,
        repo_id,
        private=private or None,
        revision=revision,
        create_pr=create_pr,
        commit_message=message,
        license=license,
        example=example,
    )
    if not done.is_new:
        typer.echo(f"The Hub has this model already: {done.url}, commit {done.commit}")
    else:
        typer.echo(f"Published {done.pull_request or done.url}, commit {done.commit}")
    typer.echo("Loaded back from there, it gives the logits of the local model.")
    if done.keeps_card_text:
        typer.echo("The model card keeps its text, because somebody wrote it. Delete its README.md to get a new one.")
    if done.omits_evaluation:
        typer.echo(
            f"Left out {folder / 'evaluation.json'}: it belongs to other weights. 'dart-hf evaluate' writes a new one."
        )
    if done.license is None:
        typer.echo("The model card states no licence. Name one with --license.")
