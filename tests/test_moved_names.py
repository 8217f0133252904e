"""Modules of version 0.1 work under their old names for one release."""

import importlib
import subprocess
import sys

import pytest

import dart_hf
from dart_hf.moved_names import MOVED


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in MOVED.items() for name in names])
def test_old_name_is_the_new_object_and_warns(module, name):
    new_place = MOVED[module][name]
    with pytest.warns(DeprecationWarning, match=rf"{module}\.{name} has moved: import it from {new_place}\.") as found:
        old = getattr(importlib.import_module(module), name)
    assert old is getattr(importlib.import_module(new_place), name)
    assert found[0].filename == __file__


@pytest.mark.parametrize(
    "code",
    [
        "from dart_hf.losses import soft_target_cross_entropy as found",
        "import dart_hf.losses; found = dart_hf.losses.soft_target_cross_entropy",
    ],
)
def test_import_statements_find_old_modules(code):
    found = {}
    with pytest.warns(DeprecationWarning, match=r"import it from dart_hf\.training"):
        exec(code, found)
    assert callable(found["found"])


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("from dart_hf.losses import paint", "cannot import name 'paint'"),
        ("import dart_hf.paint", "No module named 'dart_hf.paint'"),
        ("from dart_hf.averaging import EmaCallback", r"no longer there: DartTrainer averages .* Recipe\(ema_decay="),
    ],
)
def test_names_that_are_not_there_are_errors(code, words):
    with pytest.raises(ImportError, match=words):
        exec(code, {})


def test_trainer_is_imported_when_it_is_used():
    assert "DartTrainer" in dir(dart_hf) and "DartTrainer" in dart_hf.__all__
    assert dart_hf.DartTrainer is importlib.import_module("dart_hf.training").DartTrainer
    with pytest.raises(AttributeError, match="has no attribute 'paint'"):
        dart_hf.paint  # noqa: B018


def test_import_of_dart_hf_imports_no_room():
    code = "import sys, dart_hf; print(*(name for name in sys.modules if name.startswith('dart_hf.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    rooms = {name.split(".")[1] for name in done.stdout.split()}
    assert rooms <= {"modeling", "moved_names", "version"}


def test_import_of_the_rooms_looks_for_no_cuda_compiler():
    """torch.utils.cpp_extension warns where it finds a CUDA compiler and no GPU."""
    code = "import sys, dart_hf.benchmark, dart_hf.training; print('torch.utils.cpp_extension' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
