"""Pretrained encoders of transformers that read region tokens in place of a grid of patches."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .configuration_dartified import DartifiedConfig
from .dartified_families import find_family
from .modeling_dart_base import DartModelOutput, DistilledImageClassifierOutput, RegionPreTrainedModel, check_labels
from .region_embeddings import RegionEmbeddings
from .region_partition import Regions, uniform_regions
from .region_sampling import sample_regions
from .region_scorer import Look
from .region_tokenizer import RegionPartitioner, channels_last


@dataclass
class DartifiedModelOutput(DartModelOutput):
    """[`DartModelOutput`], and the projected embeddings (B, E) of a CLIP with projection."""

    image_embeds: torch.FloatTensor | None = None


class PatchReader(RegionPartitioner):
    """Cuts an image into regions and reads their patches, over the pixels that the original's patches cover."""

    def forward(
        self, pixel_values: Tensor, num_patches: int | None = None, look: Look | None = None
    ) -> tuple[Tensor, Regions, tuple[int, int]]:
        """Read a batch of images.

        Args:
            pixel_values: (B, C, H, W), floating point, normalised as for the original.
            num_patches: Token budget N. The default is `config.num_patches`.
            look: The model's method of this name, which `scorer="encoder"` needs.

        Returns:
            Patches (B, N, P·P·C); the regions; and the grid (rows, columns) of the original.

        Raises:
            ValueError: See [`PatchReader.check`].
        """
        grid = tuple(side // self.config.patch_size for side in pixel_values.shape[2:])
        covered = [cells * self.config.patch_size for cells in grid]
        # An image without a whole patch stays as it is, and is refused.
        if all(covered):
            pixel_values = pixel_values[:, :, : covered[0], : covered[1]]
        pixel_values = channels_last(pixel_values)
        regions = self.regions(pixel_values, num_patches, look)
        return sample_regions(pixel_values, regions, self.config.patch_size), regions, grid

    def check(self, pixel_values: Tensor, num_patches: int) -> None:
        """Check as [`RegionPartitioner.check`] does, and that there is a whole patch, and no more regions than pixels.

        Raises:
            ValueError: Something does not fit.
        """
        super().check(pixel_values, num_patches)
        height, width = pixel_values.shape[2:]
        if min(height, width) < self.config.patch_size:
            raise ValueError(
                f"pixel_values must be at least {self.config.patch_size} pixels high and wide, one patch of the "
                f"original, got {height}×{width}."
            )
        if num_patches > height * width:
            raise ValueError(f"num_patches={num_patches} is more than the {height * width} pixels of the image.")


class DartifiedPreTrainedModel(RegionPreTrainedModel):
    """Weights and loading of the models below."""

    config: DartifiedConfig
    config_class = DartifiedConfig
    base_model_prefix = "dartified"
    _no_split_modules = ["PatchReader", "RegionScorer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.embeddings.projection

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, DartifiedModel):
            # The original's own initialisation expects a convolution here.
            projection = module.embeddings.projection
            init.trunc_normal_(projection.weight, std=self.config.initializer_range)
            if projection.bias is not None:
                init.zeros_(projection.bias)
        else:
            super()._init_weights(module)

    def outputs_wanted(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the original for the outputs that this call or the configuration asks for."""
        flags = {name: kwargs.pop(name, None) for name in ("output_hidden_states", "output_attentions")}
        wanted = {name: getattr(self.config, name, False) if flag is None else flag for name, flag in flags.items()}
        return {**kwargs, **{name: flag for name, flag in wanted.items() if flag}}


class DartifiedModel(DartifiedPreTrainedModel):
    """A pretrained encoder with region tokens, without a classifier. [`dart_hf.dartify`] makes it of an original."""

    def __init__(self, config: DartifiedConfig) -> None:
        super().__init__(config)
        self.tokenizer = PatchReader(config)
        encoder_config = config.encoder_config
        encoder_config.id2label, encoder_config.label2id = config.id2label, config.label2id
        self.family = find_family(config.encoder_class)
        original_class = self.family.original_class(config.encoder_class)
        self.encoder = original_class._from_config(encoder_config, **(config.encoder_arguments or {}))
        self.family.install(self.encoder)
        self.post_init()

    @property
    def embeddings(self) -> RegionEmbeddings:
        """The module in the place of the original's embedding module."""
        return getattr(self.family.body(self.encoder), self.family.place)

    @property
    def num_prefix_tokens(self) -> int:
        """The number of special tokens in front of the regions."""
        return self.embeddings.num_prefix_tokens

    def embed(self, pixel_values: Tensor, num_patches: int | None = None) -> tuple[Tensor, Regions]:
        """Images (B, C, H, W) -> the encoder's embeddings (B, S + N, …), and the regions."""
        patches, regions, grid = self.tokenizer(pixel_values, num_patches, self.look)
        embeddings = self.embeddings
        return embeddings.embed(patches.to(embeddings.projection.weight.dtype), regions, *grid), regions

    def first_layers(self, images: Tensor, num_layers: int) -> Tensor:
        grid = (self.config.score_grid_size, self.config.score_grid_size)
        regions = uniform_regions(images.new_ones(images.shape[0], *grid), grid[0] * grid[1], *images.shape[2:])
        dtype = self.embeddings.projection.weight.dtype
        patches = sample_regions(images.to(dtype), regions, self.config.patch_size)
        hidden_states = self.family.first_layers(
            self.encoder, self.embeddings.embed(patches, regions, *grid), num_layers
        )
        return hidden_states[:, self.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        num_patches: int | None = None,
        output_regions: bool = False,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DartifiedModelOutput:
        """Encode images.

        Args:
            pixel_values: (B, C, H, W), floating point, normalised as for the original.
            num_patches: Token budget N of this call. The default is `config.num_patches`.
            output_regions: Also return `regions`: where the region tokens are.
            interpolate_pos_encoding: Accepted, because callers of the original may give it. Positions always follow the
                size of the image.

        Returns:
            The outputs of the original. `last_hidden_state` (B, S + N, D) has the original's S special tokens first
            (`num_prefix_tokens`), then a token for each region. With `output_regions` `regions`.

        Raises:
            ValueError: See [`PatchReader.check`].
        """
        embeddings, regions = self.embed(pixel_values, num_patches)
        outputs = self.family.features(self.encoder, embeddings, **self.outputs_wanted(kwargs))
        return DartifiedModelOutput(**outputs, regions=regions if output_regions else None)


class DartifiedForImageClassification(DartifiedPreTrainedModel):
    """A pretrained image classifier with region tokens. Its classifier is the original's."""

    def __init__(self, config: DartifiedConfig) -> None:
        super().__init__(config)
        if "ForImageClassification" not in config.encoder_class:
            raise ValueError(f"encoder_class must be an image classifier, got {config.encoder_class!r}.")
        self.num_labels = config.num_labels
        self.dartified = DartifiedModel(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        num_patches: int | None = None,
        output_regions: bool = False,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DistilledImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values, num_patches, output_regions, interpolate_pos_encoding: See [`DartifiedModel.forward`].
            labels: As for [`DartForImageClassification`]. With labels the loss is returned.

        Returns:
            `logits` (B, num_labels); with labels `loss`; with `output_regions` `regions`; and the other outputs of the
            original.

        Raises:
            ValueError: The number of labels is not the number of images; or see [`PatchReader.check`].
        """
        check_labels(labels, pixel_values)
        embeddings, regions = self.dartified.embed(pixel_values, num_patches)
        outputs = self.dartified.encoder(embeddings, **self.outputs_wanted(kwargs))
        classified = DistilledImageClassifierOutput(**outputs, regions=regions if output_regions else None)
        if labels is not None:
            classified.loss = self.loss_function(labels, classified.logits, self.config, **kwargs)
        return classified


__all__ = ["DartifiedForImageClassification", "DartifiedModel", "DartifiedPreTrainedModel"]
