"""DartTrainer needs a model, data and an image processor; a stock Trainer with our collator works too."""

import copy

import pytest
import torch
from helpers.tiny_training import (
    NUM_LABELS,
    same_tensors,
    still_dart,
    tiny_arguments,
    tiny_dart,
    tiny_pictures,
    tiny_processor,
    tiny_trainer,
)
from transformers import Trainer, TrainingArguments

import dart_hf
from dart_hf import DartConfig, DartForImageClassification
from dart_hf.data.digits_on_photos import digits_on_photos
from dart_hf.quickstart import small_dart
from dart_hf.training import (
    DartTrainer,
    ImageClassificationCollator,
    Recipe,
    RunningScoresCallback,
    classification_accuracy,
    train_classifier,
)
from dart_hf.training.progress import LossBar, LossLines

SIDE = 32


@pytest.fixture(scope="module")
def digits():
    return digits_on_photos("train", 1, SIDE, (28, 32)), digits_on_photos("test", 1, SIDE, (28, 32))


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """A model before and after a short training, and its trainer."""
    torch.manual_seed(0)
    model, image_processor = small_dart([str(digit) for digit in range(10)], SIDE, 16)
    before = copy.deepcopy(model)
    trainer = train_classifier(
        model, image_processor, *digits, tmp_path_factory.mktemp("training"), 80, 32, disable_tqdm=True
    )
    return before, model, trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_training_lowers_the_loss(trained):
    *_, trainer = trained
    values = losses(trainer)
    assert len(values) == 8 and values[0] > 2.2
    assert values[-1] < 0.85 * values[0]
    assert trainer.evaluate()["eval_accuracy"] > 0.2


def test_training_moves_the_scorer_and_the_regions(trained, digits):
    before, after, trainer = trained
    batch = trainer.data_collator([digits[1][row] for row in range(8)])
    with torch.no_grad():
        old, new = (
            model.eval()(batch["pixel_values"], output_regions=True).regions.strip_edges for model in (before, after)
        )
    assert (old - new).abs().max() > 1
    started = dict(before.scorer.named_parameters())
    after.zero_grad()
    after.train()(**batch).loss.backward()
    for name, parameter in after.scorer.named_parameters():
        # The standardisation of scores takes out whatever the last bias adds.
        if name != "head.fc2.bias":
            moved = (parameter - started[name]).norm() / started[name].norm().clamp(min=1e-3)
            # The loss moves it, not only the decay.
            assert moved > 0.005 and parameter.grad.abs().max() > 0, name
    after.eval()


def test_seed_decides_the_training(tmp_path):
    found = []
    for seed in (0, 0, 1):
        trainer = tiny_trainer(tmp_path, max_steps=3, logging_steps=1, seed=seed)
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == found[1]
    assert found[0] != pytest.approx(found[2], rel=1e-2)


def test_no_other_setting_is_needed(tmp_path):
    trainer = dart_hf.DartTrainer(
        tiny_dart(),
        TrainingArguments(tmp_path, max_steps=2, report_to="none", use_cpu=True),
        train_dataset=tiny_pictures(9),
        eval_dataset=tiny_pictures(6),
        processing_class=tiny_processor(),
    )
    trainer.train()
    assert trainer.evaluate().keys() >= {"eval_loss", "eval_accuracy"}
    trainer.save_model()
    saved = DartForImageClassification.from_pretrained(tmp_path)
    assert same_tensors(saved.state_dict(), trainer.model.cpu().state_dict())


