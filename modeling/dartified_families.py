"""Families of pretrained encoders that can read region tokens: where each embeds its patches, and with what.

A new family is a subclass of [`RegionEmbeddings`] in `FAMILIES`; `docs/bring-your-own-encoder.md` shows how.
"""

import math
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed, resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.models.dinov3_vit.modeling_dinov3_vit import augment_patches_center_coordinates
from transformers.utils import ModelOutput
from transformers.utils.generic import maybe_autocast

from .region_embeddings import RegionEmbeddings
from .region_partition import Regions, region_centers


class ViTEmbeddings(RegionEmbeddings):
    classes = ("ViTModel", "ViTForImageClassification")


class DeiTEmbeddings(RegionEmbeddings):
    classes = ("DeiTModel", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher")
    prefix = ("cls_token", "distillation_token")


class IJepaEmbeddings(RegionEmbeddings):
    classes = ("IJepaModel", "IJepaForImageClassification")
    prefix = ()


class Dinov2Embeddings(RegionEmbeddings):
    classes = ("Dinov2Model", "Dinov2ForImageClassification")
    layers = "encoder.layer"


class Dinov2WithRegistersEmbeddings(Dinov2Embeddings):
    classes = ("Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification")
    registers = ("register_tokens",)


class SiglipEmbeddings(RegionEmbeddings):
    classes = ("SiglipVisionModel", "SiglipForImageClassification")
    layers = "encoder.layers"
    convolution = "patch_embedding"
    prefix = ()

    @classmethod
    def enter(cls, body: nn.Module, embeddings: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return embeddings, {"attention_mask": None}


class CLIPEmbeddings(SiglipEmbeddings):
    classes = ("CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPForImageClassification")
    prefix = ("class_embedding",)

    @classmethod
    def enter(cls, body: nn.Module, embeddings: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return body.pre_layrnorm(embeddings), {"attention_mask": None}


class DINOv3Embeddings(RegionEmbeddings):
    """DINOv3 has no position table. It rotates queries and keys by the position of each patch, here by the centre of
    mass of each region. Cosine and sine travel as further channels of the embeddings."""

    classes = ("DINOv3ViTModel",)
    convolution = "patch_embeddings"
    layers = "model.layer"
    registers = ("register_tokens",)

    @staticmethod
    def body(model: PreTrainedModel) -> nn.Module:
        return model

    @classmethod
    def install(cls, model: PreTrainedModel) -> RegionEmbeddings:
        embeddings = super().install(model)
        body = cls.body(model)
        body.rope_embeddings = embeddings.rotary = RegionRotary(body.rope_embeddings, embeddings.num_prefix_tokens)
        return embeddings

    def positions(self, rows: int, columns: int) -> None:
        return None

    def embed(self, patches: Tensor, regions: Regions, rows: int, columns: int) -> Tensor:
        embeddings = super().embed(patches, regions, rows, columns)
        rotations = pad(self.rotary.rotations(regions), (0, 0, self.num_prefix_tokens, 0))
        return torch.cat([embeddings, rotations.to(embeddings.dtype)], dim=2)

    def forward(self, embeddings: Tensor, **kwargs: Any) -> Tensor:
        return embeddings[..., : self.projection.weight.shape[0]]

    @classmethod
    def enter(cls, body: nn.Module, embeddings: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return body.embeddings(embeddings), {"position_embeddings": body.rope_embeddings(embeddings)}


class RegionRotary(nn.Module):
    """Takes the place of DINOv3's module that computes cosine and sine of its rotary positions."""

    def __init__(self, original: nn.Module, num_prefix_tokens: int) -> None:
        super().__init__()
        self.original = original
        self.num_prefix_tokens = num_prefix_tokens

    def rotations(self, regions: Regions) -> Tensor:
        """Cosine and sine for each region, side by side: (B, N, 2·E), for E channels of a head."""
        with maybe_autocast(regions.row_edges.device.type, enabled=False):
            # In float32, because the original's coordinates are.
            coordinates = 2.0 * region_centers(regions).float() - 1.0
            if self.training:
                settings = self.original.config
                coordinates = augment_patches_center_coordinates(
                    coordinates, settings.pos_embed_shift, settings.pos_embed_jitter, settings.pos_embed_rescale
                )
            angles = 2 * math.pi * coordinates[..., None] * self.original.inv_freq
            angles = angles.flatten(2).tile(2)
            return torch.cat([angles.cos(), angles.sin()], dim=2)

    def forward(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, S + N, D + 2·E) -> cosine and sine, each (B, 1, N, E)."""
        size = 2 * self.original.head_dim
        cos, sin = embeddings[:, None, self.num_prefix_tokens :, -size:].chunk(2, dim=-1)
        return cos, sin


class TimmEmbeddings(RegionEmbeddings):
    """A plain ViT of timm. Its special tokens and position table move from the model here, so that timm adds none."""

    classes = ("TimmWrapperModel", "TimmWrapperForImageClassification")
    place = "patch_embed"
    convolution = "proj"
    layers = "blocks"

    @classmethod
    def install(cls, model: PreTrainedModel) -> RegionEmbeddings:
        vit = cls.body(model)
        if type(vit) is not timm.models.VisionTransformer or type(vit.patch_embed) is not PatchEmbed:
            raise ValueError(
                f"timm's {model.config.architecture!r} cannot be dartified: of timm's models only plain ViTs, whose "
                "patch embedding is one convolution, are accepted."
            )
        # timm's configuration does not name these.
        model.config.hidden_size, model.config.num_hidden_layers = vit.embed_dim, len(vit.blocks)
        embeddings = super().install(model)
        embeddings.move_tokens(vit)
        return embeddings

    def move_tokens(self, vit: nn.Module) -> None:
        """Move special tokens and position table of a model to this module."""
        names = tuple(name for name in ("cls_token", "reg_token") if getattr(vit, name) is not None)
        self.prefix, self.registers = ((), names) if vit.no_embed_class else (names, ())
        for name in ("cls_token", "reg_token", "pos_embed"):
            setattr(self.original, name, getattr(vit, name))
            setattr(vit, name, None)
        self.original.dropout = vit.pos_drop

    @staticmethod
    def body(model: PreTrainedModel) -> nn.Module:
        return model.timm_model

    @classmethod
    def features(cls, model: PreTrainedModel, embeddings: Tensor, **kwargs: Any) -> ModelOutput:
        if kwargs.get("output_hidden_states"):
            raise ValueError("output_hidden_states is not available for a dartified model of timm.")
        vit = cls.body(model)
        hidden = vit.forward_features(embeddings)
        pooled = vit.forward_head(hidden, pre_logits=True)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)

    @classmethod
    def enter(cls, body: nn.Module, embeddings: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return body.norm_pre(embeddings), {}

    @classmethod
    def image_size(cls, model: PreTrainedModel) -> Sequence[int]:
        return cls.body(model).patch_embed.original.img_size

    def project(self, patches: Tensor) -> Tensor:
        return self.original.norm(super().project(patches))

    def positions(self, rows: int, columns: int) -> Tensor | None:
        if self.original.pos_embed is None:
            return None
        count = self.special_tokens(self.prefix).shape[1]
        return resample_abs_pos_embed(
            self.original.pos_embed, [rows, columns], self.original.grid_size, num_prefix_tokens=count
        )


FAMILIES: list[type[RegionEmbeddings]] = [
    ViTEmbeddings,
    DeiTEmbeddings,
    IJepaEmbeddings,
    Dinov2Embeddings,
    Dinov2WithRegistersEmbeddings,
    DINOv3Embeddings,
    SiglipEmbeddings,
    CLIPEmbeddings,
    TimmEmbeddings,
]


def find_family(class_name: str) -> type[RegionEmbeddings]:
    """The family of a class of transformers.

    Raises:
        ValueError: It has none.
    """
    for family in FAMILIES:
        if class_name in family.classes:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.classes)
    raise ValueError(
        f"{class_name} cannot be dartified: accepted are {known}; docs/bring-your-own-encoder.md shows how to add one."
    )
