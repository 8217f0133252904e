"""The configurations: presets, saving and loading, errors and warnings."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageClassification

from dart_hf import DartConfig, DartRmtConfig, DartVimConfig
from dart_hf.modeling.configuration_dart_rmt import RMT_STAGE_SETTINGS

CLASSES = (DartConfig, DartVimConfig, DartRmtConfig)
every_class = pytest.mark.parametrize("config_class", CLASSES)
# Preset -> number of parameters besides the scorer's, scorer, scorer's head. DeiT's numbers are exact, those of
# Vim (arXiv 2401.09417) and RMT (arXiv 2309.11523) are published in millions.
PUBLISHED = {
    (DartConfig, "tiny"): (5_717_416, "mobilenet_v3_small", "v1"),
    (DartConfig, "small"): (22_050_664, "mobilenet_v3_large", "v1"),
    (DartConfig, "base"): (86_567_656, "mobilenet_v3_large", "v1"),
    (DartVimConfig, "tiny"): (7e6, "mobilenet_v3_small", "v2"),
    (DartVimConfig, "small"): (26e6, "mobilenet_v3_large", "v2"),
    (DartRmtConfig, "small"): (27e6, "efficientnet_b0", "v1"),
    (DartRmtConfig, "L6"): (95e6, "efficientnet_b0", "v1"),
}


@every_class
def test_the_first_preset_is_the_default(config_class):
    first, *others = config_class.presets
    assert config_class.preset(first).to_dict() == config_class().to_dict()
    for name in others:
        assert config_class.preset(name).to_dict() != config_class().to_dict()


@every_class
def test_arguments_replace_settings_of_a_preset(config_class):
    name = list(config_class.presets)[-1]
    published, ours = config_class.preset(name).to_dict(), config_class.preset(name, num_patches=16, num_labels=10)
    assert (ours.num_patches, ours.num_labels) == (16, 10)
    changed = {key for key, value in ours.to_dict().items() if value != published[key]}
    assert changed == {"num_patches", "id2label", "label2id"}


@pytest.mark.parametrize(
    ("config_class", "accepted"),
    [(DartConfig, "'tiny', 'small', 'base'"), (DartVimConfig, "'tiny', 'small'"), (DartRmtConfig, "'small', 'L6'")],
)
def test_an_unknown_preset_is_refused(config_class, accepted):
    with pytest.raises(ValueError, match=f"preset must be one of {accepted}, got 'huge'"):
        config_class.preset("huge")


@pytest.mark.parametrize(("config_class", "name"), PUBLISHED)
def test_presets_are_the_published_models(config_class, name):
    config = config_class.preset(name, num_labels=1000)
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(config)
    size = model.num_parameters() - sum(parameter.numel() for parameter in model.scorer.parameters())
    expected, *scorer = PUBLISHED[config_class, name]
    assert size == pytest.approx(expected, rel=0 if config_class is DartConfig else 0.03)
    assert [config.scorer, config.scorer_head] == scorer


@pytest.mark.parametrize(("config_class", "name"), PUBLISHED)
def test_a_saved_configuration_is_loaded_unchanged(config_class, name, tmp_path):
    config = config_class.preset(name, num_labels=7)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is config_class
    loaded.name_or_path = config.name_or_path
    assert loaded.to_dict() == config.to_dict()


def test_time_step_rank_defaults_to_a_sixteenth_of_the_width():
    assert [DartVimConfig(hidden_size=width).time_step_rank for width in (16, 17, 192, 384)] == [1, 2, 12, 24]
    assert DartVimConfig(time_step_rank=5).time_step_rank == 5


@every_class
def test_trunks_are_frozen_by_default_unless_they_have_no_pretrained_weights(config_class):
    assert config_class().scorer_frozen
    assert not config_class(scorer="conv").scorer_frozen
    assert config_class(scorer="conv", scorer_frozen=True).scorer_frozen
    assert config_class(scorer="detail", scorer_frozen=False).scorer_frozen


@every_class
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_patches": 0}, "num_patches must be at least 1, got 0"),
        ({"patch_size": -1}, "patch_size must be at least 1, got -1"),
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"num_channels": 0}, "num_channels must be at least 1, got 0"),
        ({"score_grid_size": 0}, "score_grid_size must be at least 1"),
        ({"drop_path_rate": 1.5}, "drop_path_rate must be from 0 to 1, got 1.5"),
        ({"layer_norm_eps": -1e-6}, "layer_norm_eps must be at least 0, got -1e-06"),
        ({"initializer_range": -0.1}, "initializer_range must be at least 0, got -0.1"),
        ({"num_channels": 4}, "reads 3 channels, got num_channels=4: use scorer='conv'"),
        ({"scorer": "timm/"}, "scorer='timm/' names no timm model"),
        (
            {"scorer": "vgg"},
            "scorer='vgg' is unknown: accepted are 'conv', 'detail', 'encoder', 'timm/<name>', 'mobilenet_v3_small'",
        ),
        ({"scorer": "encoder", "scorer_layers": -1}, "scorer_layers must be at least 0, got -1"),
        ({"scorer": "encoder", "scorer_layers": 99}, "scorer_layers must be at most [0-9]+, as many as .* got 99.$"),
        ({"scorer": "detail", "scorer_layers": 1}, "scorer_layers=1 needs scorer='encoder', got 'detail'"),
        ({"partition": "hexagons"}, "partition must be .*'grid' or 'uniform', got 'hexagons'.$"),
        ({"num_patches": True}, "num_patches must be .*int, got True.$"),
        ({"scorer_frozen": "yes"}, "scorer_frozen must be .*bool or None, got 'yes'.$"),
        ({"score_normalization": "layer"}, "score_normalization must be .*'image' or 'batch', got 'layer'.$"),
        ({"scorer_head": "v3"}, "scorer_head must be .*'v1' or 'v2', got 'v3'.$"),
        # transformers' own check.
        ({"output_attentions": True, "attn_implementation": "sdpa"}, "`output_attentions` attribute is not supported"),
    ],
)
def test_unusable_settings_of_the_regions_are_refused(config_class, settings, message):
    with pytest.raises(ValueError, match=message):
        config_class(**settings)


@pytest.mark.parametrize(
    ("config_class", "settings", "message"),
    [
        (DartConfig, {"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        (DartConfig, {"hidden_size": 100}, "multiple of num_attention_heads, got 100 and 3"),
        (DartConfig, {"num_attention_heads": 0}, "multiple of num_attention_heads, got 192 and 0"),
        (DartConfig, {"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
        (DartConfig, {"intermediate_size": -1}, "intermediate_size must be at least 1, got -1"),
        (DartConfig, {"attention_probs_dropout_prob": -1}, "attention_probs_dropout_prob must be from 0 to 1, got -1"),
        (DartConfig, {"hidden_act": "sine"}, "hidden_act='sine' is unknown: accepted are .*gelu"),
        (DartConfig, {"distillation_head": True}, "distillation_head=True needs distillation_token=True"),
        (DartVimConfig, {"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        (DartVimConfig, {"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
        (DartVimConfig, {"expand": 0}, "expand must be at least 1, got 0"),
        (DartVimConfig, {"state_size": -2}, "state_size must be at least 1, got -2"),
        (DartVimConfig, {"conv_kernel": 0}, "conv_kernel must be at least 1, got 0"),
        (DartVimConfig, {"time_step_rank": 0}, "time_step_rank must be at least 1, got 0"),
        (DartVimConfig, {"time_step_min": 0.0}, "time_step_min must be above 0 and at most time_step_max, got 0.0 and"),
        (DartVimConfig, {"time_step_min": 0.2}, "at most time_step_max, got 0.2 and 0.1"),
        (DartVimConfig, {"time_step_max": float("nan")}, "at most time_step_max, got 0.001 and nan"),
        (DartRmtConfig, {"projection_size": 0}, "projection_size must be at least 1, got 0"),
        (DartRmtConfig, {"hidden_act": "sine"}, "hidden_act='sine' is unknown: accepted are .*gelu"),
        (DartRmtConfig, {"depths": (3, 4, 18)}, "one entry for each stage, got hidden_sizes 4, depths 3, num_att"),
        (DartRmtConfig, {"depths": ()}, "one entry for each stage, got hidden_sizes 4, depths 0, num_att"),
        (DartRmtConfig, {"chunkwise": (True,)}, "one entry for each stage, got .*chunkwise 1, layer_scale 4"),
        (DartRmtConfig, {"depths": (3, 0, 18, 4)}, r"depths must be at least 1 in every stage, got \[3, 0, 18, 4\]"),
        (
            DartRmtConfig,
            {"mlp_ratios": (4, 4, 3, -1)},
            r"mlp_ratios must be at least 1 in every stage, got \[4, 4, 3, -1",
        ),
        (DartRmtConfig, {"num_attention_heads": (4, 4, 8, 0)}, "num_attention_heads must be at least 1 in every stage"),
        (DartRmtConfig, {"hidden_sizes": (64, 124, 256, 512)}, "multiples of twice num_attention_heads, got 124 and 4"),
        (DartRmtConfig, {"first_strip_edge": -1}, "first_strip_edge must be at least 0, got -1"),
        (DartRmtConfig, {"partition": "flow"}, "partition must be .*'grid' or 'uniform', got 'flow'.$"),
        (DartRmtConfig, {"depths": "3"}, r"depths must be .*list\[int\] or tuple\[int, ...\], got '3'.$"),
        (
            DartRmtConfig,
            dict.fromkeys(RMT_STAGE_SETTINGS, ()),
            "one entry for each stage, got hidden_sizes 0, depths 0",
        ),
        (
            DartRmtConfig,
            {"decay_starts": (0, 2, 2, 2)},
            "decay_starts and decay_ranges must leave every head above 0, got 0 and 4 for 4 heads",
        ),
        (
            DartRmtConfig,
            {"decay_ranges": (4, 4, -3, 6)},
            "decay_starts and decay_ranges must leave every head above 0, got 2 and -3 for 8 heads",
        ),
    ],
)
def test_unusable_settings_of_the_encoder_are_refused(config_class, settings, message):
    with pytest.raises(ValueError, match=message):
        config_class(**settings)


@pytest.mark.parametrize(
    ("value", "message"), [("9", "num_patches must be .*int, got '9'.$"), (0, "num_patches must be at least 1, got 0")]
)
@every_class
def test_settings_are_checked_when_given_loaded_or_changed(config_class, value, message, tmp_path):
    config = config_class()
    config.save_pretrained(tmp_path)
    for give in (
        lambda: config_class(num_patches=value),
        lambda: config_class.preset("small", num_patches=value),
        lambda: AutoConfig.from_pretrained(tmp_path, num_patches=value),
        lambda: setattr(config, "num_patches", value),
    ):
        with pytest.raises(ValueError, match=message):
            give()


@every_class
def test_loading_checks_settings_together_and_returns_unused_ones(config_class, tmp_path):
    config_class().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="reads 3 channels, got num_channels=4"):
        AutoConfig.from_pretrained(tmp_path, num_channels=4)
    loaded, unused = AutoConfig.from_pretrained(tmp_path, num_patches=16, other=1, return_unused_kwargs=True)
    assert loaded.num_patches == 16 and unused == {"other": 1}


@pytest.mark.parametrize(
    ("misspelled", "meant"),
    [("num_patchs", "num_patches"), ("scorer_grid_size", "score_grid_size"), ("drop_path_rates", "drop_path_rate")],
)
@every_class
def test_a_warning_corrects_a_misspelled_setting(config_class, misspelled, meant, warnings_of, tmp_path):
    config_class().save_pretrained(tmp_path)
    for make in (
        lambda: config_class(**{misspelled: 3}),
        lambda: config_class.preset("small", **{misspelled: 3}),
        lambda: AutoConfig.from_pretrained(tmp_path, **{misspelled: 3}),
    ):
        before = len(warnings_of())
        make()
        expected = f"{config_class.__name__} has no setting {misspelled!r}: it has no effect. Did you mean {meant!r}?"
        assert expected in warnings_of()[before:]


@every_class
def test_other_unknown_settings_are_saved_without_a_warning(config_class, warnings_of, tmp_path):
    settings = {"num_labels": 3, "torch_dtype": "float32", "return_dict": True, "architectures": ["A"], "note": "mine"}
    config = config_class(**settings, attn_implementation="eager", output_hidden_states=True)
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).note == "mine"
    assert not [text for text in warnings_of() if "Did you mean" in text]
