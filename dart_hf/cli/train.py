"""`dart-hf train`. Its options are dataclasses of the training room and transformers' TrainingArguments."""

import typer

from dart_hf.cli.quiet import bars_on_terminals_only, quiet_loading

EXAMPLE = "dart-hf train --data photos --output flowers --model dart-tiny --new-head"
# The training room parses all arguments, --help too.
CONTEXT_SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def train(context: typer.Context) -> None:
    """Fine-tune a model on images, or train one from scratch."""
    quiet_loading()
    bars_on_terminals_only()
    from dart_hf.training.run import run_training
    from dart_hf.training.settings import parse_settings, training_help

    if "--help" in context.args or not context.args:
        typer.echo(training_help())
    else:
        run_training(parse_settings(context.args), say=typer.echo)
