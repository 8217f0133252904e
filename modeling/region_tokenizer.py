"""Tokenizer: pixel values -> tokens. Owns the scorer, and the modules that read the regions."""

from numbers import Integral

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.utils.generic import maybe_autocast

from .configuration_region import RegionConfig, RegionTokenizerConfig
from .region_partition import PARTITIONS, Regions, check_grid_budget, position_weights, uniform_regions
from .region_sampling import sample_regions
from .region_scorer import Look, RegionScorer


class RegionPartitioner(nn.Module):
    """Scores the image and cuts it into regions of about equal content."""

    def __init__(self, config: RegionConfig) -> None:
        super().__init__()
        self.config = config
        self.scorer = RegionScorer(config)

    def regions(self, pixel_values: Tensor, num_patches: int | None, look: Look | None = None) -> Regions:
        """The regions of images (B, C, H, W). The default of `num_patches` is `config.num_patches`.

        `look` is the model's method of this name, which `scorer="encoder"` needs.

        Raises:
            ValueError: See [`RegionPartitioner.check`].
        """
        num_patches = self.config.num_patches if num_patches is None else num_patches
        self.check(pixel_values, num_patches)
        return self.partition(self.score(pixel_values, look), num_patches, *pixel_values.shape[2:])

    def score(self, pixel_values: Tensor, look: Look | None = None) -> Tensor:
        """(B, C, H, W) -> scores (B, G, G) in float32 at least; ones for the uniform partition."""
        if self.config.partition != "uniform":
            return self.scorer(pixel_values, look)
        grid = (pixel_values.shape[0], self.config.score_grid_size, self.config.score_grid_size)
        return pixel_values.new_ones(grid, dtype=self.scorer.statistics.running_mean.dtype)

    def partition(self, scores: Tensor, num_patches: int, height: int, width: int) -> Regions:
        """Scores (B, G, G) -> regions in float32 at least, whatever the precision of the model or of autocast."""
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        with maybe_autocast(scores.device.type, enabled=False):
            return self.cut(scores, num_patches, height, width)

    def cut(self, scores: Tensor, num_patches: int, height: int, width: int) -> Regions:
        """Cut images by the partition that `config.partition` names now."""
        return PARTITIONS[self.config.partition](scores, num_patches, height, width)

    def check(self, pixel_values: Tensor, num_patches: int) -> None:
        """Check the arguments of a call.

        Raises:
            ValueError: `pixel_values` has a wrong rank, number of channels or dtype, or no pixels; or the budget is
                below 1 or does not fit the partition.
        """
        shape = tuple(pixel_values.shape)
        if len(shape) != 4:
            raise ValueError(f"pixel_values must have shape (batch, channels, height, width), got {shape}.")
        if shape[1] != self.config.num_channels:
            raise ValueError(f"pixel_values must have {self.config.num_channels} channels, got {shape[1]} in {shape}.")
        if 0 in shape:
            raise ValueError(f"pixel_values must hold at least one image of at least one pixel, got shape {shape}.")
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values must be floating point and normalised, as DartImageProcessor returns them, got "
                f"{pixel_values.dtype}."
            )
        if isinstance(num_patches, bool) or not isinstance(num_patches, Integral) or num_patches < 1:
            raise ValueError(f"num_patches must be an integer of at least 1, got {num_patches!r}.")
        if self.config.partition == "grid":
            check_grid_budget(num_patches, *shape[2:])


class RegionTokenizer(RegionPartitioner):
    """Makes one token of each region."""

    def __init__(self, config: RegionTokenizerConfig) -> None:
        super().__init__(config)
        self.projection = PatchProjection(config.num_channels, config.hidden_size, config.patch_size)
        # The first row belongs to the class token, the others to the cells of the score grid.
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + config.score_grid_size**2, config.hidden_size))

    def forward(
        self, pixel_values: Tensor, num_patches: int | None = None, look: Look | None = None
    ) -> tuple[Tensor, Tensor, Regions]:
        """Tokenize a batch of images.

        Args:
            pixel_values: (B, C, H, W), floating point, normalised.
            num_patches: Token budget N. The default is `config.num_patches`.
            look: The model's method of this name, which `scorer="encoder"` needs.

        Returns:
            Tokens with their position embeddings added, (B, N, D), in the order of the regions; the position embedding
            of the class token (1, 1, D); and the regions.

        Raises:
            ValueError: See [`RegionPartitioner.check`].
        """
        # Convolutions run faster in this layout, and sampling reads whole rows of it.
        pixel_values = channels_last(pixel_values)
        regions = self.regions(pixel_values, num_patches, look)
        # A copy, because FSDP frees the table's memory after this unit.
        return self.embed(pixel_values, regions), self.position_embeddings[:, :1].clone(), regions

    def embed(self, pixel_values: Tensor, regions: Regions) -> Tensor:
        """The tokens of the regions of (B, C, H, W), with their positions added: (B, N, D)."""
        patches = sample_regions(pixel_values.to(self.projection.weight.dtype), regions, self.config.patch_size)
        return self.projection(patches) + self.positions(regions)

    def embed_grid(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, P·G, P·G), cut into plain patches -> tokens (B, G·G, D), class token's position (1, 1, D)."""
        grid_size = self.config.score_grid_size
        scores = images.new_ones(images.shape[0], grid_size, grid_size)
        regions = uniform_regions(scores, grid_size**2, *images.shape[2:])
        return self.embed(images, regions), self.position_embeddings[:, :1]

    def positions(self, regions: Regions) -> Tensor:
        """The position table averaged over every region: (B, N, D)."""
        with maybe_autocast(regions.row_edges.device.type, enabled=False):
            weights = position_weights(regions, self.config.score_grid_size, self.config.score_grid_size)
        return weights.to(self.position_embeddings.dtype) @ self.position_embeddings[0, 1:]


def channels_last(pixel_values: Tensor) -> Tensor:
    # A tensor without channels is refused later.
    return pixel_values.contiguous(memory_format=torch.channels_last) if pixel_values.dim() == 4 else pixel_values


class PatchProjection(nn.Module):
    """A linear map of flattened patches, stored as the kernel (D, C, P, P) of a ViT's patch convolution.

    This is no `nn.Conv2d`, because its input is not an image: tools that replace convolutions must leave it alone.
    """

    def __init__(self, num_channels: int, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        # Drawn as torch draws the kernel of a convolution.
        kernel = nn.Conv2d(num_channels, hidden_size, patch_size)
        self.weight, self.bias = kernel.weight, kernel.bias

    def forward(self, patches: Tensor) -> Tensor:
        """Patches (B, N, P·P·C) of [`sample_regions`] -> embeddings (B, N, D)."""
        # A patch is stored column by column with its channels last, the kernel with its channels first.
        return linear(patches, self.weight.permute(0, 3, 2, 1).flatten(1), self.bias)

    @classmethod
    def of(cls, convolution: nn.Conv2d) -> "PatchProjection":
        """A projection with the parameters of a patch convolution."""
        projection = cls(convolution.in_channels, convolution.out_channels, convolution.kernel_size[0])
        projection.weight, projection.bias = convolution.weight, convolution.bias
        return projection
