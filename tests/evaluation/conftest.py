"""Images and an image processor for the tests of evaluation."""

import io

import pytest
from datasets import Dataset
from PIL import Image
from skimage import data as photographs

from dart_hf import DartImageProcessor

IMAGES = 16
CLASSES = 7


@pytest.fixture(scope="session")
def processor() -> DartImageProcessor:
    return DartImageProcessor(size=32, crop_size=32)


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    """Parts of a photograph, some with more detail than others."""
    photograph = photographs.astronaut()
    return [Image.fromarray(photograph[row : row + 64, row // 2 : row // 2 + 64]) for row in range(0, 28 * IMAGES, 28)]


@pytest.fixture(scope="session")
def data(images) -> Dataset:
    """The images, undecoded, with labels from 0 to 6."""
    rows = []
    for number, image in enumerate(images):
        file = io.BytesIO()
        image.save(file, "PNG")
        rows.append({"image": {"bytes": file.getvalue(), "path": None}, "label": number % CLASSES})
    return Dataset.from_list(rows)


@pytest.fixture(scope="session")
def damaged(data) -> Dataset:
    """Four of the images, and a damaged one in the middle."""
    rows = data.select(range(4)).to_list()
    rows.insert(2, {"image": {"bytes": rows[2]["image"]["bytes"][:60], "path": "half.png"}, "label": 1})
    return Dataset.from_list(rows)
