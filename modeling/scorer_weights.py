"""ImageNet weights for a scorer's trunk: from a local file, or downloaded by the library that the trunk is from."""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .configuration_region import RegionConfig
from .scorer_trunk import TORCHVISION_LAYERS, TimmTrunk


def download_trunk_weights(config: RegionConfig, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trunk's tensors from the default weights of its library; `expected` is the trunk's state dict."""
    name = config.scorer
    if name.startswith("timm/"):
        return TimmTrunk(config, pretrained=True).state_dict()
    library = torchvision.models.get_model_weights(name).DEFAULT
    state_dict = library.get_state_dict(progress=True, check_hash=True)
    return select_trunk_weights(state_dict, config.scorer, expected, str(library))


def select_trunk_weights(
    state_dict: Mapping[str, Tensor], scorer: str, expected: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """The trunk's tensors from the state dict of a whole torchvision or timm model, or of the trunk alone.

    `expected` is the trunk's own state dict; `source` is named in errors.

    Raises:
        ValueError: A tensor is missing, or has another shape.
    """
    part = TORCHVISION_LAYERS[scorer][0] if scorer in TORCHVISION_LAYERS else "model"
    # timm's feature extractors join module names with "_" where the whole model has ".".
    given = {key.removeprefix(f"{part}.").replace(".", "_"): value for key, value in state_dict.items()}
    selected = {}
    for key, tensor in expected.items():
        value = given.get(key.removeprefix("model.").replace(".", "_"))
        if value is None:
            raise ValueError(f"{source} has no tensor {key!r} for scorer={scorer!r}.")
        if value.shape != tensor.shape:
            raise ValueError(
                f"{source} has tensor {key!r} in shape {tuple(value.shape)}; scorer={scorer!r} needs "
                f"{tuple(tensor.shape)}."
            )
        selected[key] = value
    return selected


def read_state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"Scorer weights {path} do not exist.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, SafetensorError, RuntimeError, EOFError, LookupError, ValueError) as error:
        raise ValueError(f"Scorer weights {path} are damaged, or cannot be read without executing code.") from error
    if not isinstance(state_dict, Mapping) or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise ValueError(f"Scorer weights {path} are not a state dict: a mapping of names to tensors is accepted.")
    return dict(state_dict)
