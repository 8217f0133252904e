"""transformers' common test suites: fetched for the installed version and imported under a package name of their own.

The wheel has no tests. The source distribution has the common ones (`tests/test_modeling_common.py` and its like) but
not the packages that these import (`tests/generation`, `tests/utils`, …); stand-ins take their place.
"""

import gzip
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import transformers

from .pipeline_checks import ImageClassificationPipelineTests, ImageFeatureExtractionPipelineTests

PACKAGE = "transformers_suites"
SOURCE_VARIABLE = "DART_HF_TRANSFORMERS_SDIST"
FETCH_SECONDS = 600

# What the suites need from the modules that are left out. Any other name taken from such a module is an empty class.
STAND_INS: dict[str, dict[str, Any]] = {
    "utils.test_configuration_utils": {
        "config_common_kwargs": {
            "architectures": ["SomeModel"],
            "chunk_size_feed_forward": 5,
            "dtype": "float16",
            "id2label": {0: "first", 1: "second", 2: "third"},
            "label2id": {"first": 0, "second": 1, "third": 2},
            "output_hidden_states": True,
            "problem_type": "regression",
            "return_dict": False,
        }
    },
    "pipelines.test_pipelines_image_classification": {
        "ImageClassificationPipelineTests": ImageClassificationPipelineTests
    },
    "pipelines.test_pipelines_image_feature_extraction": {
        "ImageFeatureExtractionPipelineTests": ImageFeatureExtractionPipelineTests
    },
}
OUTSIDE_STAND_INS = ("fetch_hub_objects_for_ci",)


class SuitesUnavailableError(RuntimeError):
    """transformers' suites could not be fetched or are not what this harness knows."""


@dataclass(frozen=True)
class Suites:
    """The suites' modules of the installed transformers."""

    modeling: ModuleType
    configuration: ModuleType
    image_processing: ModuleType
    pipelines: ModuleType
    training: ModuleType


SUITE_MODULES = {
    "modeling": "test_modeling_common",
    "configuration": "test_configuration_common",
    "image_processing": "test_image_processing_common",
    "pipelines": "test_pipeline_mixin",
    "training": "test_training_mixin",
}


def cache_folder() -> Path:
    """Where fetched suites are kept, outside the repository."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dart-hf"


def locate_suites() -> Path:
    """The folder `tests` of the installed version's source distribution, fetched by pip where it is not cached yet.

    Raises:
        SuitesUnavailableError: It is neither cached nor given nor to be fetched.
    """
    name = f"transformers-{transformers.__version__}"
    # The rename at the end makes the folder, so where it exists it is complete.
    target = cache_folder() / name
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
            archive = _given_archive(f"{name}.tar.gz") or _download(Path(scratch), f"{name}.tar.gz")
            _rename_into_place(_unpack(archive, Path(scratch)), target)
    except OSError as error:
        raise SuitesUnavailableError(f"transformers' test suites cannot be kept in {target.parent}: {error}") from error
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


def _unpack(archive: Path, folder: Path) -> Path:
    """Unpack the archive's `tests` into `folder`; nothing else of it is needed."""
    tests = f"{archive.name.removesuffix('.tar.gz')}/tests"
    try:
        with tarfile.open(archive) as opened:
            members = [member for member in opened.getmembers() if member.name.startswith(f"{tests}/")]
            opened.extractall(folder, members, filter="data")
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SuitesUnavailableError(f"{archive} is damaged: {error}") from error
    if not (folder / tests).is_dir():
        raise SuitesUnavailableError(f"{archive} has no folder {tests}.")
    return folder / tests


def _rename_into_place(unpacked: Path, target: Path) -> None:
    try:
        unpacked.rename(target)
    except OSError:
        # Another process was first.
        if not target.is_dir():
            raise


class StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers, after everyone else, for the modules that the source distribution leaves out."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        inside = fullname.startswith(f"{PACKAGE}.")
        # A suite that is missing is an error, not something to stand in for.
        if fullname in OUTSIDE_STAND_INS or (inside and fullname.rpartition(".")[2] not in SUITE_MODULES.values()):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def exec_module(self, module: ModuleType) -> None:
        def stand_in(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module.__getattr__ = stand_in
        vars(module).update(STAND_INS.get(module.__name__.removeprefix(f"{PACKAGE}."), {}))


def load_suites() -> Suites:
    """Import the installed version's suites.

    Raises:
        SuitesUnavailableError: They cannot be had, or this version's look different from what the harness knows.
    """
    folder = locate_suites()
    package = ModuleType(PACKAGE)
    package.__path__ = [str(folder)]
    sys.modules[PACKAGE] = package
    if not any(isinstance(finder, StandInFinder) for finder in sys.meta_path):
        sys.meta_path.append(StandInFinder())
    try:
        with _import_surroundings():
            modules = {key: importlib.import_module(f"{PACKAGE}.{name}") for key, name in SUITE_MODULES.items()}
    except ImportError as error:
        raise SuitesUnavailableError(
            f"the test suites of transformers {transformers.__version__} in {folder} cannot be imported: {error}"
        ) from error
    # Some versions name the pipelines' test classes by their path in transformers' repository.
    for task in modules["pipelines"].pipeline_test_mapping.values():
        if isinstance(task["test"], str):
            task["test"] = f"{PACKAGE}.{task['test'].removeprefix('tests.')}"
    return Suites(**modules)


@contextmanager
def _import_surroundings() -> Iterator[None]:
    """What the suites find while they are imported: the installed transformers, and an empty list of tiny models."""
    search_path = list(sys.path)
    with tempfile.TemporaryDirectory() as empty:
        summary = Path(empty, "reports", "tiny_model_summary.json")
        summary.parent.mkdir()
        summary.write_text(json.dumps({}))
        try:
            with (
                # Their marks are transformers' business; nothing here selects by them.
                warnings.catch_warnings(action="ignore", category=pytest.PytestUnknownMarkWarning),
                patch.dict(os.environ, TRANSFORMERS_TINY_MODEL_PATH=empty),
                # They would execute the source distribution's own transformers over the installed one.
                patch("transformers.utils.direct_transformers_import", lambda *args, **kwargs: transformers),
            ):
                yield
        finally:
            sys.path[:] = search_path
