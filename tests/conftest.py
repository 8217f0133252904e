"""What every test shares: no network, one thread, and the published models with stand-in weights."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import argparse
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import golden
import pytest
import torch
from helpers.hub_server import HubServer

from dart_hf.conversion.original import VARIANTS, convert_checkpoint

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def data_cache(tmp_path_factory) -> None:
    """`datasets` keeps what it has read of a folder; not in the user's cache."""
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory) -> Callable[[str], Path]:
    """Variant -> a file like the authors' `<variant>.pth`, but with the stand-in weights of `golden`."""
    folder = tmp_path_factory.mktemp("stand-ins")

    def make(variant: str) -> Path:
        path = folder / f"{variant}.pth"
        if not path.exists():
            tensors = {name: torch.from_numpy(value) for name, value in golden.original_state_dict(variant).items()}
            args = argparse.Namespace(model=VARIANTS[variant].args_model, input_size=448, output_dir=folder)
            torch.save({"model": tensors, "optimizer": {"state": {}}, "epoch": 299, "args": args}, path)
        return path

    yield make
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def converted(stand_in, tmp_path_factory) -> Callable[[str], Path]:
    """Variant -> the folder that `convert_checkpoint` makes of its stand-in. Not to be written to."""
    folder = tmp_path_factory.mktemp("converted")

    def convert(variant: str) -> Path:
        if not (folder / variant).exists():
            convert_checkpoint(stand_in(variant), folder / variant)
        return folder / variant

    yield convert
    shutil.rmtree(folder)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A Hub of its own for a test."""
    with HubServer() as server:
        yield server
