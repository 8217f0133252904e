"""The average of the weights: what it is, and that it is what a training evaluates, saves and ends with."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from helpers.tiny_training import same_tensors, tiny_dart, tiny_trainer
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from dart_hf.training import ema as averaging
from dart_hf.training.checkpoints import CompleteCheckpointCallback
from dart_hf.training.ema import EMA_FILE, EmaCallback, load_average

WEIGHTS = "model.safetensors"
SCORER = "dart.tokenizer.scorer."


def copied(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def evaluation_losses(trainer):
    """Step -> the loss of its evaluation."""
    return {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}


class Weights(TrainerCallback):
    """Keeps the weights as they are after every step; given before an [`EmaCallback`]."""

    def __init__(self):
        self.after_step = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after_step.append(copied(model))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trainer that has trained with a short memory, its folder, and the weights after every step."""
    output, weights = tmp_path_factory.mktemp("averaging"), Weights()
    trainer = tiny_trainer(output, [weights, EmaCallback(0.8)], max_steps=9)
    trainer.train()
    return trainer, output, weights.after_step


@pytest.mark.parametrize(
    ("warmup", "decays"),
    [(False, [0, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8]), (True, [0, 1 / 10, 2 / 11, 3 / 12, 0.3, 0.3, 0.3])],
)
def test_the_average_is_exponential_once_a_step(warmup, decays, tmp_path):
    weights = Weights()
    decay = max(decays)
    trainer = tiny_trainer(
        tmp_path, [weights, EmaCallback(decay, warmup)], max_steps=7, save_steps=7, gradient_accumulation_steps=2
    )
    trainer.train()
    expected = weights.after_step[0]
    for step_decay, after_step in zip(decays, weights.after_step, strict=True):
        expected = {
            name: step_decay * expected[name] + (1 - step_decay) * value if value.is_floating_point() else value
            for name, value in after_step.items()
        }
    found = load_file(tmp_path / "checkpoint-7" / EMA_FILE)
    torch.testing.assert_close(found, expected)
    last = load_file(tmp_path / "checkpoint-7" / WEIGHTS)
    for name in ("statistics.running_mean", "statistics.running_var", "trunk.0.1.running_mean", "head.fc1.weight"):
        assert not torch.allclose(found[SCORER + name], last[SCORER + name]), name


def test_evaluations_are_of_the_average(trained, tmp_path):
    trainer, output, _ = trained
    found = evaluation_losses(trainer)
    assert found.keys() == {3, 6, 9}
    for step, loss in found.items():
        losses = {}
        for name in (WEIGHTS, EMA_FILE):
            other = tiny_trainer(tmp_path, [])
            other.model.load_state_dict(load_file(output / f"checkpoint-{step}" / name))
            losses[name] = other.evaluate()["eval_loss"]
        assert loss == losses[EMA_FILE]
        assert abs(loss - losses[WEIGHTS]) > 1e-4


def test_training_goes_on_with_the_weights_as_trained(trained, tmp_path):
    _, output, after_step = trained
    alone = tiny_trainer(tmp_path, [], max_steps=9)
    alone.train()
    assert same_tensors(alone.model.state_dict(), after_step[-1])
    for step in (3, 6, 9):
        assert same_tensors(load_file(output / f"checkpoint-{step}" / WEIGHTS), after_step[step - 1])


def test_the_trained_model_is_the_latest_average(trained):
    trainer, output, _ = trained
    assert same_tensors(trainer.model.state_dict(), load_file(output / "checkpoint-9" / EMA_FILE))
    # An evaluation after the training leaves it alone.
    trainer.evaluate()
    assert same_tensors(trainer.model.state_dict(), load_file(output / "checkpoint-9" / EMA_FILE))


