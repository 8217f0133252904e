"""Calibration: the statistics are those of all images, and predictions no longer depend on the batch."""

import copy
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.tiny_models import tiny_classifier
from PIL import Image
from skimage import data as photographs

from dart_hf import DartForImageClassification, DartImageProcessor, DartModel
from dart_hf.evaluation.calibration import Calibration, calibrate_model, calibrate_scores, raw_scores
from dart_hf.hub.loading import load_model

IMAGES = 11


@pytest.fixture(scope="module")
def converted() -> DartForImageClassification:
    """A model as conversion makes it: with the published rule for scores and without running statistics."""
    return tiny_classifier()


@pytest.fixture
def model(converted) -> DartForImageClassification:
    return copy.deepcopy(converted)


@pytest.fixture(scope="module")
def processor() -> DartImageProcessor:
    return DartImageProcessor(size=32, crop_size=32)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Parts of a photograph, some with more detail than others."""
    photograph = photographs.astronaut()
    return [Image.fromarray(photograph[row : row + 64, row // 2 : row // 2 + 64]) for row in range(0, 40 * IMAGES, 40)]


@pytest.fixture(scope="module")
def images(pictures) -> Dataset:
    """The images, undecoded and without labels."""
    rows = []
    for picture in pictures:
        file = io.BytesIO()
        picture.save(file, "PNG")
        rows.append({"image": {"bytes": file.getvalue(), "path": None}})
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def pixel_values(processor, pictures) -> torch.Tensor:
    return processor(pictures, return_tensors="pt").pixel_values


def statistics_of(model) -> tuple[float, float]:
    return model.scorer.statistics.running_mean.item(), model.scorer.statistics.running_var.item()


def statistics_of_one_batch(model, pixel_values) -> tuple[float, float]:
    """The statistics after a first training step on all images together."""
    model = copy.deepcopy(model)
    model.config.score_normalization = "running"
    model.scorer.statistics.train()
    with torch.no_grad():
        model.scorer(pixel_values)
    return statistics_of(model)


@torch.no_grad()
def logits_of(model, pixel_values) -> torch.Tensor:
    return model(pixel_values).logits


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_statistics_are_those_of_one_batch(model, processor, images, pixel_values, batch_size):
    found = calibrate_scores(model.train(), processor, images, batch_size=batch_size)
    expected = statistics_of_one_batch(model, pixel_values)
    assert statistics_of(model) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert (found.mean, found.variance) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert expected[1] > 1e-3
    assert (found.num_images, found.num_cells) == (IMAGES, IMAGES * 16)
    assert (found.num_unusable, found.num_unreadable) == (0, 0)
    assert model.scorer.statistics.num_batches_tracked == -(-IMAGES // batch_size)
    assert model.config.score_normalization == "running"


def test_predictions_no_longer_depend_on_the_batch(model, processor, images, pixel_values):
    together = logits_of(model, pixel_values)
    alone = torch.cat([logits_of(model, image[None]) for image in pixel_values])
    assert (together - alone).abs().max() > 1e-2
    calibrate_scores(model, processor, images, batch_size=3)
    assert torch.allclose(logits_of(model, pixel_values), together, atol=1e-4)
    alone = torch.cat([logits_of(model, image[None]) for image in pixel_values])
    assert torch.allclose(alone, together, atol=1e-4)


def test_moments_of_parts_give_those_of_the_whole():
    """Also far from zero, where sums of squares would lose all digits."""
    logits = 1e7 + torch.randn(10, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[7:] += 5
    moments = Calibration()
    for part in logits.split([1, 4, 2, 3]):
        moments.add(part, torch.ones(len(part), dtype=torch.bool))
    assert moments.mean == pytest.approx(np.mean(logits.numpy()), rel=1e-15)
    assert moments.variance == pytest.approx(np.var(logits.numpy(), ddof=1), rel=1e-8)


def test_unusable_images_enter_no_statistics(model, pixel_values):
    spoilt = pixel_values.clone()
    spoilt[1, 0, 0, 0] = torch.nan
    spoilt[4] = torch.inf
    logits, usable = raw_scores(model.scorer, spoilt)
    assert usable.tolist() == [index not in (1, 4) for index in range(IMAGES)]
    constant = torch.zeros(1, *logits.shape[1:], dtype=torch.float64)
    with torch.inference_mode():
        model.scorer.head.fc2.weight.zero_()
        assert not raw_scores(model.scorer, pixel_values)[1].any()

    moments, expected = Calibration(), Calibration()
    moments.add(torch.cat([logits, constant]), torch.cat([usable, torch.tensor([False])]))
    expected.add(logits[usable], usable[usable])
    assert (moments.mean, moments.variance) == (expected.mean, expected.variance)
    assert (moments.num_images, moments.num_unusable) == (IMAGES - 2, 3)


def test_raw_scores_do_not_change_the_scorer(model, pixel_values):
    before = copy.deepcopy(model.state_dict())
    logits, _ = raw_scores(model.scorer, pixel_values)
    assert logits.dtype == torch.float64 and logits.shape == (IMAGES, 4, 4)
    assert model.config.score_normalization == "batch"
    assert not model.scorer.statistics._forward_hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_named_or_skipped(model, processor, images, workers):
    rows = images.to_list()
    rows.insert(3, {"image": {"bytes": rows[3]["image"]["bytes"][:60], "path": "half.png"}})
    damaged = Dataset.from_list(rows)
    with pytest.raises(OSError, match=r"^The image 'half.png' cannot be read"):
        calibrate_scores(model, processor, damaged, workers=workers)
    assert model.config.score_normalization == "batch"
    found = calibrate_scores(model, processor, damaged, skip_unreadable=True, workers=workers, batch_size=4)
    assert (found.num_images, found.num_unreadable) == (IMAGES, 1)
    expected = calibrate_scores(copy.deepcopy(model), processor, images)
    assert (found.mean, found.variance) == pytest.approx((expected.mean, expected.variance))


def test_images_without_usable_scores_are_refused(model, processor, images):
    with torch.inference_mode():
        model.scorer.head.fc2.weight.zero_()
    with pytest.raises(ValueError, match="None of the 11 images gives scores"):
        calibrate_scores(model, processor, images)
    assert model.scorer.statistics.num_batches_tracked == 0
    with pytest.raises(ValueError, match="the data has no images"):
        calibrate_scores(model, processor, images.select([]))


def test_models_that_do_not_use_their_scores_are_refused(model, processor, images):
    model.config.partition = "uniform"
    with pytest.raises(ValueError, match="partition='uniform' does not use its scores"):
        calibrate_scores(model, processor, images)
    model.config.partition = "flow"
    model.freeze_scorer()
    with pytest.raises(ValueError, match="The scorer is dead"):
        calibrate_scores(model, processor, images)


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(pictures, tmp_path) -> Path:
    """A folder of images without classes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number:02}.png")
    return folder


