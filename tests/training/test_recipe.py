"""Learning: the loss falls, and what is learned reaches the scorer."""

import copy

import pytest
import torch
from transformers import TrainerCallback

from dart_hf.data.digits_on_photos import digits_on_photos
from dart_hf.quickstart import small_dart
from dart_hf.training.recipe import LossBar, train_classifier

SIDE = 32


@pytest.fixture(scope="module")
def data():
    return digits_on_photos("train", 1, SIDE, (28, 32)), digits_on_photos("test", 1, SIDE, (28, 32))


class Losses(TrainerCallback):
    """Keeps every logged loss."""

    def __init__(self):
        self.values = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            self.values.append(float(logs["loss"]))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A model before and after a short training, its losses, and its trainer."""
    torch.manual_seed(0)
    model, image_processor = small_dart([str(digit) for digit in range(10)], SIDE, 16)
    before, losses = copy.deepcopy(model), Losses()
    trainer = train_classifier(
        model, image_processor, *data, tmp_path_factory.mktemp("training"), 80, 32, progress=losses, disable_tqdm=True
    )
    return before, model, losses.values, trainer


def test_training_lowers_the_loss(trained):
    *_, losses, trainer = trained
    assert len(losses) == 8
    assert losses[0] > 2.2
    assert losses[-1] < 0.85 * losses[0]
    assert trainer.evaluate()["eval_accuracy"] > 0.2


def test_training_moves_every_parameter_of_the_scorer(trained):
    before, after, *_ = trained
    started = dict(before.scorer.named_parameters())
    for name, parameter in after.scorer.named_parameters():
        # The standardisation of scores takes out whatever the last bias adds.
        if name != "head.fc2.bias":
            moved = (parameter - started[name]).norm() / started[name].norm().clamp(min=1e-3)
            assert moved > 0.005, name


def test_the_loss_and_not_only_the_decay_moves_the_scorer(trained, data):
    _, model, _, trainer = trained
    batch = trainer.data_collator([data[0][row] for row in range(8)])
    model.zero_grad()
    model.train()(**batch).loss.backward()
    assert all(
        parameter.grad.abs().max() > 0 for name, parameter in model.scorer.named_parameters() if name != "head.fc2.bias"
    )
    model.eval()


def test_the_regions_change(trained, data):
    before, after, _, trainer = trained
    pixel_values = trainer.data_collator([data[1][row] for row in range(8)])["pixel_values"]
    with torch.no_grad():
        old, new = (model.eval()(pixel_values, output_regions=True).regions for model in (before, after))
    assert (old.strip_edges - new.strip_edges).abs().max() > 1


def test_the_seed_decides_the_training(data, tmp_path):
    def losses(seed):
        torch.manual_seed(0)
        model, image_processor = small_dart([str(digit) for digit in range(10)], SIDE, 4)
        losses = Losses()
        train_classifier(
            model,
            image_processor,
            *data,
            tmp_path,
            3,
            8,
            seed=seed,
            progress=losses,
            logging_steps=1,
            disable_tqdm=True,
        )
        return losses.values

    first = losses(0)
    assert first == pytest.approx(losses(0), rel=1e-3)
    assert first != pytest.approx(losses(1), rel=1e-2)


def test_a_label_out_of_range_stops_the_training(data, tmp_path):
    model, image_processor = small_dart(["0", "1", "2"], SIDE, 4)
    with pytest.raises(ValueError, match="out of range: the model has 3 classes, so labels go from 0 to 2"):
        train_classifier(model, image_processor, *data, tmp_path, 2, 32, disable_tqdm=True)


@pytest.mark.parametrize(("name", "value"), [("steps", 0), ("batch_size", 0)])
def test_arguments_out_of_range(data, tmp_path, name, value):
    model, image_processor = small_dart(["0", "1"], SIDE, 4)
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        train_classifier(model, image_processor, *data, tmp_path, **{"steps": 1, "batch_size": 1, name: value})


def test_the_bar_shows_the_loss_and_prints_no_dicts(data, tmp_path, capfd):
    model, image_processor = small_dart([str(digit) for digit in range(10)], SIDE, 4)
    train_classifier(model, image_processor, *data, tmp_path, 2, 4, progress=LossBar(), logging_steps=1)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "2/2" in printed.err
    assert "loss=" in printed.err
    assert "{" not in printed.err


def test_fine_tuning_turns_the_published_normalisation_to_running(data, tmp_path):
    model, image_processor = small_dart([str(digit) for digit in range(10)], SIDE, 16, score_normalization="batch")
    train_classifier(model, image_processor, *data, tmp_path, 2, 8, disable_tqdm=True)
    assert model.config.score_normalization == "running"
    assert model.scorer.statistics.num_batches_tracked == 2
    model, image_processor = small_dart([str(digit) for digit in range(10)], SIDE, 16, score_normalization="image")
    train_classifier(model, image_processor, *data, tmp_path, 1, 8, disable_tqdm=True)
    assert model.config.score_normalization == "image"
