"""The average of the weights: its value, and that a training evaluates it, saves it and ends with it."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from helpers.tiny_training import KEEP_WORST, same_tensors, tiny_dart, tiny_pictures, tiny_trainer
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from dart_hf.training import Recipe, ema
from dart_hf.training.ema import EMA_FILE, WeightAverage, load_average

WEIGHTS = "model.safetensors"
SCORER = "dart.tokenizer.scorer."


def evaluation_losses(trainer):
    """Step -> the loss of its evaluation."""
    return {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}


class Weights(TrainerCallback):
    """Keeps the weights after every step."""

    def __init__(self):
        self.after_step = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after_step.append(deepcopy(model.state_dict()))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trainer that has trained with a short memory, its folder, and the weights after every step."""
    output, weights = tmp_path_factory.mktemp("ema"), Weights()
    trainer = tiny_trainer(output, Recipe(ema_decay=0.8), [weights], max_steps=9)
    trainer.train()
    return trainer, output, weights.after_step


@pytest.mark.parametrize(("warmup", "decays"), [(False, [0, 0.8, 0.8, 0.8]), (True, [0, 1 / 10, 2 / 11, 3 / 12])])
def test_average_is_exponential(warmup, decays, tmp_path):
    tiny_trainer(tmp_path)  # It sets up accelerate.
    model, expected = tiny_dart(), {}
    average = WeightAverage(model, 0.8, warmup)
    for step, decay in enumerate(decays, start=1):
        for tensor in model.state_dict().values():
            tensor.add_(step)
        new = deepcopy(model.state_dict())
        before = expected if step > 1 else new
        expected = {
            name: decay * before[name] + (1 - decay) * value if value.is_floating_point() else value
            for name, value in new.items()
        }
        average.update(step)
    average.save(tmp_path)
    torch.testing.assert_close(load_file(tmp_path / EMA_FILE), expected)


def test_training_averages_once_per_optimizer_step_including_buffers(tmp_path):
    weights = Weights()
    tiny_trainer(tmp_path, Recipe(ema_decay=0.5), [weights], max_steps=3, gradient_accumulation_steps=2).train()
    first, second, third = weights.after_step
    # The warmup's decays are 1/10 and 2/11.
    found, last = (load_file(tmp_path / "checkpoint-3" / name) for name in (EMA_FILE, WEIGHTS))
    for name in ("statistics.running_mean", "statistics.running_var", "trunk.0.1.running_mean", "head.fc1.weight"):
        name = SCORER + name
        expected = 2 / 11 * (first[name] / 10 + 9 / 10 * second[name]) + 9 / 11 * third[name]
        torch.testing.assert_close(found[name], expected)
        assert not torch.allclose(found[name], last[name]), name


def test_evaluations_run_on_the_average(trained, tmp_path):
    trainer, output, _ = trained
    found = evaluation_losses(trainer)
    assert found.keys() == {3, 6, 9}
    other = tiny_trainer(tmp_path)
    for step, loss in found.items():
        losses = {}
        for name in (WEIGHTS, EMA_FILE):
            other.model.load_state_dict(load_file(output / f"checkpoint-{step}" / name))
            losses[name] = other.evaluate()["eval_loss"]
        assert loss == losses[EMA_FILE]
        assert abs(loss - losses[WEIGHTS]) > 1e-4


def test_averaging_does_not_change_the_training(trained, tmp_path):
    _, output, after_step = trained
    alone = tiny_trainer(tmp_path, max_steps=9)
    alone.train()
    assert same_tensors(alone.model.state_dict(), after_step[-1])
    for step in (3, 6, 9):
        assert same_tensors(load_file(output / f"checkpoint-{step}" / WEIGHTS), after_step[step - 1])


def test_trained_model_is_the_latest_average(trained):
    trainer, output, _ = trained
    assert same_tensors(trainer.model.state_dict(), load_file(output / "checkpoint-9" / EMA_FILE))


def test_trained_model_is_the_best_average(tmp_path):
    trainer = tiny_trainer(tmp_path, Recipe(ema_decay=0.5), max_steps=9, **KEEP_WORST)
    trainer.train()
    losses = evaluation_losses(trainer)
    step = max(losses, key=losses.get)
    assert step < 9
    assert same_tensors(trainer.model.state_dict(), load_file(tmp_path / f"checkpoint-{step}" / EMA_FILE))
    assert trainer.evaluate()["eval_loss"] == losses[step]


