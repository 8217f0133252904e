"""Small handwritten digits on photographs: real images that come with installed packages, without a download.

The digits are scikit-learn's (1,797 scans of 8×8 pixels). The photographs are scikit-image's, darkened so that the
digit is the brightest part of an image.
"""

import io
from typing import Literal

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Sequence, Value
from PIL import Image as PILImage

from dart_hf.environment import require_packages

# The photographs in the scikit-image package itself; it would download others.
PHOTOGRAPHS = ("astronaut", "brick", "camera", "chelsea", "coffee", "grass", "gravel", "rocket")
PHOTOGRAPH_BRIGHTNESS = 0.5
NUM_TEST_DIGITS = 360
# A pixel counts as part of the digit, and of its box, if the pen covers this much of it.
STROKE = 0.25

FEATURES = Features(
    {
        "image": Image(),
        "label": ClassLabel(names=[str(digit) for digit in range(10)]),
        "box": Sequence(Value("float32"), length=4),
        "digit": Value("int32"),
    }
)


def digits_on_photos(
    split: Literal["train", "test"],
    placements: int,
    image_size: int = 112,
    digit_sizes: tuple[int, int] = (28, 48),
    seed: int = 0,
) -> Dataset:
    """Paste every digit of a split `placements` times, at random sizes and places on random photograph crops.

    Train and test share no digit and no piece of photograph: training pictures are cut from the left halves of the
    photographs, test pictures from the right halves. The same arguments give the same pictures.

    Args:
        split: `"train"` (1,437 digits) or `"test"` (360 digits, with equally many of each class as far as possible).
        placements: Number of pictures of each digit.
        image_size: Side of the pictures in pixels.
        digit_sizes: Smallest and largest side in pixels to which the 8×8 scan is enlarged.
        seed: The seed of the placements. The digits of a split do not depend on it.

    Returns:
        Columns `image` (RGB), `label` (0 to 9), `box` (the strokes of the digit: x0, y0, x1, y1 in pixels) and `digit`
        (the number of the original scan).

    Raises:
        ValueError: An argument is out of range.
        ImportError: scikit-image or scikit-learn is not installed.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}.")
    if placements < 1:
        raise ValueError(f"placements must be at least 1, got {placements}.")
    smallest, largest = digit_sizes
    if not 8 <= smallest <= largest <= image_size:
        raise ValueError(
            f"digit_sizes must be two growing numbers from 8 to image_size={image_size}, got {smallest} and {largest}."
        )
    require_packages("Pasting digits on photographs", "quickstart", "skimage", "sklearn")
    from sklearn.datasets import load_digits

    scans = load_digits()
    photographs = [_half_photograph(name, split, image_size) for name in PHOTOGRAPHS]
    digits = np.tile(_digits_of_split(scans.target, split), placements)
    rng = np.random.default_rng([seed, ("train", "test").index(split)])

    images, boxes = [], []
    for digit in digits:
        pixels, box = _paste(scans.images[digit] / 16, photographs, image_size, digit_sizes, rng)
        images.append({"bytes": _jpeg(pixels), "path": None})
        boxes.append(box)
    columns = {"image": images, "label": scans.target[digits], "box": boxes, "digit": digits}
    return Dataset.from_dict(columns, features=FEATURES)


def _digits_of_split(labels: np.ndarray, split: str) -> np.ndarray:
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(np.arange(len(labels)), test_size=NUM_TEST_DIGITS, stratify=labels, random_state=0)
    return train if split == "train" else test


def _half_photograph(name: str, split: str, image_size: int) -> np.ndarray:
    """The split's half of a photograph, darkened, enlarged where a crop of `image_size` would not fit: (H, W, 3)."""
    import skimage.data

    photograph = PILImage.fromarray(getattr(skimage.data, name)()).convert("RGB")
    width, height = photograph.size
    half = photograph.crop((0, 0, width // 2, height) if split == "train" else (width // 2, 0, width, height))
    scale = max(1.0, image_size / min(half.size))
    half = half.resize((round(half.width * scale), round(half.height * scale)), PILImage.Resampling.BICUBIC)
    return (np.asarray(half) * PHOTOGRAPH_BRIGHTNESS).astype(np.uint8)


def _paste(
    scan: np.ndarray,
    photographs: list[np.ndarray],
    image_size: int,
    digit_sizes: tuple[int, int],
    rng: np.random.Generator,
) -> tuple[np.ndarray, list[int]]:
    """A picture (image_size, image_size, 3) with the scan (8, 8; 1 is ink) in white on it, and the digit's box."""
    photograph = photographs[rng.integers(len(photographs))]
    top, left = (rng.integers(side - image_size, endpoint=True) for side in photograph.shape[:2])
    picture = photograph[top : top + image_size, left : left + image_size].copy()

    side = int(rng.integers(*digit_sizes, endpoint=True))
    enlarged = PILImage.fromarray((scan * 255).astype(np.uint8)).resize((side, side), PILImage.Resampling.BICUBIC)
    ink = np.asarray(enlarged)[:, :, None] / 255
    top, left = rng.integers(image_size - side, endpoint=True, size=2).tolist()
    background = picture[top : top + side, left : left + side]
    picture[top : top + side, left : left + side] = background + (255 - background) * ink

    rows, columns, _ = np.nonzero(ink > STROKE)
    box = [left + columns.min(), top + rows.min(), left + columns.max() + 1, top + rows.max() + 1]
    return picture, [int(edge) for edge in box]


def _jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()
