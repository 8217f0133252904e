"""The model that `dart-hf train` starts from."""

import json
from dataclasses import replace

import pytest
import torch
from helpers.train_command import SMALL, command, sentence, train
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.models.vit.image_processing_vit import ViTImageProcessor

from dart_hf import DartConfig, DartForImageClassification
from dart_hf.data import load_image_data
from dart_hf.hub.loading import load_model
from dart_hf.training.settings import ModelArguments
from dart_hf.training.start_model import start_model

DIGITS = {0: "0", 1: "1", 2: "2"}


@pytest.fixture
def starting(few):
    """A function from the settings of a start model, and perhaps a task, to the model and its processor."""
    data = load_image_data(few)

    def start(task="single_label_classification", **settings):
        return start_model(ModelArguments(**settings), replace(data, problem_type=task), lambda line: None)

    return start


def labelled(names):
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def test_head_that_fits_is_kept_in_the_order_of_the_data(digits_model, starting):
    model, _ = starting(model=str(digits_model))
    before = DartForImageClassification.from_pretrained(digits_model)
    assert model.config.id2label == DIGITS
    assert torch.equal(model.classifier.weight, before.classifier.weight.flip(0))
    assert torch.equal(model.dart.layernorm.weight, before.dart.layernorm.weight)


@pytest.mark.parametrize("names", [["0", "1", "5"], ["0", "1"], ["0", "1", "2", "3"]])
def test_head_of_other_classes_is_replaced_only_with_new_head(digits_model, starting, names, tmp_path):
    model = DartForImageClassification(DartConfig.from_pretrained(digits_model, **labelled(names)))
    model.save_pretrained(tmp_path)
    load_model(digits_model)[1].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"labels of the data do not match those of .*: .* classes .*--new-head"):
        starting(model=str(tmp_path))
    renewed, _ = starting(model=str(tmp_path), new_head=True)
    assert renewed.classifier.weight.shape == (3, 32) and not renewed.classifier.bias.any()
    assert not torch.equal(renewed.classifier.weight[:2], model.classifier.weight[:2])
    assert torch.equal(renewed.dart.layernorm.weight, model.dart.layernorm.weight)


@pytest.mark.parametrize("task", ["multi_label_classification", "regression"])
def test_task_of_the_data_decides_the_problem_type(digits_model, starting, task, tmp_path):
    with pytest.raises(ValueError, match=rf"they are for {task}, and the model's for single_label_.*--new-head"):
        starting(task, model=str(digits_model))
    model, processor = starting(task, model=str(digits_model), new_head=True)
    assert model.config.problem_type == task
    # A new head for one class an image forgets the task.
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = starting(model=str(tmp_path), new_head=True)
    assert (again.config.problem_type, again.config.id2label) == (None, DIGITS)


def test_model_without_a_head_gets_one(digits_model, starting, tmp_path):
    model, processor = load_model(digits_model)
    model.dart.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    started, _ = starting(model=str(tmp_path))
    assert started.classifier.weight.shape == (3, 32)
    assert torch.equal(started.dart.layernorm.weight, model.dart.layernorm.weight)


def test_settings_of_the_model_can_change(digits_model, starting):
    changes = {"num_patches": 5, "partition": "uniform", "image_size": 48, "crop_pct": 1.0, "drop_path_rate": 0.3}
    model, processor = starting(model=str(digits_model), **changes)
    assert (model.config.num_patches, model.config.partition) == (5, "uniform")
    assert (processor.crop_size.height, processor.size.shortest_edge) == (48, 48)
    assert model.dart.layers[-1].drop_path.drop_prob == 0.3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_settings": '{"intermediate_size": 60}', "new_head": True}, "does not fit the weights of"),
        ({"model_settings": '{"depth": 3}'}, "DartConfig has no setting 'depth'"),
        ({"model_settings": '{"problem_type": "regression"}'}, "has no setting 'problem_type' to change"),
        ({"crop_pct": 2}, "crop_pct must be above 0 and at most 1, got 2"),
        ({"model": None, "preset": "tiny", "model_settings": "{"}, r"model_settings: '{' is no JSON"),
        ({"model": None, "preset": "rmt-small", "num_patches": 200, "image_size": 448},
         r"num_patches=200 does not fill the 14 rows .* are 196 and 210"),
        ({"preset": "tiny"}, r"Give either model .* or preset"),
        ({"model": None}, r"Give either model .* or preset"),
    ],
)  # fmt: skip
def test_unsuitable_settings_are_refused(digits_model, starting, settings, message):
    with pytest.raises(ValueError, match=message):
        starting(**{"model": str(digits_model), **settings})


def test_frozen_scorer_without_weights_is_refused(few, tmp_path, config):
    frozen = {**SMALL, "scorer": "mobilenet_v3_small"}
    arguments = ["--data", few, "--config", config, "--model-settings", json.dumps(frozen), "--max-steps", 1]
    refusal = sentence(command(*arguments, "--output", tmp_path / "out"))
    assert "is frozen and has no weights: give scorer_weights (--scorer-weights)" in refusal
    weights = DartForImageClassification(DartConfig(**frozen)).scorer.trunk.state_dict()
    torch.save(weights, tmp_path / "trunk.pth")
    train(*arguments, "--output", tmp_path / "other", "--scorer-weights", tmp_path / "trunk.pth")
    model, _ = load_model(tmp_path / "other")
    saved = model.scorer.trunk.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in weights.items())


VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 64}


def test_plain_vit_becomes_a_dart(few, tmp_path):
    vit = ViTForImageClassification(ViTConfig(**VIT, num_labels=7))
    vit.save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size=64).save_pretrained(tmp_path / "vit")
    arguments = ["--data", few, "--model", tmp_path / "vit", "--model-settings", '{"scorer": "conv"}', "--max-steps", 1]
    assert "do not match those of" in sentence(command(*arguments, "--output", tmp_path / "out"))
    arguments += ["--new-head", "--output", tmp_path / "tuned", "--learning-rate", 0, "--disable-tqdm", True]
    assert train(*arguments)["started_from"] == str(tmp_path / "vit")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "tuned")
    assert model.config.partition == "flow"
    assert torch.equal(model.dart.layernorm.weight, vit.vit.layernorm.weight)
    assert AutoImageProcessor.from_pretrained(tmp_path / "tuned").image_mean == (0.5, 0.5, 0.5)


def test_plain_encoder_gets_a_head_for_the_data(starting, tmp_path):
    vit = ViTModel(ViTConfig(**VIT)).eval()
    vit.save_pretrained(tmp_path)
    ViTImageProcessor(size=64).save_pretrained(tmp_path)
    model, _ = starting(model=str(tmp_path), model_settings='{"scorer": "conv"}', partition="uniform")
    assert model.config.id2label == DIGITS and model.classifier.weight.std() > 0
    pixel_values = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = model.classifier(vit(pixel_values).last_hidden_state[:, 0])
        torch.testing.assert_close(model.eval()(pixel_values).logits, expected, rtol=0, atol=1e-5)
