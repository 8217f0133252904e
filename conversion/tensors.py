"""Rename the tensors of other libraries' models to our names."""

import re
from collections.abc import Iterable, Mapping

import torch

Tensors = Mapping[str, torch.Tensor]

# Pairs of a pattern for our tensor names and the original name. Several of our tensors with one original name are its
# parts along the first dimension, in the order of the table.
NameTable = tuple[tuple[str, str], ...]

TIMM_VIT_NAMES: NameTable = (
    (r"dart\.cls_token", "cls_token"),
    (r"dart\.distillation_token", "dist_token"),
    (r"dart\.tokenizer\.position_embeddings", "pos_embed"),
    (r"dart\.tokenizer\.projection\.", "patch_embed.proj."),
    (r"dart\.layers\.(\d+)\.layernorm_before\.", r"blocks.\1.norm1."),
    (r"dart\.layers\.(\d+)\.attention\.q_proj\.", r"blocks.\1.attn.qkv."),
    (r"dart\.layers\.(\d+)\.attention\.k_proj\.", r"blocks.\1.attn.qkv."),
    (r"dart\.layers\.(\d+)\.attention\.v_proj\.", r"blocks.\1.attn.qkv."),
    (r"dart\.layers\.(\d+)\.attention\.o_proj\.", r"blocks.\1.attn.proj."),
    (r"dart\.layers\.(\d+)\.layernorm_after\.", r"blocks.\1.norm2."),
    (r"dart\.layers\.(\d+)\.mlp\.", r"blocks.\1.mlp."),
    (r"dart\.layernorm\.", "norm."),
    (r"classifier\.", "head."),
    (r"distillation_classifier\.", "head_dist."),
)


def renamed_tensors(original: Tensors, shapes: Mapping[str, torch.Size], names: NameTable) -> dict[str, torch.Tensor]:
    """Copy tensors under our names, and split those that are several tensors of ours.

    Args:
        original: Tensors by their original names.
        shapes: The shapes of our tensors by name. Names that no row of `names` matches are left out of the result.
        names: From our names to the original ones.

    Raises:
        ValueError: An original tensor is missing, unexpected or wrongly shaped. The message names it.
    """
    sources = _original_names(shapes, names)
    check_tensors(original, {name: _joined_shape([shapes[part] for part in parts]) for name, parts in sources.items()})
    renamed = {}
    for name, parts in sources.items():
        pieces = original[name].split([shapes[part][0] for part in parts]) if len(parts) > 1 else [original[name]]
        renamed |= {part: piece.clone() for part, piece in zip(parts, pieces, strict=True)}
    return renamed


def _original_names(ours: Iterable[str], names: NameTable) -> dict[str, list[str]]:
    """Map each original name to our names for its parts."""
    ours = list(ours)
    sources: dict[str, list[str]] = {}
    for pattern, original in names:
        for name in ours:
            if re.match(pattern, name):
                sources.setdefault(re.sub(pattern, original, name), []).append(name)
    return sources


def check_tensors(original: Tensors, expected: Mapping[str, torch.Size]) -> None:
    """Raise a ValueError that names the tensors that are missing, unexpected or wrongly shaped."""
    problems = {
        "missing": [name for name in expected if name not in original],
        "unexpected": [name for name in original if name not in expected],
        "wrong shape": [
            f"{name} {tuple(original[name].shape)} instead of {tuple(shape)}"
            for name, shape in expected.items()
            if name in original and original[name].shape != shape
        ],
    }
    found = [_problem(names, problem) for problem, names in problems.items() if names]
    if found:
        raise ValueError(f"The tensors of the checkpoint do not fit the model: {'; '.join(found)}.")


def _problem(names: list[str], problem: str) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{problem} {', '.join(names[:3])}{more}"


def _joined_shape(shapes: list[torch.Size]) -> torch.Size:
    """Return the shape of tensors of these shapes after joining them along the first dimension."""
    if len(shapes) == 1:
        return shapes[0]
    return torch.Size([sum(shape[0] for shape in shapes), *shapes[0][1:]])
