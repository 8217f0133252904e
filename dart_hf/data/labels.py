"""Match the classes of a data set, or of another model, to those of a model by their names."""

import re
from collections import Counter
from collections.abc import Sequence

from timm.data import ImageNetInfo
from transformers import PreTrainedModel

# Two lists with this share of equal names are one list in two spellings: ImageNet has two classes "crane", and every
# source names them differently. With fewer than a hundred classes all names must be equal.
SAME_LIST = 0.99


def match_labels(data_names: Sequence[str], model_names: Sequence[str]) -> list[int]:
    """Find the model's class for each class of a data set or of another model.

    Classes are matched by name, whatever the capitals, underscores and hyphens. The data may have only some of the
    model's classes, in any order. ImageNet's classes can have its synset ids as names (`n01440764`). If the names of
    one side are only numbers, as many as the other side has classes, the numbers decide.

    Args:
        data_names, model_names: Names in the order of the classes.

    Returns:
        The number of the model's class for each name in `data_names`.

    Raises:
        ValueError: The model has no class of such a name.
    """
    in_order = list(range(len(model_names)))
    if list(data_names) == list(model_names):
        return in_order
    found = _places(data_names, model_names)
    if None not in found:
        return found
    if len(data_names) == len(model_names):
        if _is_one_list(data_names, model_names):
            return in_order
        if placeholders(len(in_order)) in (list(data_names), list(model_names)):
            return in_order
        # If some names are the model's own, the others are missing in the model.
        if sorted(data_names) == sorted(map(str, in_order)) and not any(place is not None for place in found):
            return [int(name) for name in data_names]
    imagenet = ImageNetInfo("imagenet-1k")
    synsets = _places(data_names, imagenet.label_names())
    if None not in synsets and _is_one_list(imagenet.label_descriptions(), model_names):
        return synsets
    unknown = [name for name, place in zip(data_names, found, strict=True) if place is None]
    raise ValueError(
        f"{len(unknown)} of {len(data_names)} classes ({_few(unknown)}) are none of the model's {len(model_names)} "
        f"({_few(model_names)})."
    )


def placeholders(number: int) -> list[str]:
    """The names that transformers gives to classes without names."""
    return [f"LABEL_{index}" for index in range(number)]


def _places(names: Sequence[str], among: Sequence[str]) -> list[int | None]:
    """The place of each name among others, in the same or else another spelling; None without exactly one place."""
    exact, spelt = _unique(among), _unique(list(map(_spelling, among)))
    own = _unique(list(map(_spelling, names)))
    return [exact.get(name, spelt.get(_spelling(name)) if _spelling(name) in own else None) for name in names]


def _unique(names: Sequence[str]) -> dict[str, int]:
    """The place of each name that occurs once."""
    counts = Counter(names)
    return {name: index for index, name in enumerate(names) if counts[name] == 1}


def _spelling(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _is_one_list(names: Sequence[str], others: Sequence[str]) -> bool:
    same = sum(place == index for index, place in enumerate(_places(names, others)))
    return len(names) == len(others) and same >= SAME_LIST * len(others)


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", …" if len(names) > 3 else "")


def class_names(model: PreTrainedModel) -> list[str]:
    """The names of a model's classes in their order; a class without a name has transformers' `LABEL_<i>`."""
    return [model.config.id2label[index] for index in range(model.config.num_labels)]
