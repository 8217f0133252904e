"""Keep other libraries' messages and progress bars off the terminal."""

import sys


def quiet_loading() -> None:
    """Turn off transformers' progress bar and report of loading weights. Our loading raises errors for both."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def bars_on_terminals_only() -> None:
    """Turn off the progress bars of `datasets` unless there is a terminal: they would fill a log file."""
    if not sys.stderr.isatty():
        from datasets import disable_progress_bars

        disable_progress_bars()
