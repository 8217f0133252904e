"""Features of a dartified model and of its original, side by side: one vector for the image, and a map of patches."""

import copy
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import cosine_similarity, smooth_l1_loss
from transformers.modeling_utils import PreTrainedModel

from dart_hf.modeling.dartified_families import find_family
from dart_hf.modeling.modeling_dartified import DartifiedModel
from dart_hf.modeling.region_projection import place_back


class Features(NamedTuple):
    """Features of B images.

    Args:
        pooled: (B, F), what the model says of the whole image.
        patches: (B, D, h, w), what it says of the cells of a grid over the image.
    """

    pooled: torch.Tensor
    patches: torch.Tensor


class OriginalFeatures:
    """The features of an original model, without its classifier.

    Args:
        model: A model that [`dart_hf.dartify`] accepts. It is put into evaluation mode.
        student: Its dartified copy, which knows how many tokens are in front of the patches, and how large those are.
        image_size: Side in pixels of the images that the model will read.
    """

    def __init__(self, model: PreTrainedModel, student: DartifiedModel, image_size: int) -> None:
        self.family = find_family(type(model).__name__)
        self.model = model.eval()
        self.num_prefix_tokens = student.num_prefix_tokens
        self.patch_size = student.config.patch_size
        self._options: dict[str, Any] = {}
        if image_size != student.config.image_size:
            body = self.family.body(model)
            if hasattr(body, "set_input_size"):
                # A model of timm, which has to be changed for another size.
                self.model = copy.deepcopy(self.model)
                self.family.body(self.model).set_input_size(image_size)
            elif "interpolate_pos_encoding" in inspect.signature(body.forward).parameters:
                self._options["interpolate_pos_encoding"] = True

    @torch.no_grad()
    def __call__(self, pixel_values: torch.Tensor) -> Features:
        """Pixel values (B, C, H, W) -> features, with a cell for each patch.

        Raises:
            ValueError: The model does not give one token for each patch.
        """
        pixel_values = pixel_values.to(next(self.model.parameters()).dtype)
        outputs = self.family.features(self.model, pixel_values, **self._options)
        patches = outputs.last_hidden_state[:, self.num_prefix_tokens :]
        rows, columns = (side // self.patch_size for side in pixel_values.shape[2:])
        if patches.shape[1] != rows * columns:
            raise ValueError(
                f"The teacher must have {self.num_prefix_tokens} tokens and one for each of the {rows}×{columns} "
                f"patches, got {outputs.last_hidden_state.shape[1]} tokens in all; give the model that was dartified."
            )
        return Features(pooled_features(outputs, self.num_prefix_tokens), patches.mT.unflatten(2, (rows, columns)))


def region_features(
    model: nn.Module, num_prefix_tokens: int, pixel_values: torch.Tensor, num_patches: int, map_size: tuple[int, int]
) -> Features:
    """The features of a dartified model, with its region tokens placed back on a grid of `map_size` cells."""
    outputs = model(pixel_values=pixel_values, num_patches=num_patches, output_regions=True)
    regions = outputs.regions
    # The regions may leave out a border, as the original's patches do.
    height, length = round(regions.row_edges[0, -1].item()), regions.strip_edges[0, -1].item()
    width = round(length / (regions.row_edges.shape[1] - 1))
    tokens = outputs.last_hidden_state[:, num_prefix_tokens:]
    return Features(pooled_features(outputs, num_prefix_tokens), place_back(tokens, regions, height, width, map_size))


def pooled_features(outputs: Mapping[str, Any], num_prefix_tokens: int) -> torch.Tensor:
    """The pooled output or the image embedding; without them the class token, without that the mean of all tokens."""
    for name in ("image_embeds", "pooler_output"):
        if outputs.get(name) is not None:
            return outputs[name]
    tokens = outputs["last_hidden_state"]
    return tokens[:, 0] if num_prefix_tokens else tokens.mean(dim=1)


def check_same_width(student: Features, teacher: Features) -> None:
    """Raise a ValueError if the features of student and teacher cannot be compared."""
    for name, found, wanted in zip(Features._fields, student, teacher, strict=True):
        if found.shape[1] != wanted.shape[1]:
            raise ValueError(
                f"The teacher's {name} features have {wanted.shape[1]} channels and the student's {found.shape[1]}; "
                "give the model that was dartified as teacher."
            )


def feature_distance(
    found: torch.Tensor, wanted: torch.Tensor, cosine_weight: float, smooth_l1_weight: float
) -> torch.Tensor:
    """How far features (B, C, …) are from the wanted ones: a weighted sum of cosine distance and smooth L1.

    Smooth L1 is taken of features in units of the root mean square of the wanted ones, because the features of one
    encoder can be a hundred times as large as those of another.
    """
    found, wanted = found.float(), wanted.float()
    scale = wanted.square().mean().sqrt().clamp(min=1e-6)
    distance = cosine_weight * (1 - cosine_similarity(found, wanted, dim=1).mean())
    return distance + smooth_l1_weight * smooth_l1_loss(found / scale, wanted / scale)


def image_similarity(student: Features, teacher: Features) -> dict[str, torch.Tensor]:
    """The cosine similarity of the features of each image, that of the patches averaged over the cells: (B,) each."""
    return {
        name: cosine_similarity(found.double(), wanted.double(), dim=1).flatten(1).mean(dim=1)
        if found.dim() > 2
        else cosine_similarity(found.double(), wanted.double(), dim=1)
        for name, found, wanted in zip(Features._fields, student, teacher, strict=True)
    }
