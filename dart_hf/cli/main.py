"""The command line: `dart-hf COMMAND`. Each command has a file here that reads its options and calls the library.

The library raises ValueError, OSError and ImportError for mistakes that its user can mend. They become one line and
exit code 2. All other exceptions are faults of ours and keep their traceback.

The files in this folder import only typer and each other at the top, and the library inside the commands: help and
version must not wait for torch.
"""

import sys
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from dart_hf.cli import (
    benchmark,
    calibrate,
    convert,
    dartify,
    evaluate,
    export,
    predict,
    publish,
    quickstart,
    train,
    visualize,
)
from dart_hf.version import __version__

MISTAKE = 2
INTERRUPTED = 130


class _Group(TyperGroup):
    """A group of commands that reports a user's mistake in one line."""

    def main(self, *args: Any, **settings: Any) -> NoReturn:
        try:
            exit_code = super().main(*args, **{**settings, "standalone_mode": False})
        except typer.TyperException as error:
            # A wrong option or argument. Such errors know the context of their command.
            context = getattr(error, "ctx", None)
            command = context.command_path if context else "dart-hf"
            message = error.format_message()
            end = "" if message.endswith((".", "?")) else "."
            _exit(f"{message}{end} See '{command} --help'.", MISTAKE)
        except (ValueError, OSError, ImportError) as error:
            _exit(str(error) or type(error).__name__, MISTAKE)
        if exit_code == INTERRUPTED:
            _exit("stopped", INTERRUPTED)
        sys.exit(exit_code)


class _Command(TyperCommand):
    """A command that can import the library as late as possible, and that reports what to do after Ctrl-C."""

    def invoke(self, ctx: typer.Context) -> Any:
        # `dart_hf_cli` gives a function that completes the import of dart_hf.
        if ctx.obj is not None:
            ctx.obj()
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            # The library adds notes where there is something to say, such as how to resume.
            for note in getattr(interrupt, "__notes__", []):
                typer.echo(note, err=True)
            raise


def _exit(message: str, exit_code: int) -> NoReturn:
    typer.echo(f"dart-hf: {' '.join(message.split())}", err=True)
    sys.exit(exit_code)


app = typer.Typer(cls=_Group, add_completion=False, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def dart_hf(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """DART: vision transformers whose tokens follow the content of the image."""
    if version:
        typer.echo(f"dart-hf {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


# In the order of `dart-hf --help`.
for _module, _command in (
    (quickstart, quickstart.quickstart),
    (convert, convert.convert),
    (dartify, dartify.dartify),
    (train, train.train),
    (evaluate, evaluate.evaluate),
    (calibrate, calibrate.calibrate),
    (predict, predict.predict),
    (visualize, visualize.visualize),
    (publish, publish.publish),
    (export, export.export),
    (benchmark, benchmark.benchmark),
):
    app.command(
        cls=_Command,
        epilog=f"Example: {_module.EXAMPLE}",
        context_settings=getattr(_module, "CONTEXT_SETTINGS", None),
    )(_command)
