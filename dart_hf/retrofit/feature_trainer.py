"""A trainer whose loss compares features of a dartified model with those of its original."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from dart_hf.retrofit.features import OriginalFeatures, feature_distance, region_features
from dart_hf.training.trainer import DartTrainer


@dataclass(frozen=True)
class FeatureWeights:
    """How much each part of the distance between student and teacher counts.

    The shares of cosine and smooth L1 are those of Theia (arXiv 2407.20179).
    """

    pooled: float = 1.0
    patches: float = 1.0
    cosine: float = 0.9
    smooth_l1: float = 0.1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 0:
                raise ValueError(f"{name}_weight must be at least 0, got {value}.")
        if not (self.pooled or self.patches) or not (self.cosine or self.smooth_l1):
            raise ValueError("The weights of the loss leave nothing to learn: all features or all distances have 0.")


class FeatureTrainer(DartTrainer):
    """[`DartTrainer`] whose loss is the distance of the student's features from those of its original.

    Args:
        original: Gives the features to learn.
        num_prefix_tokens: The number of tokens in front of the student's region tokens.
        weights: Of the parts of the loss.
    """

    # The loss is a mean over the images of one batch.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        *given: Any,
        original: OriginalFeatures,
        num_prefix_tokens: int,
        weights: FeatureWeights,
        **settings: Any,
    ) -> None:
        super().__init__(*given, **settings)
        self.original = original
        self.num_prefix_tokens = num_prefix_tokens
        self.weights = weights

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        with self.accelerator.autocast():
            wanted = self.original(inputs["teacher_pixel_values"])
        found = region_features(
            model, self.num_prefix_tokens, inputs["pixel_values"], inputs["num_patches"], wanted.patches.shape[2:]
        )
        return sum(
            getattr(self.weights, name)
            * feature_distance(getattr(found, name), getattr(wanted, name), self.weights.cosine, self.weights.smooth_l1)
            for name in found._fields
        )
