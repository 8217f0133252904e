"""Parameter groups: what decays, how fast each layer and the scorer learn, and `Trainer` with them."""

import pytest
import torch
from helpers.tiny_models import tiny_classifier
from helpers.tiny_training import tiny_dart, tiny_trainer
from torch import nn
from transformers import Trainer, TrainerCallback

from dart_hf.training import Recipe, parameter_groups

LEARNING_RATE = 0.1
WEIGHT_DECAY = 0.05


def grouped(model, **settings):
    """Group -> the names of its parameters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, LEARNING_RATE, WEIGHT_DECAY, **settings)
    return {group["name"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}


@pytest.mark.parametrize("scorer", ["conv", "squeezenet1_1"])
@pytest.mark.parametrize("scorer_learning_rate", [None, 1e-3])
def test_every_parameter_is_in_the_group_of_its_depth_and_kind(scorer, scorer_learning_rate):
    model = tiny_dart(scorer=scorer)

    def expected_group(name):
        if ".scorer." in name and scorer_learning_rate is not None:
            depth = "scorer"
        elif ".layers." in name:
            depth = f"depth_{int(name.split('.')[2]) + 1}"
        else:
            depth = "depth_0" if "tokenizer" in name or "cls_token" in name else "depth_3"
        matrix = dict(model.named_parameters())[name].ndim > 1 and not name.endswith(("cls_token", "_embeddings"))
        return depth if matrix else f"{depth}_no_decay"

    groups = grouped(model, scorer_learning_rate=scorer_learning_rate)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert ("dart.tokenizer.scorer.trunk.0.0.weight" in names) == (scorer == "conv")
    assert {name: group for group, members in groups.items() for name in members} == {
        name: expected_group(name) for name in names
    }
    assert len(names) == sum(map(len, groups.values()))


def test_depths_of_heads_and_of_a_model_without_one():
    groups = grouped(tiny_dart(distillation_token=True, distillation_head=True))
    assert groups["depth_0_no_decay"] > {"dart.cls_token", "dart.distillation_token"}
    assert groups["depth_3"] == {"classifier.weight", "distillation_classifier.weight"}
    groups = grouped(tiny_dart().dart)
    assert groups["depth_3_no_decay"] == {"layernorm.weight", "layernorm.bias"}
    assert "layers.1.mlp.fc1.weight" in groups["depth_2"]


def test_depths_of_a_vision_mamba():
    groups = grouped(tiny_classifier(model_type="dart_vim", num_hidden_layers=2))
    assert groups["depth_0_no_decay"] >= {"dart_vim.cls_token", "dart_vim.tokenizer.position_embeddings"}
    mixer = "dart_vim.layers.1.mixer"
    assert {f"{mixer}.in_proj.weight", f"{mixer}.backward_scan.dt_proj.weight"} <= groups["depth_2"]
    # Rates of decay are not weights of a layer.
    assert {f"{mixer}.forward_scan.{name}" for name in ("A_log", "D")} <= groups["depth_2_no_decay"]
    assert groups["depth_3"] == {"classifier.weight"}
    assert groups["depth_3_no_decay"] == {"classifier.bias", "dart_vim.norm.weight"}


def test_every_layer_of_every_stage_has_its_own_depth():
    """The step down to the next stage has that of the layer before it."""
    groups = grouped(tiny_classifier(model_type="dart_rmt", depths=[2, 1]))
    depths = {name: int(group.split("_")[1]) for group, names in groups.items() for name in names}
    expected = {
        "tokenizer.scorer.head.fc1": 0,
        "stem.convolutions.3.conv": 0,
        "stages.0.layers.0.mlp.fc1": 1,
        "stages.0.layers.1.mlp.fc1": 2,
        "stages.0.downsample.conv": 2,
        "stages.1.layers.0.mlp.fc1": 3,
        "pooler.projection": 4,
    }
    assert {name: depths[f"dart_rmt.{name}.weight"] for name in expected} == expected
    assert "dart_rmt.stages.1.layers.0.layer_scale1" in groups["depth_3_no_decay"]


def test_each_group_learns_at_its_rate():
    groups = parameter_groups(tiny_dart(), LEARNING_RATE, WEIGHT_DECAY, layer_decay=0.5, scorer_learning_rate=1e-3)
    rates = {"depth_3": 0.1, "depth_2": 0.05, "depth_1": 0.025, "depth_0": 0.0125, "scorer": 1e-3}
    expected = [(name + suffix, rate) for name, rate in rates.items() for suffix in ("", "_no_decay")]
    assert [(group["name"], group["lr"]) for group in groups] == [
        (name, pytest.approx(rate)) for name, rate in expected
    ]
    assert [group["weight_decay"] for group in groups] == [WEIGHT_DECAY, 0.0] * 5
    assert {group["lr"] for group in parameter_groups(tiny_dart(), LEARNING_RATE, WEIGHT_DECAY)} == {LEARNING_RATE}
    # A frozen layer is still a layer.
    model = tiny_dart()
    model.dart.layers[0].requires_grad_(False)
    rates = {group["name"]: group["lr"] for group in parameter_groups(model, LEARNING_RATE, WEIGHT_DECAY, 0.5)}
    assert rates["depth_0"] == pytest.approx(LEARNING_RATE * 0.5**3) and "depth_1" not in rates


class FsdpUnit(nn.Module):
    """Names parameters as FSDP does."""

    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module


def in_fsdp_units(model):
    model.dart.layers = nn.ModuleList(map(FsdpUnit, model.dart.layers))
    model.dart.tokenizer.scorer = FsdpUnit(model.dart.tokenizer.scorer)
    model.dart.tokenizer = FsdpUnit(model.dart.tokenizer)
    return FsdpUnit(model)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, in_fsdp_units])
def test_wrapped_models_have_the_same_groups(wrap):
    model = tiny_dart()
    expected, names = grouped(model, scorer_learning_rate=1e-3), dict(model.named_parameters())
    groups = parameter_groups(wrap(model), LEARNING_RATE, WEIGHT_DECAY, scorer_learning_rate=1e-3)
    ids = {name: {id(names[member]) for member in members} for name, members in expected.items()}
    assert {group["name"]: set(map(id, group["params"])) for group in groups} == ids


def test_arguments_out_of_range():
    for layer_decay in (0, 1.5):
        with pytest.raises(ValueError, match=f"layer_decay must be above 0 and at most 1, got {layer_decay}"):
            parameter_groups(tiny_dart(), LEARNING_RATE, WEIGHT_DECAY, layer_decay)
    with pytest.raises(ValueError, match="scorer_learning_rate must be at least 0, got -1"):
        parameter_groups(tiny_dart(), LEARNING_RATE, WEIGHT_DECAY, scorer_learning_rate=-1)
    flattened = nn.Module()
    flattened.register_parameter("_flat_param", nn.Parameter(torch.zeros(8)))
    with pytest.raises(ValueError, match="FSDP flattened the parameters"):
        parameter_groups(flattened, LEARNING_RATE, WEIGHT_DECAY)


class LearningRates(TrainerCallback):
    """Keeps the learning rates of all groups, and the logged one, for each step."""

    def __init__(self):
        self.groups, self.logged = [], []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.groups.append({group["name"]: group["lr"] for group in optimizer.param_groups})

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged += [logs["learning_rate"]] if "learning_rate" in logs else []


RATES = Recipe(layer_decay=0.5, scorer_learning_rate=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd"])
def test_trainer_schedules_every_group_of_the_chosen_optimizer(optimizer, tmp_path):
    rates = LearningRates()
    settings = {"max_steps": 4, "lr_scheduler_type": "linear", "logging_steps": 1, "learning_rate": LEARNING_RATE}
    settings |= {"save_strategy": "no", "eval_strategy": "no", "adam_beta1": 0.8, "optim": optimizer}
    trainer = tiny_trainer(tmp_path, RATES, [rates], **settings)
    trainer.train()
    # Linearly from the full rate at the first of four steps to zero after the last.
    for step, groups in enumerate(rates.groups):
        left = 1 - step / 4
        assert len(groups) == 10
        assert groups["depth_3"] == pytest.approx(left * 0.1)
        assert groups["depth_0_no_decay"] == pytest.approx(left * 0.0125)
        assert groups["scorer"] == pytest.approx(left * 1e-3)
    assert rates.logged == pytest.approx([0.1, 0.075, 0.05, 0.025])
    if optimizer == "sgd":
        assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)
    else:
        assert isinstance(trainer.optimizer.optimizer, torch.optim.AdamW)
        assert trainer.optimizer.param_groups[0]["betas"] == (0.8, 0.999)


def test_optimizer_of_the_user_replaces_ours(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.optimizer_cls_and_kwargs = (torch.optim.SGD, {"lr": 0.5})
    assert {group["lr"] for group in trainer.create_optimizer().param_groups} == {0.5}


def test_optimizer_that_groups_by_itself_is_refused_only_with_rates_of_ours(tmp_path, monkeypatch):
    weight = torch.nn.Parameter(torch.zeros(1))
    answer = (torch.optim.SGD, {"params": [weight], "lr": 0.5})
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(lambda args, model=None: answer))
    with pytest.raises(ValueError, match="optim='sgd' groups the parameters itself"):
        tiny_trainer(tmp_path, RATES, optim="sgd").create_optimizer()
    (group,) = tiny_trainer(tmp_path, optim="sgd").create_optimizer().param_groups
    assert group["params"] == [weight]
