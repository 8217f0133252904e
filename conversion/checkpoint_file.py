"""Read checkpoint files of others without executing anything in them."""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

# What training checkpoints hold besides tensors and plain containers. Paths are read as pure paths, so that a file
# written on Windows is readable on Linux, and the other way round.
_ALLOWED_GLOBALS: list[Any] = [
    argparse.Namespace,
    *(
        (PurePosixPath, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "PurePosixPath")
    ),
    *(
        (PureWindowsPath, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for name in ("WindowsPath", "PureWindowsPath")
    ),
    *((np.float64(0).__reduce__()[0], f"numpy.{module}.multiarray.scalar") for module in ("core", "_core")),
    np.dtype,
    *(type(np.dtype(name)) for name in ("bool", "int32", "int64", "float16", "float32", "float64")),
]


def read_checkpoint(path: Path, ema: bool = False) -> tuple[dict[str, torch.Tensor], str | None]:
    """Read the weights of a checkpoint file and the name of its model.

    A published file of the DART authors is a pickle of a dict with `model`, often `model_ema`, the optimiser's state,
    and `args`, an argparse.Namespace.

    Args:
        path: `.safetensors`, or else a PyTorch pickle.
        ema: Read `model_ema` instead of `model`.

    Returns:
        Tensors by their original names, and the training script's `args.model` (None if there is none).

    Raises:
        ValueError: The file is of neither kind, is damaged, would have to execute code, or holds no such weights.
    """
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"checkpoint: {path} holds a {type(content).__name__}, not a dict of tensors.")
    key = "model_ema" if ema else "model"
    if ema and content.get(key) is None:
        raise ValueError(f"ema: {path} has no averaged weights (no 'model_ema').")
    weights = content[key] if isinstance(content.get(key), Mapping) else content
    other = next((name for name, value in weights.items() if not isinstance(value, torch.Tensor)), None)
    if other is not None or not weights:
        found = f"{other!r} is a {type(weights[other]).__name__}" if weights else "it is empty"
        raise ValueError(f"checkpoint: {path} holds neither a 'model' nor a bare dict of tensors: {found}.")
    args = content.get("args")
    args_model = args.get("model") if isinstance(args, Mapping) else getattr(args, "model", None)
    return dict(weights), args_model if isinstance(args_model, str) else None


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"checkpoint: {path} is not a safetensors file, or is incomplete: {error}.") from error


def _read_pickle(path: Path) -> Any:
    # At its end the context removes its globals from the process's list, also those that the user had put there before.
    present = torch.serialization.get_safe_globals()
    allowed = [entry for entry in _ALLOWED_GLOBALS if entry not in present]
    # The file is opened first, so that every later error is about its content.
    with path.open("rb") as file:
        try:
            with torch.serialization.safe_globals(allowed):
                return torch.load(file, map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            found = re.search(r"GLOBAL (\S+)", str(error))
            if found is None:
                reason = "is not a PyTorch checkpoint, or cannot be read without executing code"
            else:
                reason = f"would run {found[1]!r} when it is read; that is refused, and nothing was executed"
            raise ValueError(f"checkpoint: {path} {reason}.") from error
        except MemoryError:
            raise
        except Exception as error:
            # A damaged file can raise anything: RuntimeError, OSError, EOFError, KeyError...
            raise ValueError(f"checkpoint: {path} is not a PyTorch checkpoint, or is incomplete.") from error
