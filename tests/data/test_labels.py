"""The classes of data and model are matched by their names."""

import pytest
from timm.data import ImageNetInfo

from dart_hf.data.labels import match_labels

IMAGENET = ImageNetInfo("imagenet-1k")
# The names in a converted checkpoint: the two classes "crane" have different ones.
CONVERTED = [
    IMAGENET.index_to_description(index, detailed=name == "crane")
    for index, name in enumerate(IMAGENET.label_descriptions())
]


@pytest.mark.parametrize(
    ("data_names", "model_names", "expected"),
    [
        (["a", "b"], ["b", "c", "a"], [2, 0]),
        (["Golden_Retriever", "black-footed ferret"], ["black footed  Ferret", "golden retriever"], [1, 0]),
        (["A", "a"], ["a", "b", "A"], [2, 0]),
        (["10", "2"], [str(number) for number in range(11)], [10, 2]),
        # One side has no names.
        (["cat", "dog"], ["LABEL_0", "LABEL_1"], [0, 1]),
        (["LABEL_0", "LABEL_1"], ["cat", "dog"], [0, 1]),
        # The same list, in which a name occurs twice.
        (["crane", "dog", "crane"], ["crane", "dog", "crane"], [0, 1, 2]),
        (["0", "1", "10", *"23456789"], list("abcdefghijk"), [0, 1, 10, *range(2, 10)]),
        # ImageNet in several spellings.
        (["n03126707", "n01440764"], CONVERTED, [517, 0]),
        (IMAGENET.label_names(), CONVERTED, list(range(1000))),
        (["tench, Tinca tinca"], CONVERTED, [0]),
        (IMAGENET.label_descriptions(), CONVERTED, list(range(1000))),
    ],
)
def test_classes_are_matched_by_name(data_names, model_names, expected):
    assert match_labels(data_names, model_names) == expected


@pytest.mark.parametrize(
    ("data_names", "model_names"),
    [
        (["cat", "dog"], ["cat", "bird"]),
        (["cat", "dog"], ["LABEL_0", "LABEL_1", "LABEL_2"]),
        (["0", "1"], ["cat", "dog", "bird"]),
        (["1", "2"], ["cat", "dog"]),
        (["0", "1", "2"], ["0", "1", "5"]),
        (["A", "a"], ["a", "b"]),
        (["crane", "dog", "crane"], ["dog", "crane", "crane"]),
        (["crane"], CONVERTED),
        (["n01440764"], ["cat", "dog"]),
        ([f"class {number}" for number in range(97)] + ["x", "y", "z"], [f"class {number}" for number in range(100)]),
    ],
)
def test_classes_that_the_model_lacks_are_an_error(data_names, model_names):
    with pytest.raises(ValueError, match=r"classes .* are none of"):
        match_labels(data_names, model_names)


def test_the_error_names_the_classes_of_both():
    with pytest.raises(ValueError) as caught:
        match_labels(["cat", "dog", "cow", "hen", "pig"], ["LABEL_0", "cat"])
    assert str(caught.value) == (
        "4 of 5 classes ('dog', 'cow', 'hen', …) are none of the model's 2 ('LABEL_0', 'cat')."
    )
