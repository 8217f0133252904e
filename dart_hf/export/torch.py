"""Write and read PyTorch's own export format, `model.pt2`."""

from collections.abc import Callable
from pathlib import Path

import torch

FILE_NAME = "model.pt2"
# Packages beyond the core that the format needs.
PACKAGES = ()


def write_program(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a traced model to a file."""
    torch.export.save(program, path)


def read_program(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """The program in a file as a function: pixel_values -> logits."""
    return torch.no_grad()(torch.export.load(path).module())
