"""The quickstart's data set: digits where their boxes say, on photographs, without an overlap of train and test."""

import numpy as np
import pytest
from datasets import ClassLabel, Image
from sklearn.datasets import load_digits

from dart_hf.data.digits_on_photos import NUM_TEST_DIGITS, digits_on_photos

SIDE = 64
SIZES = (20, 32)


@pytest.fixture(scope="module")
def train():
    return digits_on_photos("train", 1, SIDE, SIZES)


@pytest.fixture(scope="module")
def test():
    return digits_on_photos("test", 2, SIDE, SIZES)


def test_train_and_test_share_no_digit_and_use_all(train, test):
    learned, tested = set(train["digit"]), set(test["digit"])
    assert not learned & tested
    assert learned | tested == set(range(len(load_digits().target)))
    assert len(tested) == NUM_TEST_DIGITS
    counts = np.bincount(test["label"])
    assert len(counts) == 10 and counts.max() - counts.min() <= 4


def test_rows_have_an_image_and_the_class_of_the_scan(train, test):
    assert isinstance(train.features["image"], Image) and isinstance(train.features["label"], ClassLabel)
    assert test.features == train.features
    assert {(image.size, image.mode) for image in train[:20]["image"]} == {((SIDE, SIDE), "RGB")}
    for data in (train, test):
        np.testing.assert_array_equal(data["label"], load_digits().target[data["digit"]])


def test_the_box_has_the_scan_brighter_than_the_photograph_around_it(test):
    scans = load_digits().images / 16
    for row in test.select(range(20)):
        x0, y0, x1, y1 = (int(edge) for edge in row["box"])
        assert 0 <= x0 < x1 <= SIDE and 0 <= y0 < y1 <= SIDE and max(x1 - x0, y1 - y0) <= SIZES[1]
        scan = scans[row["digit"]]
        rows, columns = np.nonzero(scan > 0.25)
        strokes = scan[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        shown = row["image"].crop((x0, y0, x1, y1)).convert("L").resize(strokes.shape[::-1])
        assert np.corrcoef(np.asarray(shown, dtype=float).ravel(), strokes.ravel())[0, 1] > 0.8
        pixels, outside = np.asarray(row["image"]), np.ones((SIDE, SIDE), dtype=bool)
        outside[max(0, y0 - 4) : y1 + 4, max(0, x0 - 4) : x1 + 4] = False
        assert pixels[outside].max() < 160 < pixels[y0:y1, x0:x1].max()
        assert pixels[outside].std() > 0


def test_the_seed_decides_the_pictures_but_not_the_split(test):
    again, other = (digits_on_photos("test", 2, SIDE, SIZES, seed=seed) for seed in (0, 1))
    assert again[5]["image"].tobytes() == test[5]["image"].tobytes() != other[5]["image"].tobytes()
    assert again["box"][:] == test["box"][:] and other["digit"][:] == test["digit"][:]
    boxes = np.array(test["box"])
    assert len(np.unique(boxes, axis=0)) > 0.95 * len(boxes)
    # Pictures may be larger than a photograph.
    assert digits_on_photos("test", 1, image_size=480, digit_sizes=SIZES)[0]["image"].size == (480, 480)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "validation"}, "split must be 'train' or 'test', got 'validation'"),
        ({"placements": 0}, "placements must be at least 1, got 0"),
        ({"digit_sizes": (20, 65)}, "digit_sizes .* image_size=64, got 20 and 65"),
        ({"digit_sizes": (30, 20)}, "digit_sizes .* got 30 and 20"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        digits_on_photos(**{"split": "train", "placements": 1, "image_size": SIDE, "digit_sizes": SIZES, **arguments})