def test_resumed_training_starts_from_its_average(trained, tmp_path):
    before, output, _ = trained
    trainer = tiny_trainer(tmp_path, Recipe(ema_decay=0.8), max_steps=9, eval_on_start=True)
    trainer.train(resume_from_checkpoint=output / "checkpoint-6")
    # The first of step 6 is that of the checkpoint.
    at_start = [entry.get("eval_loss") for entry in trainer.state.log_history if entry["step"] == 6]
    assert [loss for loss in at_start if loss] == [evaluation_losses(before)[6]] * 2
    assert same_tensors(trainer.model.state_dict(), before.model.state_dict())


def test_several_evaluation_sets_run_on_the_average(tmp_path):
    trainer = tiny_trainer(tmp_path, Recipe(ema_decay=0.8), max_steps=3)
    trainer.eval_dataset = {"one": tiny_pictures(6), "two": tiny_pictures(3)}
    trainer.train()
    losses = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    # The trained model is the average.
    assert losses["eval_one_loss"] == trainer.evaluate(tiny_pictures(6))["eval_loss"]
    assert losses["eval_two_loss"] == trainer.evaluate(tiny_pictures(3))["eval_loss"]


def test_failed_evaluation_restores_the_weights(tmp_path):
    weights = Weights()
    trainer = tiny_trainer(tmp_path, Recipe(ema_decay=0.8), [weights], max_steps=4, eval_steps=2)
    trainer.eval_dataset = [{}]
    with pytest.raises(ValueError, match="no column"):
        trainer.train()
    assert same_tensors(trainer.model.state_dict(), weights.after_step[1])


def test_skipped_optimizer_step_does_not_count(tmp_path):
    trainer, updates = tiny_trainer(tmp_path, Recipe(ema_decay=0.5), max_steps=2, eval_strategy="no"), []
    trainer._end_optimizer_step = lambda: updates.append(trainer.state.global_step)
    events = next(each for each in trainer.callback_handler.callbacks if type(each).__name__ == "_TrainingEvents")
    for skipped in (True, False):
        optimizer = SimpleNamespace(step_was_skipped=skipped)
        events.on_optimizer_step(None, None, None, optimizer=optimizer)
    assert updates == [0]


def test_average_stays_in_float32_under_autocast(tmp_path):
    trainer = tiny_trainer(tmp_path, Recipe(ema_decay=0.5), max_steps=3, bf16=True)
    trainer.train()
    found = load_file(tmp_path / "checkpoint-3" / EMA_FILE)
    assert same_tensors(trainer.model.state_dict(), found)
    assert all(tensor.dtype == torch.float32 for tensor in found.values() if tensor.is_floating_point())


@pytest.mark.parametrize("decay", [-0.1, 1])
def test_decay_out_of_range(decay, tmp_path):
    with pytest.raises(ValueError, match=f"ema_decay must be at least 0 and below 1, got {decay}"):
        tiny_trainer(tmp_path, Recipe(ema_decay=decay))


def test_average_that_is_missing_or_does_not_fit_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{EMA_FILE}, does not exist: resume a training that had ema_decay"):
        load_average(tiny_dart(), tmp_path)
    (tmp_path / EMA_FILE).write_bytes(bytes(20))
    with pytest.raises(ValueError, match="is damaged or another model's"):
        load_average(tiny_dart(), tmp_path)
    save_file({"weight": torch.zeros(1)}, tmp_path / EMA_FILE)
    with pytest.raises(ValueError, match="is damaged or another model's"):
        load_average(tiny_dart(), tmp_path)


@pytest.mark.parametrize("reason", ["half precision", DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_weights_that_cannot_be_averaged_are_refused(reason, tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, Recipe(ema_decay=0.5))
    message = r"needs weights in float32, got torch\.bfloat16"
    if reason == "half precision":
        trainer.model.to(torch.bfloat16)
    else:
        monkeypatch.setattr(ema, "AcceleratorState", lambda: SimpleNamespace(distributed_type=reason))
        message = f"needs all weights in every process, and {reason.value} spreads them"
    with pytest.raises(ValueError, match=message):
        trainer.train()
