"""Predictions for image files: answers of every task, files that cannot be read, and folders."""

from pathlib import Path

import pytest
import torch
from helpers.tiny_models import tiny_classifier
from PIL import Image

from dart_hf.evaluation import Estimate, image_files, predict

LABELS = ["cup", "cat", "rocket"]


@pytest.fixture(scope="module")
def files(images, tmp_path_factory) -> list[Path]:
    """Three images; the one in the middle is damaged."""
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / name for name in ("a.png", "b.png", "c.jpg")]
    for path, image in zip(paths, images, strict=False):
        image.save(path)
    paths[1].write_bytes(paths[1].read_bytes()[:100])
    return paths


def logits_of(model, processor, path: Path) -> torch.Tensor:
    with torch.no_grad():
        return model(processor(Image.open(path), return_tensors="pt").pixel_values).logits[0]


@pytest.mark.parametrize("rule", ["batch", "image"])
def test_other_files_are_answered_if_one_cannot_be_read(processor, files, rule):
    model = tiny_classifier(LABELS, score_normalization=rule)
    first, damaged, last = predict(model, processor, files)
    assert damaged.answers == [] and damaged.error.startswith(f"Cannot read '{files[1]}' as an image: ")
    for prediction, path in ((first, files[0]), (last, files[2])):
        assert (prediction.image, prediction.error) == (str(path), None)
        expected = logits_of(model, processor, path).softmax(dim=0)
        found = {answer.label: answer.probability for answer in prediction.answers}
        assert found == pytest.approx(dict(zip(LABELS, expected.tolist(), strict=True)), abs=1e-5)
        assert list(found.values()) == sorted(found.values(), reverse=True)
    assert predict(model, processor, files[1:2])[0].error


def test_top_k_and_budget(processor, files):
    model = tiny_classifier(LABELS, score_normalization="image")
    (one,) = predict(model, processor, files[:1], top_k=1)
    (all_,) = predict(model, processor, files[:1], top_k=9)
    assert one.answers == all_.answers[:1] and len(all_.answers) == 3
    (other,) = predict(model, processor, files[:1], num_patches=2)
    assert other.answers[0].probability != pytest.approx(one.answers[0].probability, abs=1e-4)
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        predict(model, processor, files, top_k=0)


@torch.no_grad()
def test_multi_label_model_names_the_likely_labels(processor, files):
    model = tiny_classifier(LABELS, problem_type="multi_label_classification")
    model.classifier.weight.zero_()
    model.classifier.bias.copy_(torch.tensor([0.1, -2.0, 3.0]))
    (prediction,) = predict(model, processor, files[:1])
    assert list(prediction.lines()) == [str(files[0]), "   95.3%  rocket", "   52.5%  cup"]
    (prediction,) = predict(model, processor, files[:1], top_k=3)
    assert [answer.label for answer in prediction.answers] == ["rocket", "cup", "cat"]
    model.classifier.bias.fill_(-1)
    (prediction,) = predict(model, processor, files[:1])
    assert list(prediction.lines()) == [str(files[0]), "no label above 50%"]


def test_regression_gives_numbers(processor, files):
    model = tiny_classifier(["age"], problem_type="regression")
    value = logits_of(model, processor, files[0]).item()
    (prediction,) = predict(model, processor, files[:1])
    assert prediction.answers == [Estimate("age", pytest.approx(value, abs=1e-5))]
    assert list(prediction.lines())[1] == f"{value:10.5g}  age"


def test_folders_stand_for_the_images_below_them(files, tmp_path):
    for name in ("below/deep", "empty"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("below/deep/z.JPG", "below/a.png", "below/notes.txt", "below/.hidden.png"):
        (tmp_path / name).touch()
    found = image_files([files[0], tmp_path / "below"])
    assert found == [files[0], tmp_path / "below/a.png", tmp_path / "below/deep/z.JPG"]
    with pytest.raises(FileNotFoundError, match="There is no image file or folder 'none'"):
        image_files(["none"])
    with pytest.raises(ValueError, match="empty' has no images"):
        image_files([tmp_path / "empty"])
