"""The model that `dart-hf train` starts from."""

import functools
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


@pytest.fixture
def starting(few):
    return functools.partial(start_model, data=load_image_data(few), say=lambda line: None)


def test_head_that_fits_is_kept_in_the_order_of_the_data(digits_model, starting):
    model, _ = starting(ModelArguments(model=str(digits_model)))
    before = DartForImageClassification.from_pretrained(digits_model)
    assert model.config.id2label == {0: "0", 1: "1", 2: "2"}
    assert torch.equal(model.classifier.weight, before.classifier.weight.flip(0))
    assert torch.equal(model.dart.layernorm.weight, before.dart.layernorm.weight)


def test_head_of_other_classes_is_replaced_only_with_new_head(digits_model, starting, tmp_path):
    model, processor = load_model(digits_model)
    for names in (["0", "1", "5"], ["0", "1"], ["0", "1", "2", "3"]):
        model = DartForImageClassification(
            DartConfig.from_pretrained(
                digits_model, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}
            )
        )
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"labels of the data do not match those of .*: .* classes .*--new-head"):
            starting(ModelArguments(model=str(tmp_path)))
        renewed, _ = starting(ModelArguments(model=str(tmp_path), new_head=True))
        assert renewed.classifier.weight.shape == (3, 32)
        assert not renewed.classifier.bias.any()
        if len(names) == 3:
            assert not torch.equal(renewed.classifier.weight, model.classifier.weight)
        assert torch.equal(renewed.dart.layernorm.weight, model.dart.layernorm.weight)


@pytest.mark.parametrize("task", ["multi_label_classification", "regression"])
def test_task_of_the_data_decides_the_problem_type(digits_model, few, task, tmp_path):
    data = load_image_data(few)
    several = replace(data, problem_type=task)
    with pytest.raises(ValueError, match=rf"they are for {task}, and the model's for single_label_.*--new-head"):
        start_model(ModelArguments(model=str(digits_model)), several, lambda line: None)
    model, processor = start_model(ModelArguments(model=str(digits_model), new_head=True), several, lambda line: None)
    assert model.config.problem_type == task
    # A new head for one class an image forgets the task.
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = start_model(ModelArguments(model=str(tmp_path), new_head=True), data, lambda line: None)
    assert again.config.problem_type is None
    assert again.config.id2label == {0: "0", 1: "1", 2: "2"}
    with pytest.raises(ValueError, match="has no setting 'problem_type' to change"):
        settings = json.dumps({"problem_type": task})
        start_model(ModelArguments(model=str(digits_model), model_settings=settings), data, lambda line: None)


def test_budget_that_fills_no_grid_is_refused_before_training(starting):
    with pytest.raises(ValueError, match=r"num_patches=200 does not fill the 14 rows .* are 196 and 210"):
        starting(ModelArguments(preset="rmt-small", num_patches=200, image_size=448))


def test_model_without_a_head_gets_one(digits_model, starting, tmp_path):
    model, processor = load_model(digits_model)
    model.dart.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    started, _ = starting(ModelArguments(model=str(tmp_path)))
    assert started.classifier.weight.shape == (3, 32)
    assert torch.equal(started.dart.layernorm.weight, model.dart.layernorm.weight)


def test_settings_of_the_model_can_change_unless_weights_are_lost(digits_model, starting):
    changes = {"num_patches": 5, "partition": "uniform", "image_size": 48, "crop_pct": 1.0, "drop_path_rate": 0.3}
    model, processor = starting(ModelArguments(model=str(digits_model), **changes))
    assert (model.config.num_patches, model.config.partition) == (5, "uniform")
    assert (processor.crop_size.height, processor.size.shortest_edge) == (48, 48)
    assert model.dart.layers[-1].drop_path.drop_prob == 0.3
    with pytest.raises(ValueError, match="does not fit the weights of"):
        starting(ModelArguments(model=str(digits_model), model_settings='{"intermediate_size": 60}', new_head=True))
    with pytest.raises(ValueError, match="DartConfig has no setting 'depth'"):
        starting(ModelArguments(model=str(digits_model), model_settings='{"depth": 3}'))
    with pytest.raises(ValueError, match=r"model_settings: '{' is no JSON"):
        starting(ModelArguments(preset="tiny", model_settings="{"))
    with pytest.raises(ValueError, match="crop_pct must be above 0 and at most 1, got 2"):
        starting(ModelArguments(model=str(digits_model), crop_pct=2))


@pytest.mark.parametrize("arguments", [ModelArguments(), ModelArguments(model="x", preset="tiny")])
def test_exactly_one_of_model_and_preset(starting, arguments):
    with pytest.raises(ValueError, match=r"Give either model .* or preset"):
        starting(arguments)


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


def test_plain_vit_becomes_a_dart(few, tmp_path):
    torch.manual_seed(0)
    vit = ViTForImageClassification(
        ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=7)
    )
    vit.save_pretrained(tmp_path / "vit")
    ViTImageProcessor().save_pretrained(tmp_path / "vit")
    arguments = ["--data", few, "--model", tmp_path / "vit", "--model-settings", '{"scorer": "conv"}', "--max-steps", 1]
    assert "do not match those of" in sentence(command(*arguments, "--output", tmp_path / "out"))
    facts = train(
        *arguments, "--new-head", "--output", tmp_path / "tuned", "--learning-rate", 0, "--disable-tqdm", True
    )
    assert facts["started_from"] == str(tmp_path / "vit")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "tuned")
    assert model.config.partition == "flow"
    assert torch.equal(model.dart.layernorm.weight, vit.vit.layernorm.weight)
    assert AutoImageProcessor.from_pretrained(tmp_path / "tuned").image_mean == (0.5, 0.5, 0.5)


def test_plain_encoder_gets_a_head_for_the_data(starting, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    vit = ViTModel(ViTConfig(**sizes, image_size=64)).eval()
    vit.save_pretrained(tmp_path)
    ViTImageProcessor(size=64).save_pretrained(tmp_path)
    arguments = ModelArguments(model=str(tmp_path), model_settings='{"scorer": "conv"}', partition="uniform")
    model, _ = starting(arguments)
    assert model.config.id2label == {0: "0", 1: "1", 2: "2"} and model.classifier.weight.std() > 0
    pixel_values = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = model.classifier(vit(pixel_values).last_hidden_state[:, 0])
        torch.testing.assert_close(model.eval()(pixel_values).logits, expected, rtol=0, atol=1e-5)
