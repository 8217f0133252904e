"""Embedding of regions with the weights of a pretrained encoder. `dartified_families.py` has the encoders."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import maybe_autocast

from .region_partition import Regions, position_weights
from .region_tokenizer import PatchProjection


class RegionEmbeddings(nn.Module):
    """Embeds regions with an encoder's own weights: patch kernel, position table and special tokens.

    It takes the place of the encoder's embedding module, and keeps it as `original`. [`RegionEmbeddings.embed`] makes
    the embeddings. The encoder's own forward pass gets them instead of pixel values, and this module hands them on.
    """

    # Classes of transformers that can be dartified.
    classes: ClassVar[tuple[str, ...]] = ()
    # The name of the embedding module in `body`.
    place: ClassVar[str] = "embeddings"
    # The name of the patch convolution in the embedding module.
    convolution: ClassVar[str] = "patch_embeddings.projection"
    # The name of the list of layers in `body`.
    layers: ClassVar[str] = "layers"
    # Special tokens in front of the patches, by their names in `original`: those with rows in the position table, then
    # those without.
    prefix: tuple[str, ...] = ("cls_token",)
    registers: tuple[str, ...] = ()

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        original.set_submodule(self.convolution, PatchProjection.of(original.get_submodule(self.convolution)))
        self.original = original

    @classmethod
    def original_class(cls, name: str) -> type[PreTrainedModel]:
        """The class that `classes` names."""
        return getattr(transformers, name)

    @staticmethod
    def body(model: PreTrainedModel) -> nn.Module:
        """The part of the model without heads, which has the embedding module."""
        return getattr(model, "vision_model", model.base_model)

    @classmethod
    def install(cls, model: PreTrainedModel) -> "RegionEmbeddings":
        """Put this module in the place of the model's embedding module."""
        body = cls.body(model)
        embeddings = cls(getattr(body, cls.place))
        setattr(body, cls.place, embeddings)
        return embeddings

    @classmethod
    def features(cls, model: PreTrainedModel, embeddings: Tensor, **kwargs: Any) -> ModelOutput:
        """The outputs of the encoder without a classifier."""
        is_classifier = "ForImageClassification" in type(model).__name__
        return (cls.body(model) if is_classifier else model)(embeddings, **kwargs)

    @classmethod
    def first_layers(cls, model: PreTrainedModel, embeddings: Tensor, num_layers: int) -> Tensor:
        """The hidden states (B, S + N, D) after the first layers."""
        body = cls.body(model)
        hidden_states, kwargs = cls.enter(body, embeddings)
        for layer in body.get_submodule(cls.layers)[:num_layers]:
            hidden_states = layer(hidden_states, **kwargs)
        return hidden_states

    @classmethod
    def enter(cls, body: nn.Module, embeddings: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """What the first layer reads: hidden states, and further arguments."""
        return embeddings, {}

    @classmethod
    def image_size(cls, model: PreTrainedModel) -> int | Sequence[int]:
        """The side, or the sides, of the images that the original is meant for."""
        return getattr(model.config, "vision_config", model.config).image_size

    @property
    def patch_embeddings(self) -> nn.Module:
        """The encoder reads its dtype from here."""
        return self.original.patch_embeddings

    @property
    def projection(self) -> PatchProjection:
        """The patch convolution, applied to patches."""
        return self.original.get_submodule(self.convolution)

    @property
    def num_prefix_tokens(self) -> int:
        """The number of special tokens in front of the patches."""
        return self.special_tokens(self.prefix + self.registers).shape[1]

    def special_tokens(self, names: Sequence[str]) -> Tensor:
        """Special tokens (1, S, D) by their names in `original`."""
        size = self.projection.weight.shape[0]
        tokens = [getattr(self.original, name).reshape(1, -1, size) for name in names]
        return torch.cat([self.projection.weight.new_empty(1, 0, size), *tokens], dim=1)

    def forward(self, embeddings: Tensor, **kwargs: Any) -> Tensor:
        """Embeddings -> the same."""
        return embeddings

    def embed(self, patches: Tensor, regions: Regions, rows: int, columns: int) -> Tensor:
        """Patches (B, N, P·P·C) of regions -> embeddings (B, S + N, D), with S special tokens in front.

        `rows` and `columns` are the grid that the original would cut the image into.
        """
        tokens, prefix = self.project(patches), self.special_tokens(self.prefix)
        table = self.positions(rows, columns)
        if table is not None:
            with maybe_autocast(patches.device.type, enabled=False):
                weights = position_weights(regions, rows, columns)
            tokens = tokens + weights.to(table.dtype) @ table[0, prefix.shape[1] :]
            prefix = prefix + table[:, : prefix.shape[1]]
        prefix = torch.cat([prefix, self.special_tokens(self.registers)], dim=1)
        embeddings = torch.cat([prefix.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens], dim=1)
        dropout = getattr(self.original, "dropout", None)
        return embeddings if dropout is None else dropout(embeddings)

    def project(self, patches: Tensor) -> Tensor:
        """Patches (B, N, P·P·C) -> tokens (B, N, D) without positions."""
        return self.projection(patches)

    def positions(self, rows: int, columns: int) -> Tensor | None:
        """The position table for a grid, interpolated as the original does: (1, prefix + rows·columns, D)."""
        kernel = self.projection.weight
        patch_size = kernel.shape[-1]
        # Only its shape is read.
        embeddings = kernel.new_empty(1, self.special_tokens(self.prefix).shape[1] + rows * columns, kernel.shape[0])
        return self.original.interpolate_pos_encoding(embeddings, rows * patch_size, columns * patch_size)
