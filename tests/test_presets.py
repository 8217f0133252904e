"""Presets of all architectures by short names."""

from typing import get_args, get_type_hints

import pytest
import torch
from transformers import AutoModelForImageClassification

from dart_hf import DartConfig, DartRmtConfig, DartVimConfig
from dart_hf.benchmark.models import DART_PRESETS
from dart_hf.presets import PRESETS, preset_config
from dart_hf.training.settings import ModelArguments


def test_the_names():
    assert set(PRESETS) == {"tiny", "small", "base", "vim-tiny", "vim-small", "rmt-small", "rmt-L6"}
    assert set(DART_PRESETS.values()) == set(PRESETS) - {"base"}


def test_the_training_command_takes_them_all():
    literal, _ = get_args(get_type_hints(ModelArguments)["preset"])
    assert set(get_args(literal)) == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_each_is_a_model(name):
    config = preset_config(name, num_labels=7)
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(config)
    assert model.classifier.out_features == 7


def test_settings_and_architectures():
    config = preset_config("vim-small", num_patches=392)
    assert (type(config), config.hidden_size, config.num_patches) == (DartVimConfig, 384, 392)
    assert config.to_dict() == DartVimConfig.preset("small", num_patches=392).to_dict()
    assert type(preset_config("small")) is DartConfig
    assert type(preset_config("rmt-L6")) is DartRmtConfig


def test_an_unknown_name():
    with pytest.raises(ValueError, match=r"preset must be one of 'tiny', .*'rmt-L6', got 'vim-base'"):
        preset_config("vim-base")
