"""LoRA adapters give the logits that they had: trained, saved, loaded and merged, for every encoder."""

import pytest
import torch
from helpers.tiny_models import ENCODERS, tiny_classifier
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageClassification

from dart_hf.training.lora import lora_config

peft = pytest.importorskip("peft")

PIXELS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0])


def base_folder(directory, model_type, **settings):
    """A model as conversion leaves it, with the published rule for its scores."""
    model = tiny_classifier(("a", "b", "c"), model_type, **settings)
    model.scorer.trunk_loaded.fill_(1)
    model.save_pretrained(directory / "base")
    return directory / "base"


def train(folder, **settings):
    """A trained adapter and what it predicts."""
    base = AutoModelForImageClassification.from_pretrained(folder)
    torch.manual_seed(1)
    model = peft.get_peft_model(base, lora_config(base, r=2, init_lora_weights=False, **settings)).train()
    # As `RunningScoresCallback` does when a training begins.
    model.config.score_normalization = "running"
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(model(PIXELS).logits, LABELS).backward()
        optimizer.step()
    return model, logits(model)


@torch.no_grad()
def logits(model):
    return model.eval()(PIXELS).logits


@pytest.mark.parametrize("scorer_frozen", [True, False])
@pytest.mark.parametrize("model_type", ENCODERS)
def test_an_adapter_gives_its_logits_after_saving_loading_and_merging(model_type, scorer_frozen, tmp_path):
    folder = base_folder(tmp_path, model_type, scorer_frozen=scorer_frozen)
    model, expected = train(folder)
    before = logits(AutoModelForImageClassification.from_pretrained(folder))
    assert (expected - before).abs().max() > 0.1
    model.save_pretrained(tmp_path / "adapter")

    base = AutoModelForImageClassification.from_pretrained(folder)
    assert base.config.score_normalization == "batch"
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert loaded.config.score_normalization == "running"
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)

    merged = loaded.merge_and_unload()
    assert not any("lora" in name or "modules_to_save" in name for name in merged.state_dict())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    assert again.config.score_normalization == "running"
    torch.testing.assert_close(logits(again), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scorer_frozen", [True, False])
def test_an_adapter_holds_a_trunk_only_if_it_trains(scorer_frozen, tmp_path):
    model, _ = train(base_folder(tmp_path, "dart", scorer_frozen=scorer_frozen))
    model.save_pretrained(tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("scorer.trunk" in name for name in names) != scorer_frozen
    assert any("scorer.statistics.running_mean" in name for name in names)
    assert not any("lora" in name and "scorer" in name for name in names)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("scorer.trunk" in name for name in trainable) != scorer_frozen


def test_both_classifiers_of_a_distilled_model_are_trained(tmp_path):
    folder = base_folder(tmp_path, "dart", distillation_token=True, distillation_head=True)
    model, expected = train(folder)
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForImageClassification.from_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)


def test_settings_replace_those_that_are_chosen(tmp_path):
    model = tiny_classifier(model_type="dart")
    assert lora_config(model).target_modules == {"fc1", "fc2", "k_proj", "o_proj", "q_proj", "v_proj"}
    chosen = lora_config(model, r=3, target_modules=["q_proj"])
    assert (chosen.r, chosen.target_modules) == (3, {"q_proj"})
