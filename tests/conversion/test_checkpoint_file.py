"""Checkpoint files of others are read without executing anything in them."""

import argparse
import builtins
import os
import pathlib
import pickle
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
from helpers.malicious import Malicious
from safetensors.torch import save_file

from dart_hf.conversion.checkpoint_file import read_checkpoint

WEIGHTS = {"a": torch.arange(2000.0), "b": torch.ones(3)}
ARGS = argparse.Namespace(model="darvit_tiny")


def check_refused(message: str, path: pathlib.Path, **options: object) -> None:
    """Reading raises one sentence with `message`, and makes no file."""
    before = sorted(path.parent.iterdir())
    with pytest.raises(ValueError, match=message) as caught:
        read_checkpoint(path, **options)
    assert sorted(path.parent.iterdir()) == before
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["safetensors", "state dict", "legacy state dict", "checkpoint", "averaged"])
def test_weights_are_read(kind, tmp_path):
    path = tmp_path / ("file.safetensors" if kind == "safetensors" else "file.pth")
    if kind == "safetensors":
        save_file(WEIGHTS, path)
    elif "state dict" in kind:
        torch.save(OrderedDict(WEIGHTS), path, _use_new_zipfile_serialization=kind == "state dict")
    else:
        other = {"a": torch.zeros(2)}
        model, averaged = (other, WEIGHTS) if kind == "averaged" else (WEIGHTS, other)
        torch.save({"model": model, "model_ema": averaged, "args": ARGS}, path)
    tensors, args_model = read_checkpoint(path, ema=kind == "averaged")
    assert tensors.keys() == WEIGHTS.keys() and all(torch.equal(tensors[name], WEIGHTS[name]) for name in WEIGHTS)
    assert args_model == ("darvit_tiny" if kind in ("checkpoint", "averaged") else None)


@pytest.mark.parametrize("content", [{"model": WEIGHTS}, {"model": WEIGHTS, "model_ema": None}, WEIGHTS])
def test_missing_averaged_weights_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "file.pth")
    check_refused("ema.*no averaged weights", tmp_path / "file.pth", ema=True)


def test_other_contents_of_a_training_checkpoint_are_read(tmp_path):
    args = argparse.Namespace(model="darvit_tiny", betas=(0.9, 0.99), data=pathlib.Path("data"), best=np.float64(73.8))
    optimizer = {"state": {0: {"step": 1}}}
    torch.save({"model": WEIGHTS, "epoch": np.int64(3), "optimizer": optimizer, "args": args}, tmp_path / "file.pth")
    tensors, args_model = read_checkpoint(tmp_path / "file.pth")
    assert torch.equal(tensors["a"], WEIGHTS["a"]) and args_model == "darvit_tiny"


@pytest.mark.parametrize("name", ["pathlib\nWindowsPath", "pathlib._local\nPosixPath", "numpy.core.multiarray\nscalar"])
def test_class_names_of_other_systems_and_versions_are_read(name, tmp_path):
    args = argparse.Namespace(model="darvit_tiny")
    args.best = np.float32(73.8) if "numpy" in name else pathlib.PurePosixPath("data")
    file = tmp_path / "file.pth"
    torch.save({"model": WEIGHTS, "args": args}, file, _use_new_zipfile_serialization=False)
    written = rb"numpy\._?core\.multiarray\nscalar" if "numpy" in name else rb"pathlib(\._local)?\nPurePosixPath"
    content, replaced = re.subn(written, name.encode(), file.read_bytes())
    assert replaced == 1
    file.write_bytes(content)
    assert read_checkpoint(file)[1] == "darvit_tiny"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["zip", "legacy", "plain 2", "plain 4"])
@pytest.mark.parametrize(
    ("function", "shown"),
    [(os.system, "system"), (builtins.exec, "exec"), (pathlib.Path.touch, "getattr|touch"), (os.mkdir, "mkdir")],
)
def test_pickle_that_executes_code_is_refused(function, shown, form, tmp_path):
    trace, path = tmp_path / "trace", tmp_path / "file.pth"
    argument = {os.system: f"touch {trace}", builtins.exec: f"open({str(trace)!r}, 'w')"}.get(function, str(trace))
    content = {"model": WEIGHTS, "args": Malicious(function, argument)}
    if "plain" in form:
        path.write_bytes(pickle.dumps(content["args"], protocol=int(form[-1])))
        return check_refused("checkpoint: .*file.pth.*execut", path)
    torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    check_refused(f"would run '.*({shown})'.*nothing was executed", path)


@pytest.mark.parametrize("present", [[], [argparse.Namespace]])
def test_reading_keeps_the_allowed_globals_of_the_process(present, tmp_path):
    torch.save({"model": WEIGHTS, "args": ARGS}, tmp_path / "file.pth")
    torch.serialization.add_safe_globals(present)
    try:
        before = set(torch.serialization.get_safe_globals())
        read_checkpoint(tmp_path / "file.pth")
        assert set(torch.serialization.get_safe_globals()) == before and set(present) <= before
    finally:
        torch.serialization.clear_safe_globals()


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_file_is_refused(kind, tmp_path):
    file = tmp_path / ("file.safetensors" if kind == "safetensors" else "file.pth")
    if kind == "safetensors":
        save_file(WEIGHTS, file)
    else:
        torch.save(WEIGHTS, file, _use_new_zipfile_serialization=kind == "zip")
    for share in (0.99, 0.5, 0.01, 0.0):
        os.truncate(file, int(share * file.stat().st_size))
        check_refused("file.* is not a .*, or is incomplete", file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list"),
        ({}, "it is empty"),
        ({"model": {}}, "it is empty"),
        ({"epoch": 3, "weights": {}}, "'epoch' is a int"),
        ("version https://git-lfs.github.com/spec/v1\n", "file.pth is not a PyTorch checkpoint"),
    ],
)
def test_file_without_a_model_is_refused(content, message, tmp_path):
    path = tmp_path / "file.pth"
    path.write_text(content) if isinstance(content, str) else torch.save(content, path)
    check_refused(message, path)
