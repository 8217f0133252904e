"""transformers' common test suites: download them for the installed version and import them as a package.

The wheel has no tests. The source distribution has the common ones (`tests/test_modeling_common.py` and others), but
not the packages that they import (`tests/generation`, `tests/utils`, …). Placeholders replace these.
"""

import importlib
import importlib.abc
import importlib.machinery
import os
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import transformers

PACKAGE = "transformers_suites"
SOURCE_VARIABLE = "DART_HF_TRANSFORMERS_SDIST"
FETCH_SECONDS = 600

# The names that the suites use from the missing modules. Any other name in them is an empty class.
PLACEHOLDERS: dict[str, dict[str, Any]] = {
    "utils.test_configuration_utils": {
        "config_common_kwargs": {
            "dtype": "float16",
            "id2label": {0: "first", 1: "second", 2: "third"},
            "output_hidden_states": True,
            "problem_type": "regression",
            "return_dict": False,
        }
    },
}
OTHER_PLACEHOLDERS = ("fetch_hub_objects_for_ci",)


class SuitesUnavailableError(RuntimeError):
    """transformers' suites cannot be downloaded, or differ from what this harness knows."""


SUITE_MODULES = {
    "modeling": "test_modeling_common",
    "configuration": "test_configuration_common",
    "image_processing": "test_image_processing_common",
    "training": "test_training_mixin",
}


def cache_folder() -> Path:
    """The folder outside the repository that keeps downloaded suites."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dart-hf"


def locate_suites() -> Path:
    """The folder `tests` of the installed version's source distribution. pip downloads it once.

    Raises:
        SuitesUnavailableError: It is not in the cache, not given by the environment variable, and pip cannot get it.
    """
    name = f"transformers-{transformers.__version__}"
    target = cache_folder() / name
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
            archive = _given_archive(f"{name}.tar.gz") or _download(Path(scratch), f"{name}.tar.gz")
            with tarfile.open(archive) as opened:
                members = [member for member in opened.getmembers() if member.name.startswith(f"{name}/tests/")]
                opened.extractall(scratch, members, filter="data")
            # Only a complete folder gets its final name. Another process may be first.
            try:
                Path(scratch, name, "tests").rename(target)
            except OSError:
                if not target.is_dir():
                    raise
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise SuitesUnavailableError(f"{name}.tar.gz cannot be unpacked to {target}: {error}") from error
    return target


def _given_archive(name: str) -> Path | None:
    if not (given := os.environ.get(SOURCE_VARIABLE)):
        return None
    archive = Path(given).expanduser()
    if not archive.is_file() or archive.name != name:
        raise SuitesUnavailableError(f"{SOURCE_VARIABLE} must be the path of {name}, got {given!r}.")
    return archive


def _download(folder: Path, name: str) -> Path:
    requirement = "==".join(name.removesuffix(".tar.gz").split("-", 1))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", "transformers", "--dest", str(folder), requirement]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=FETCH_SECONDS)
        reason = f"it brought {[path.name for path in folder.iterdir()]}"
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
    except subprocess.TimeoutExpired:
        reason = f"no answer in {FETCH_SECONDS} seconds"
    if not (folder / name).is_file():
        raise SuitesUnavailableError(
            f"transformers' own test suites come with its source distribution, which pip could not download "
            f"({reason}). Run this once with a network, or set {SOURCE_VARIABLE} to the path of {name}."
        )
    return folder / name


class PlaceholderFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes placeholders for the modules that the source distribution leaves out. Python asks it last."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        inside = fullname.startswith(f"{PACKAGE}.")
        # A missing suite is an error and gets no placeholder.
        if fullname in OTHER_PLACEHOLDERS or (inside and fullname.rpartition(".")[2] not in SUITE_MODULES.values()):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def exec_module(self, module: ModuleType) -> None:
        def placeholder(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module.__getattr__ = placeholder
        vars(module).update(PLACEHOLDERS.get(module.__name__.removeprefix(f"{PACKAGE}."), {}))


def load_suites() -> SimpleNamespace:
    """Import the installed version's suites: a module for each name in `SUITE_MODULES`.

    Raises:
        SuitesUnavailableError: They cannot be downloaded, or differ from what the harness knows.
    """
    folder = locate_suites()
    package = ModuleType(PACKAGE)
    package.__path__ = [str(folder)]
    sys.modules[PACKAGE] = package
    if not any(isinstance(finder, PlaceholderFinder) for finder in sys.meta_path):
        sys.meta_path.append(PlaceholderFinder())
    try:
        with _import_surroundings():
            modules = {key: importlib.import_module(f"{PACKAGE}.{name}") for key, name in SUITE_MODULES.items()}
    except ImportError as error:
        raise SuitesUnavailableError(
            f"the test suites of transformers {transformers.__version__} in {folder} cannot be imported: {error}"
        ) from error
    return SimpleNamespace(**modules)


@contextmanager
def _import_surroundings() -> Iterator[None]:
    """While the suites are imported: use the installed transformers, and restore the search path at the end."""
    search_path = list(sys.path)
    try:
        with (
            # The suites have pytest markers that we do not use.
            warnings.catch_warnings(action="ignore", category=pytest.PytestUnknownMarkWarning),
            # Otherwise the suites would run the transformers of the source distribution.
            patch("transformers.utils.direct_transformers_import", lambda *args, **kwargs: transformers),
        ):
            yield
    finally:
        sys.path[:] = search_path
