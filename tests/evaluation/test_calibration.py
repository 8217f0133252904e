"""Calibration: the statistics are those of all images, and predictions no longer depend on the batch."""

import copy
import json

import numpy as np
import pytest
import torch
from helpers.tiny_models import tiny_classifier

from dart_hf import DartForImageClassification, DartModel
from dart_hf.evaluation.calibration import Calibration, calibrate_model, calibrate_scores, raw_scores
from dart_hf.hub.loading import load_model


@pytest.fixture
def model() -> DartForImageClassification:
    """A model as conversion makes it: with the published rule for scores and without running statistics."""
    return tiny_classifier()


@pytest.fixture(scope="module")
def pixel_values(processor, images) -> torch.Tensor:
    return processor(images, return_tensors="pt").pixel_values


@pytest.fixture
def folders(model, processor, images, tmp_path):
    """The folder of the model, and a folder of the images without classes."""
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "photos").mkdir()
    for number, image in enumerate(images):
        image.save(tmp_path / "photos" / f"{number:02}.png")
    return tmp_path / "model", tmp_path / "photos"


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


@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_statistics_are_those_of_one_batch(model, processor, data, pixel_values, batch_size):
    found = calibrate_scores(model.train(), processor, data, batch_size=batch_size)
    expected = statistics_of_one_batch(model, pixel_values)
    for statistics in (statistics_of(model), (found.mean, found.variance)):
        assert statistics == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert expected[1] > 1e-3
    assert (found.num_images, found.num_cells, found.num_unusable, found.num_unreadable) == (16, 16 * 16, 0, 0)
    assert model.scorer.statistics.num_batches_tracked == -(-16 // batch_size)
    assert model.config.score_normalization == "running"


@torch.no_grad()
def test_predictions_no_longer_depend_on_the_batch(model, processor, data, pixel_values):
    def alone() -> torch.Tensor:
        return torch.cat([model(image[None]).logits for image in pixel_values])

    together = model(pixel_values).logits
    assert (together - alone()).abs().max() > 1e-2
    calibrate_scores(model, processor, data, batch_size=3)
    for found in (model(pixel_values).logits, alone()):
        assert torch.allclose(found, together, atol=1e-4)


def test_moments_of_parts_give_those_of_the_whole():
    """Also far from zero, where sums of squares would lose all digits."""
    logits = 1e7 + torch.randn(10, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[7:] += 5
    moments = Calibration()
    for part in logits.split([1, 4, 2, 3]):
        moments.add(part, torch.ones(len(part), dtype=torch.bool))
    assert moments.mean == pytest.approx(np.mean(logits.numpy()), rel=1e-15)
    assert moments.variance == pytest.approx(np.var(logits.numpy(), ddof=1), rel=1e-8)


@torch.inference_mode()
def test_unusable_images_enter_no_statistics(model, pixel_values):
    spoilt = pixel_values.clone()
    spoilt[1, 0, 0, 0] = torch.nan
    spoilt[4] = torch.inf
    logits, usable = raw_scores(model, spoilt)
    assert logits.dtype == torch.float64 and logits.shape == (16, 4, 4)
    assert usable.tolist() == [index not in (1, 4) for index in range(16)]
    assert model.config.score_normalization == "batch" and not model.scorer.statistics._forward_hooks
    model.scorer.head.fc2.weight.zero_()
    assert not raw_scores(model, pixel_values)[1].any()

    moments, expected = Calibration(), Calibration()
    constant = torch.zeros(1, *logits.shape[1:], dtype=torch.float64)
    moments.add(torch.cat([logits, constant]), torch.cat([usable, torch.tensor([False])]))
    expected.add(logits[usable], usable[usable])
    assert (moments.mean, moments.variance) == (expected.mean, expected.variance)
    assert (moments.num_images, moments.num_unusable) == (14, 3)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_named_or_skipped(model, processor, damaged, workers):
    with pytest.raises(OSError, match=r"^The image 'half.png' cannot be read"):
        calibrate_scores(model, processor, damaged, workers=workers)
    assert model.config.score_normalization == "batch"
    found = calibrate_scores(model, processor, damaged, skip_unreadable=True, workers=workers, batch_size=3)
    assert (found.num_images, found.num_unreadable) == (4, 1)
    expected = calibrate_scores(copy.deepcopy(model), processor, damaged.select([0, 1, 3, 4]))
    assert (found.mean, found.variance) == pytest.approx((expected.mean, expected.variance))


def test_images_or_models_without_usable_scores_are_refused(model, processor, data):
    with pytest.raises(ValueError, match="the data has no images"):
        calibrate_scores(model, processor, data.select([]))
    model.config.partition = "uniform"
    with pytest.raises(ValueError, match="partition='uniform' does not use its scores"):
        calibrate_scores(model, processor, data)
    model.config.partition = "flow"
    with torch.inference_mode():
        model.scorer.head.fc2.weight.zero_()
    with pytest.raises(ValueError, match="None of the 16 images gives scores"):
        calibrate_scores(model, processor, data)
    assert model.scorer.statistics.num_batches_tracked == 0
    model.freeze_scorer()
    with pytest.raises(ValueError, match="The scorer is dead"):
        calibrate_scores(model, processor, data)


@pytest.mark.parametrize(("kind", "limit"), [(DartForImageClassification, None), (DartModel, 3)])
def test_calibrated_model_is_saved(model, folders, pixel_values, tmp_path, kind, limit):
    """Without the old metrics. A limited number of images is taken from everywhere."""
    source, photos = folders
    if kind is DartModel:
        model.dart.save_pretrained(source)
        pixel_values = pixel_values[[0, 16 // 3, 2 * 16 // 3]]
    else:
        (source / "training.json").write_text('{"steps": 7, "metrics": {"eval_accuracy": 0.5}}')
    found = calibrate_model(source, photos, tmp_path / "calibrated", batch_size=4, limit=limit)
    assert found.num_images == len(pixel_values)
    record = tmp_path / "calibrated" / "training.json"
    assert not record.exists() if kind is DartModel else json.loads(record.read_text()) == {"steps": 7}
    loaded, _ = load_model(tmp_path / "calibrated", needs_classifier=False)
    assert isinstance(loaded, kind) and loaded.config.score_normalization == "running"
    assert statistics_of(loaded) == pytest.approx(statistics_of_one_batch(model, pixel_values), rel=1e-5, abs=1e-6)
    before, after = load_model(source, needs_classifier=False)[0].state_dict(), loaded.state_dict()
    changed = {name.rpartition(".")[2] for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}
    preprocessor = [(folder / "preprocessor_config.json").read_text() for folder in (source, tmp_path / "calibrated")]
    assert preprocessor[0] == preprocessor[1]


def test_mistake_leaves_nothing(folders, tmp_path):
    source, photos = folders
    with pytest.raises(FileExistsError, match="model is not empty"):
        calibrate_model(source, photos, source)
    with pytest.raises(ValueError, match=r"has no split 'test'; it has 'train'"):
        calibrate_model(source, photos, tmp_path / "out", split="test")
    photos.joinpath("00.png").write_bytes(b"nothing")
    with pytest.raises(OSError, match=r"00.png' cannot be read"):
        calibrate_model(source, photos, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "photos"}
