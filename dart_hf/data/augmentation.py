"""Augmentation: what is random about a training batch, and where the random numbers come from.

The numbers are drawn from one that each row carries, so that a batch is the same after a resume, whatever else draws
random numbers. The augmentations are timm's and torchvision's.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count, islice
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
from timm.data import create_transform
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import to_pil_image
from transformers import BaseImageProcessor, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dart_hf.modeling.image_processing_dart import DartImageProcessor

AUGMENTATION_SEED = "augmentation_seed"
# A stream is augmented repeatedly in pieces of this many rows, so that the copies of one image lie apart.
STREAM_PIECE = 64
SHUFFLE_BUFFER = 1000


# Rows -------------------------------------------------------------------------------------------------------------


class SeededRows(torch.utils.data.Dataset):
    """Rows of a data set, each with the number that decides its augmentation, `row["augmentation_seed"]`.

    The number follows from the seed, the epoch and the row. With `repeats` above 1 the augmentation is repeated
    (arXiv 1901.09335, as in DeiT): a batch of B rows holds B / repeats images, each that many times with other numbers,
    and an epoch has as many rows as before. timm has a sampler for that; `Trainer` takes data sets and no sampler.

    Stock `Trainer` takes it as `train_dataset`, with [`EpochCallback`] among its callbacks.

    Args:
        rows: A map-style data set, or a list, whose rows are dicts.
        seed: Of all the numbers.
        repeats: How often an image is in a batch.
    """

    def __init__(self, rows: Sequence[dict[str, Any]] | datasets.Dataset, seed: int = 0, repeats: int = 1) -> None:
        _check_repeats(repeats)
        self.rows = rows
        self.seed = seed
        self.repeats = repeats
        # Shared with worker processes that live longer than an epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The rows of a batch; PyTorch's loader asks for all of them at once."""
        distinct = list(indices)[: -(-len(indices) // self.repeats)]
        whole = getattr(self.rows, "__getitems__", lambda indices: [self.rows[index] for index in indices])
        rows = list(zip(distinct, whole(distinct), strict=True))
        # Copies of an image lie apart: mixup and cutmix pair neighbours.
        copies = [
            {**row, AUGMENTATION_SEED: combined_seed(self.seed, int(self._epoch), index, copy)}
            for copy in range(self.repeats)
            for index, row in rows
        ]
        return copies[: len(indices)]


class SeededStream(torch.utils.data.IterableDataset):
    """[`SeededRows`] of a stream, shuffled a buffer at a time, that begins again whenever it ends.

    For `Trainer`, which gets `max_steps`, it is a single epoch, so that a resumed training skips to the right row. With
    several worker processes each has its own numbers.

    Args:
        rows: A streaming data set whose rows are dicts.
        seed, repeats: As in [`SeededRows`].
        shuffle_buffer: How many rows to shuffle among; a stream that is sorted by class needs many.
    """

    def __init__(
        self, rows: datasets.IterableDataset, seed: int = 0, repeats: int = 1, shuffle_buffer: int = SHUFFLE_BUFFER
    ) -> None:
        _check_repeats(repeats)
        self.rows = rows.shuffle(seed=seed, buffer_size=shuffle_buffer)
        self.seed = seed
        self.repeats = repeats

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        worker_id = 0 if worker is None else worker.id
        for times in count():
            self.rows.set_epoch(times)
            numbered = enumerate(self.rows)
            piece = list(islice(numbered, STREAM_PIECE))
            if not piece:
                return
            while piece:
                for copy in range(self.repeats):
                    for index, row in piece:
                        yield {**row, AUGMENTATION_SEED: combined_seed(self.seed, times, worker_id, index, copy)}
                piece = list(islice(numbered, STREAM_PIECE))


class EpochCallback(TrainerCallback):
    """Tells [`SeededRows`] which epoch it is: accelerate does so on a single process alone."""

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: torch.utils.data.DataLoader | None = None,
        **kwargs: Any,
    ) -> None:
        set_epoch = getattr(getattr(train_dataloader, "dataset", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(int(state.epoch))


def _check_repeats(repeats: int) -> None:
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}.")


def combined_seed(*numbers: int) -> int:
    """A seed that follows from all of the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let Python's, NumPy's and PyTorch's global random numbers follow from `seed` inside, and go on as before after.

    timm's augmentations draw from the first two, torchvision's from the last.
    """
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(pytorch)


# One image --------------------------------------------------------------------------------------------------------


def training_transform(
    image_processor: BaseImageProcessor,
    auto_augment: str | None = None,
    random_erasing: float = 0.0,
    crop_scale: float = 1.0,
    horizontal_flip: float = 0.5,
    color_jitter: float = 0.0,
) -> Callable[[PIL.Image.Image], torch.Tensor]:
    """timm's training transform with the size, mean and standard deviation of an image processor.

    Args:
        image_processor: Must crop (`crop_size`) and normalise.
        auto_augment: timm's name of a policy, such as "rand-m9-mstd0.5-inc1" (RandAugment as in DeiT).
        random_erasing: Probability of erasing a rectangle, filled with noise.
        crop_scale: Smallest share of an image's area in a random crop. With 1 the crop is the largest central square.
        horizontal_flip: Probability of a mirror image.
        color_jitter: Strength of random brightness, contrast and saturation; without effect beside `auto_augment`.

    Returns:
        A function of a PIL image that gives (3, H, W), normalised.

    Raises:
        ValueError: A probability or share is out of range, or `auto_augment` is no policy of timm's.
    """
    shares = {"random_erasing": random_erasing, "horizontal_flip": horizontal_flip, "color_jitter": color_jitter}
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be from 0 to 1, got {value}.")
    if not 0 < crop_scale <= 1:
        raise ValueError(f"crop_scale must be above 0 and at most 1, got {crop_scale}.")
    size = image_processor.crop_size
    try:
        augment = create_transform(
            (3, size["height"], size["width"]),
            is_training=True,
            auto_augment=auto_augment,
            re_prob=random_erasing,
            re_mode="pixel",
            scale=(crop_scale, 1.0),
            # Crops of another shape than the image's are smaller than the image.
            ratio=(3 / 4, 4 / 3) if crop_scale < 1 else (1.0, 1.0),
            hflip=horizontal_flip,
            color_jitter=color_jitter,
            interpolation="bicubic",
            mean=tuple(image_processor.image_mean),
            std=tuple(image_processor.image_std),
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(
            f"auto_augment={auto_augment!r} is no policy of timm's such as 'rand-m9-mstd0.5-inc1'."
        ) from error
    return v2.Compose([as_rgb, augment])


def as_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Any image as RGB in 8 bits, read as [`DartImageProcessor`] reads it: on white where it is transparent."""
    if image.mode == "RGB":
        return image
    pixels = DartImageProcessor().process_image(
        image, do_convert_rgb=True, do_rescale=True, rescale_factor=1 / 255, do_normalize=True
    )
    return to_pil_image(pixels.round().to(torch.uint8))


# A batch ----------------------------------------------------------------------------------------------------------


class MixImages:
    """Mixup (arXiv 1710.09412) or cutmix (arXiv 1905.04899) of a batch by torchvision, and smoothed targets.

    Args:
        num_labels: How many classes there are.
        mixup, cutmix: Parameters of their Beta distributions; 0 for none. Where both are given, each has every other
            batch on average.
        label_smoothing: Share of each target that is spread over all classes.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, num_labels: int, mixup: float = 0.0, cutmix: float = 0.0, label_smoothing: float = 0.0) -> None:
        for name, value in (("mixup", mixup), ("cutmix", cutmix)):
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}.")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}.")
        self.num_labels = num_labels
        self.label_smoothing = label_smoothing
        mixes = [
            kind(alpha=alpha, num_classes=num_labels)
            for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix))
            if alpha
        ]
        self.mix = v2.RandomChoice(mixes) if mixes else None

    def __call__(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix (B, C, H, W) with its neighbours in the batch; labels (B,) -> targets (B, num_labels) of float32."""
        if self.mix is None:
            targets = nn.functional.one_hot(labels, self.num_labels).float()
        else:
            pixel_values, targets = self.mix(pixel_values, labels)
        return pixel_values, targets * (1 - self.label_smoothing) + self.label_smoothing / self.num_labels