def test_the_trained_model_is_the_best_average(tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = tiny_trainer(tmp_path, [EmaCallback(0.5)], max_steps=9, **best)
    trainer.train()
    losses = evaluation_losses(trainer)
    step = max(losses, key=losses.get)
    assert step < 9
    assert same_tensors(trainer.model.state_dict(), load_file(tmp_path / f"checkpoint-{step}" / EMA_FILE))
    assert trainer.evaluate()["eval_loss"] == losses[step]


def test_a_resumed_training_evaluates_its_average_at_the_start(trained, tmp_path):
    before, output, _ = trained
    callback = EmaCallback(0.8, resume_from=output / "checkpoint-6")
    trainer = tiny_trainer(tmp_path, [callback], max_steps=9, eval_on_start=True)
    trainer.train(resume_from_checkpoint=str(output / "checkpoint-6"))
    at_start = [
        entry["eval_loss"] for entry in trainer.state.log_history if entry["step"] == 6 and "eval_loss" in entry
    ]
    assert at_start == [evaluation_losses(before)[6]] * 2
    assert same_tensors(trainer.model.state_dict(), before.model.state_dict())


def test_an_evaluation_that_fails_does_not_mix_up_the_weights(tmp_path):
    weights = Weights()
    trainer = tiny_trainer(tmp_path, [weights, EmaCallback(0.8)], max_steps=4, eval_steps=2)
    pictures, trainer.eval_dataset = trainer.eval_dataset, [{}]
    with pytest.raises(ValueError, match="no column"):
        trainer.train()
    trainer.eval_dataset = pictures

    seen = []
    trainer.add_callback(
        type("Begin", (TrainerCallback,), {"on_train_begin": lambda *_, model, **__: seen.append(copied(model))})
    )
    trainer.train()
    assert same_tensors(seen[0], weights.after_step[1])


def test_a_step_that_was_skipped_does_not_count(tmp_path):
    model, callback = tiny_dart(), EmaCallback(0.5)
    args, state = SimpleNamespace(eval_on_start=False), SimpleNamespace(global_step=0)
    tiny_trainer(tmp_path, [])  # It sets up accelerate.
    callback.on_train_begin(args, state, None, model=model)
    before = model.classifier.weight.detach().clone()
    model.classifier.weight.data.fill_(1)
    callback.on_optimizer_step(args, state, None, model=model, optimizer=SimpleNamespace(step_was_skipped=True))
    torch.testing.assert_close(callback._average.module.classifier.weight, before)
    callback.on_optimizer_step(args, state, None, model=model, optimizer=SimpleNamespace(step_was_skipped=False))
    assert (callback._average.module.classifier.weight == 1).all()


def test_autocast_keeps_the_average_in_float32(tmp_path):
    trainer = tiny_trainer(tmp_path, [EmaCallback()], max_steps=3, bf16=True)
    trainer.train()
    found = load_file(tmp_path / "checkpoint-3" / EMA_FILE)
    assert same_tensors(trainer.model.state_dict(), found)
    assert all(tensor.dtype == torch.float32 for tensor in found.values() if tensor.is_floating_point())


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [-0.1, 1])
def test_a_decay_out_of_range(decay):
    with pytest.raises(ValueError, match=f"decay must be at least 0 and below 1, got {decay}"):
        EmaCallback(decay)


def test_resuming_without_an_average(tmp_path):
    tiny_trainer(tmp_path, [], max_steps=3).train()
    with pytest.raises(FileNotFoundError, match=f"checkpoint-3/{EMA_FILE}, does not exist: resume a training that had"):
        tiny_trainer(tmp_path, [EmaCallback()]).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("damage", ["cut", "another model's"])
def test_an_average_that_does_not_fit(damage, tmp_path):
    if damage == "cut":
        (tmp_path / EMA_FILE).write_bytes(bytes(20))
    else:
        save_file({"weight": torch.zeros(1)}, tmp_path / EMA_FILE)
    with pytest.raises(ValueError, match="is damaged or another model's"):
        load_average(tiny_dart(), tmp_path)


def test_several_evaluation_sets_are_refused(tmp_path):
    trainer = tiny_trainer(tmp_path, [EmaCallback()])
    trainer.eval_dataset = {"one": trainer.eval_dataset, "two": trainer.eval_dataset}
    with pytest.raises(ValueError, match="eval_dataset must be one data set, not a dictionary"):
        trainer.train()


def test_weights_in_half_precision_are_refused(tmp_path):
    trainer = tiny_trainer(tmp_path, [EmaCallback()])
    trainer.model.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"needs weights in float32, got torch\.bfloat16"):
        trainer.train()


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_weights_spread_over_processes_are_refused(kind, tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, [EmaCallback()])
    monkeypatch.setattr(averaging, "AcceleratorState", lambda: SimpleNamespace(distributed_type=kind))
    with pytest.raises(ValueError, match=f"needs all weights in every process, and {kind.value} spreads them"):
        trainer.train()


def test_a_checkpoint_must_not_be_complete_before_it_has_the_average(tmp_path):
    trainer = tiny_trainer(tmp_path, [CompleteCheckpointCallback(), EmaCallback()])
    with pytest.raises(ValueError, match="give CompleteCheckpointCallback after EmaCallback"):
        trainer.train()