def test_stock_trainer_with_our_collator_trains(tmp_path):
    model = tiny_dart(score_normalization="batch")
    trainer = Trainer(
        model,
        tiny_arguments(tmp_path, max_steps=12, remove_unused_columns=False, eval_steps=12),
        train_dataset=tiny_pictures(22),
        eval_dataset=tiny_pictures(6),
        data_collator=ImageClassificationCollator(tiny_processor(), NUM_LABELS),
        processing_class=tiny_processor(),
        compute_metrics=classification_accuracy,
        callbacks=[RunningScoresCallback()],
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert trainer.evaluate()["eval_accuracy"] > 1 / 3
    assert model.config.score_normalization == "running"


@pytest.mark.parametrize(("before", "after"), [("batch", "running"), ("image", "image")])
def test_training_turns_only_the_published_normalisation_to_running(before, after, tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=2)
    trainer.model.config.score_normalization = before
    trainer.train()
    assert trainer.model.config.score_normalization == after


def test_recipe_augments_training_images_alone_and_anew_each_epoch(tmp_path):
    trainer = tiny_trainer(tmp_path, Recipe(random_erasing=1.0, horizontal_flip=0.5, mixup=0.4), eval_strategy="no")
    rows = trainer.train_dataset
    first = trainer.data_collator([rows[0], rows[1]])
    assert first["labels"].shape == (2, NUM_LABELS)
    rows.set_epoch(1)
    assert not torch.equal(trainer.data_collator([rows[0], rows[1]])["pixel_values"], first["pixel_values"])
    plain = trainer.data_collator(tiny_pictures(2))
    assert plain["labels"].tolist() == [0, 1]
    prepared = tiny_processor()([row["image"] for row in tiny_pictures(2)], return_tensors="pt")
    assert torch.equal(plain["pixel_values"], prepared["pixel_values"])


def test_epochs_reach_the_augmentation(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=-1, num_train_epochs=3, eval_strategy="no", save_strategy="no")
    epochs = []
    trainer.train_dataset.set_epoch = epochs.append
    trainer.train()
    assert list(dict.fromkeys(epochs)) == [0, 1, 2]


@pytest.mark.parametrize("mixed", [True, False])
def test_accumulated_steps_equal_whole_batches(mixed, tmp_path):
    # Plain steps, which show the scale of a gradient.
    plain = {"optim": "sgd", "max_grad_norm": 0, "max_steps": 2, "save_strategy": "no", "eval_strategy": "no"}
    plain["label_smoothing_factor"] = 0.1 if mixed else 0.0

    def train(batch_size, accumulation):
        sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        trainer = tiny_trainer(tmp_path, model=still_dart(), rows=tiny_pictures(12), **plain, **sizes)
        trainer.train()
        return trainer.model.state_dict()

    expected = train(12, 1)
    # Batches of 5, 5 and 2 images.
    for name, weights in train(5, 3).items():
        torch.testing.assert_close(weights, expected[name], atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("problem_type", "labels", "metric"),
    [
        ("multi_label_classification", [[0, 2], [], [1]], "eval_mean_average_precision"),
        ("regression", [[0.5, 1.0, 0.0], [0.1, 0.2, 0.3], [-1.0, 0.0, 2.0]], "eval_mean_absolute_error"),
    ],
)
def test_loss_and_metrics_follow_the_problem_type(problem_type, labels, metric, tmp_path):
    model = tiny_dart(problem_type=problem_type)
    rows = [{**row, "label": labels[row["label"]]} for row in tiny_pictures(22)]
    trainer = tiny_trainer(tmp_path, model=model, rows=rows, save_strategy="no", eval_strategy="no")
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert metric in after
    assert after["eval_loss"] < before["eval_loss"]
    # transformers computes the same loss.
    batch = trainer.data_collator(rows[:6])
    with torch.no_grad():
        assert after["eval_loss"] == pytest.approx(model(**batch).loss.item(), rel=1e-5)


@pytest.mark.parametrize(("setting", "half"), [("bf16_full_eval", torch.bfloat16), ("fp16_full_eval", torch.float16)])
def test_evaluation_in_half_precision_keeps_the_weights(setting, half, tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=1, eval_strategy="no", **{setting: True})
    trainer.train()
    before, seen = copy.deepcopy(trainer.model.state_dict()), []
    trainer.model.classifier.register_forward_hook(lambda module, *_: seen.append(module.weight.dtype))
    trainer.evaluate()
    trainer.predict(tiny_pictures(3))
    assert seen == [half, half]
    assert same_tensors(trainer.model.state_dict(), before) and trainer.model.dtype == torch.float32


def test_label_smoothing_without_effect_is_named_in_a_warning(tmp_path, caplog):
    smooth = tiny_arguments(tmp_path, eval_strategy="no", label_smoothing_factor=0.1)
    for own, warned in ((None, False), (list, True)):
        with caplog.at_level("WARNING", "dart_hf"):
            DartTrainer(tiny_dart(), smooth, data_collator=own, processing_class=tiny_processor())
        assert ("label_smoothing_factor has no effect with your own data_collator" in caplog.text) == warned


def test_mistakes_are_found_before_the_training(tmp_path):
    arguments, rows = tiny_arguments(tmp_path), tiny_pictures(3)
    with pytest.raises(ValueError, match="needs the model's image processor as processing_class, got NoneType"):
        DartTrainer(tiny_dart(), arguments, train_dataset=rows, eval_dataset=rows)
    with pytest.raises(ValueError, match="random_erasing must be from 0 to 1, got 2"):
        tiny_trainer(tmp_path, Recipe(random_erasing=2))
    with pytest.raises(ValueError, match="scorer"):
        tiny_trainer(tmp_path, model=tiny_dart(scorer=DartConfig().scorer, image_size=SIDE))
    several = tiny_dart(problem_type="multi_label_classification")
    with pytest.raises(ValueError, match="label smoothing need one class for each image"):
        tiny_trainer(tmp_path, model=several, label_smoothing_factor=0.1)
    several.config.problem_type = "ranking"
    with pytest.raises(ValueError, match=r"problem_type must be one of .*, got 'ranking'"):
        DartTrainer(several, arguments, eval_dataset=rows, data_collator=list)
    trainer = tiny_trainer(tmp_path, eval_strategy="no")
    trainer.train_dataset.rows[0]["label"] = 3
    with pytest.raises(ValueError, match="out of range: the model has 3 classes, so labels go from 0 to 2"):
        trainer.train()


@pytest.mark.parametrize("name", ["steps", "batch_size"])
def test_train_classifier_needs_positive_numbers(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        train_classifier(None, None, None, None, tmp_path, **{"steps": 1, "batch_size": 1, name: 0})


def test_bar_shows_the_loss_and_prints_no_dicts(tmp_path, capfd):
    trainer = tiny_trainer(tmp_path, max_steps=2, logging_steps=1, eval_steps=2)
    trainer.show_progress(LossBar())
    trainer.train()
    printed = capfd.readouterr()
    assert printed.out.startswith("step 2: accuracy ")
    assert "2/2" in printed.err and "loss=" in printed.err
    assert "{" not in printed.out + printed.err


def test_log_file_gets_few_lines(tmp_path, capfd):
    trainer = tiny_trainer(tmp_path, max_steps=30, logging_steps=1, eval_steps=1, save_strategy="no")
    trainer.show_progress(LossLines())
    trainer.train()
    lines = capfd.readouterr().err.splitlines()
    training, evaluation = ([line for line in lines if word in line] for word in (": loss ", ": accuracy "))
    assert len(training) == len(evaluation) == 10 and training[-1].startswith("step 30 of 30: loss ")
