"""Small image files."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def write_images(folder: Path, count: int, seed: int = 0) -> None:
    """Write images of noise, named 0.png, 1.png and so on."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number}.png")


def png(image: Image.Image) -> bytes:
    """The image as the content of a PNG file."""
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()
