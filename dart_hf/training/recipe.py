"""Recipe: augmentation, soft targets, averaging, learning rates and distillation of a training."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers.image_processing_utils import BaseImageProcessor

from dart_hf.data.batch_mixing import MixImages
from dart_hf.data.image_augmentation import training_transform


@dataclass
class Recipe:
    """Settings of [`DartTrainer`] that `TrainingArguments` does not have. The defaults change neither images nor loss.

    Label smoothing is `TrainingArguments.label_smoothing_factor`, weight decay `weight_decay`, and so on.
    """

    auto_augment: str | None = field(
        default=None,
        metadata={"help": "Augmentation policy of timm, such as rand-m9-mstd0.5-inc1 (RandAugment as in DeiT)."},
    )
    random_erasing: float = field(default=0.0, metadata={"help": "Probability of erasing a rectangle."})
    crop_scale: float | None = field(
        default=None,
        metadata={
            "help": "Smallest area of a random crop, as a share of the image; 1 crops the largest central square."
        },
    )
    horizontal_flip: float = field(default=0.0, metadata={"help": "Probability of mirroring the image."})
    color_jitter: float = field(
        default=0.0, metadata={"help": "Strength of color jitter; has no effect with auto_augment."}
    )
    repeated_augmentation: int = field(default=1, metadata={"help": "How many times each image is in a batch."})
    mixup: float = field(default=0.0, metadata={"help": "Parameter of mixup's Beta distribution; 0 turns it off."})
    cutmix: float = field(default=0.0, metadata={"help": "Parameter of cutmix's Beta distribution; 0 turns it off."})
    ema_decay: float | None = field(
        default=None,
        metadata={"help": "Average the weights with this decay; the average is evaluated and saved (DeiT: 0.99996)."},
    )
    layer_decay: float = field(
        default=1.0, metadata={"help": "Factor from the learning rate of a layer to that of the layer before it."}
    )
    scorer_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the scoring network. Default: that of the first layer."}
    )
    teacher: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a transformers classifier, or timm/NAME, to distil from."}
    )
    distillation: Literal["soft", "hard"] = field(
        default="soft", metadata={"help": "Learn the teacher's probabilities, or its answer."}
    )
    distillation_alpha: float = field(default=0.5, metadata={"help": "Share of distillation in the loss."})
    distillation_temperature: float = field(default=1.0, metadata={"help": "Temperature of soft distillation."})
    skip_unreadable: bool = field(default=False, metadata={"help": "Skip and count images that cannot be read."})

    def transform(self, image_processor: BaseImageProcessor) -> Callable[..., torch.Tensor] | None:
        """The augmentation of an image; None if training images are prepared as for evaluation.

        Raises:
            ValueError: A setting is out of range.
        """
        augmentations = (self.auto_augment, self.random_erasing, self.horizontal_flip, self.color_jitter)
        if not any(augmentations) and self.crop_scale is None:
            return None
        return training_transform(
            image_processor,
            auto_augment=self.auto_augment,
            random_erasing=self.random_erasing,
            crop_scale=1.0 if self.crop_scale is None else self.crop_scale,
            horizontal_flip=self.horizontal_flip,
            color_jitter=self.color_jitter,
        )

    def mix(self, num_labels: int, label_smoothing: float) -> MixImages | None:
        """The function that mixes a batch and smooths its labels; None if neither is asked for.

        Raises:
            ValueError: A setting is out of range.
        """
        if not (self.mixup or self.cutmix or label_smoothing):
            return None
        return MixImages(num_labels, self.mixup, self.cutmix, label_smoothing)
