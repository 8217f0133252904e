"""The parts of a ViT that conversion reads, from any library."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from transformers import PreTrainedConfig

from dart_hf.conversion.tensors import NameTable, Tensors
from dart_hf.hub_errors import hub_reason


@dataclass(frozen=True)
class ViT:
    """A ViT of another library, read for conversion.

    Args:
        settings: Settings of the `DartConfig`, without those of partition and scorer.
        tensors: Tensors by the source's names. The position table has one row for the class token, then one per patch.
        names: From our tensor names to the source's.
        preparation: Settings of the `DartImageProcessor` that prepares images as the source does.
        classify: Computes logits (B, num_labels) from pixel values (B, C, H, W) of the source's image size; without
            labels, the class token's normalised features (B, D).
    """

    settings: dict[str, Any]
    tensors: Tensors
    names: NameTable
    preparation: dict[str, Any]
    classify: Callable[[torch.Tensor], torch.Tensor]

    @property
    def grid_size(self) -> int:
        """The number of patches along a side of the image."""
        return self.settings["image_size"] // self.settings["patch_size"]


def common_settings(
    config: PreTrainedConfig, image_size: int | Sequence[int], patch_size: int | Sequence[int]
) -> dict[str, Any]:
    """Read the labels and the sides of image and patch; raise a ValueError unless both are square and fit together."""
    sides = {}
    for name, size in (("image_size", image_size), ("patch_size", patch_size)):
        height, width = (size, size) if isinstance(size, int) else size
        if height != width:
            raise ValueError(f"source: its {name} is {height}×{width}; only squares are supported.")
        sides[name] = height
    if sides["image_size"] % sides["patch_size"]:
        raise ValueError(
            f"source: its image_size {sides['image_size']} is not a multiple of its patch_size {sides['patch_size']}: "
            "its patches leave out a border that DART's regions cover."
        )
    label2id = {label: index for index, label in config.id2label.items()}
    return {**sides, "id2label": config.id2label, "label2id": label2id, "problem_type": config.problem_type}


def fold_position(tensors: dict[str, torch.Tensor], token: str, positions: str) -> None:
    """Add the second row of a position table, the distillation token's, to that token, and remove the row."""
    table = tensors[positions]
    tensors[token] = tensors[token] + table[:, 1:2]
    tensors[positions] = torch.cat([table[:, :1], table[:, 2:]], dim=1)


@contextmanager
def source_errors(what: str) -> Iterator[None]:
    """Turn the libraries' errors into a sentence: `what` could not be read, or is unusable, and why."""
    try:
        yield
    except (OSError, HTTPError) as error:
        raise OSError(f"source: {what} cannot be read: {_first_sentence(error)}.") from error
    except (RuntimeError, TypeError, ValueError, AssertionError, SafetensorError, UnpicklingError) as error:
        raise ValueError(f"source: {what} cannot be used: {_first_sentence(error)}.") from error


def _first_sentence(error: Exception) -> str:
    """Return the reason without the library's advice, which does not apply to our users."""
    return hub_reason(error).partition(". ")[0]
