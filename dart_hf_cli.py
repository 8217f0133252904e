"""The command `dart-hf`.

This module lies beside the package because importing `dart_hf` imports torch and transformers, which takes seconds.
`dart-hf --help`, `dart-hf COMMAND --help` and mistakes in the options need neither. So the modules of the command line
are imported first, and `dart_hf/__init__.py` runs when a command does.
"""

import importlib.util
import sys


def main() -> None:
    """Run `dart-hf` with the arguments of the process."""
    complete_import = None
    if "dart_hf" not in sys.modules:
        spec = importlib.util.find_spec("dart_hf")
        package = importlib.util.module_from_spec(spec)
        sys.modules["dart_hf"] = package

        def complete_import() -> None:
            spec.loader.exec_module(package)

    from dart_hf.cli.main import app

    app(prog_name="dart-hf", obj=complete_import)
