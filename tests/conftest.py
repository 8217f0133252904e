"""Shared by all tests: no network, one thread, a local Hub, and published models with made-up weights."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import golden
import pytest
import torch
from helpers.hub_server import HubServer

from dart_hf.conversion.original import VARIANTS, convert_checkpoint

torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests noted with `record_property("note", text)`."""
    reports = [report for group in terminalreporter.stats.values() for report in group]
    properties = [item for report in reports for item in getattr(report, "user_properties", ())]
    if notes := sorted({text for name, text in properties if name == "note"}):
        terminalreporter.section("notes")
        for note in notes:
            terminalreporter.line(note)


@pytest.fixture(scope="session", autouse=True)
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the cache of `datasets` in a temporary folder."""
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a variant to a file like the authors' `<variant>.pth`, with the weights of `golden`."""
    folder = tmp_path_factory.mktemp("stand-ins")

    def make(variant: str) -> Path:
        path = folder / f"{variant}.pth"
        if not path.exists():
            tensors = {name: torch.from_numpy(value) for name, value in golden.original_state_dict(variant).items()}
            args = argparse.Namespace(model=VARIANTS[variant].args_model, input_size=448, output_dir=folder)
            torch.save({"model": tensors, "optimizer": {"state": {}}, "epoch": 299, "args": args}, path)
        return path

    return make


@pytest.fixture(scope="session")
def converted(stand_in: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a variant to its converted folder. Tests only read this folder."""
    folder = tmp_path_factory.mktemp("converted")

    def convert(variant: str) -> Path:
        if not (folder / variant).exists():
            convert_checkpoint(stand_in(variant), folder / variant)
        return folder / variant

    return convert


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A local Hub that only this test uses."""
    with HubServer() as server:
        yield server