@pytest.mark.parametrize("kind", [DartForImageClassification, DartModel])
def test_calibrated_model_is_saved(model, processor, pixel_values, photos, tmp_path, kind):
    model = model if kind is DartForImageClassification else model.dart
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "training.json").write_text('{"steps": 7, "metrics": {"eval_accuracy": 0.5}}')
    calibrate_model(tmp_path / "model", photos, tmp_path / "calibrated", batch_size=4)
    # Without the metrics, which were measured with the old statistics.
    assert json.loads((tmp_path / "calibrated" / "training.json").read_text()) == {"steps": 7}
    loaded, loaded_processor = load_model(tmp_path / "calibrated", needs_classifier=False)
    assert isinstance(loaded, kind)
    assert loaded.config.score_normalization == "running"
    assert loaded.scorer.statistics.num_batches_tracked == 3
    assert statistics_of(loaded) == pytest.approx(statistics_of_one_batch(model, pixel_values), rel=1e-6, abs=1e-6)
    assert loaded_processor.size == processor.size
    assert {"modeling_dart.py", "preprocessor_config.json", "model.safetensors"} <= {
        path.name for path in (tmp_path / "calibrated").iterdir()
    }
    before, after = load_model(tmp_path / "model", needs_classifier=False)[0].state_dict(), loaded.state_dict()
    changed = {name.rpartition(".")[2] for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}


def test_limit_takes_images_from_everywhere(model, processor, pixel_values, photos, tmp_path):
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    found = calibrate_model(tmp_path / "model", photos, tmp_path / "calibrated", limit=3)
    assert found.num_images == 3
    expected = statistics_of_one_batch(model, pixel_values[[0, IMAGES // 3, 2 * IMAGES // 3]])
    assert (found.mean, found.variance) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_mistake_leaves_nothing(model, processor, photos, tmp_path):
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    before = set(tmp_path.iterdir())
    with pytest.raises(FileExistsError, match="model is not empty"):
        calibrate_model(tmp_path / "model", photos, tmp_path / "model")
    with pytest.raises(ValueError, match=r"has no split 'test'; it has 'train'"):
        calibrate_model(tmp_path / "model", photos, tmp_path / "out", split="test")
    photos.joinpath("00.png").write_bytes(b"nothing")
    with pytest.raises(OSError, match=r"00.png' cannot be read"):
        calibrate_model(tmp_path / "model", photos, tmp_path / "out")
    assert set(tmp_path.iterdir()) == before
