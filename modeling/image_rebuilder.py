"""Rebuilder: pixel values -> an image that is rebuilt from the regions of a grid."""

from torch import Tensor

from .region_partition import Regions, check_grid_budget, grid_regions
from .region_sampling import patch_images, sample_regions
from .region_scorer import Look
from .region_tokenizer import RegionPartitioner, channels_last


class ImageRebuilder(RegionPartitioner):
    """Rebuilds an image from the regions of a grid. Busy parts of the image become larger."""

    def forward(
        self, pixel_values: Tensor, num_patches: int | None = None, look: Look | None = None
    ) -> tuple[Tensor, Regions]:
        """Rebuild images (B, C, H, W) as (B, C, P·R, P·C), from R·C regions; and return the regions.

        `look` is the model's method of this name, which `scorer="encoder"` needs.

        Raises:
            ValueError: See [`ImageRebuilder.check`].
        """
        pixel_values = channels_last(pixel_values)
        regions = self.regions(pixel_values, num_patches, look)
        return self.rebuild(pixel_values, regions), regions

    def rebuild(self, pixel_values: Tensor, regions: Regions) -> Tensor:
        """Put the regions of images (B, C, H, W) side by side, each P×P pixels: (B, C, P·R, P·C)."""
        patches = patch_images(sample_regions(pixel_values, regions, self.config.patch_size), self.config.patch_size)
        rows = regions.row_edges.shape[1] - 1
        return patches.unflatten(1, (rows, -1)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)

    def cut(self, scores: Tensor, num_patches: int, height: int, width: int) -> Regions:
        if self.config.partition == "grid":
            return grid_regions(scores, num_patches, height, width, self.config.first_strip_edge)
        return super().cut(scores, num_patches, height, width)

    def check(self, pixel_values: Tensor, num_patches: int) -> None:
        """Check as [`RegionPartitioner.check`] does, and that the budget fills a grid, with every partition."""
        super().check(pixel_values, num_patches)
        check_grid_budget(num_patches, *pixel_values.shape[2:])
