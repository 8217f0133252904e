"""The configurations: presets, what they refuse, and that a saved one is the same."""

import pytest
import timm
import torch
from transformers import AutoConfig, AutoModelForImageClassification

from dart_hf import DartConfig, DartRmtConfig, DartVimConfig

CLASSES = (DartConfig, DartVimConfig, DartRmtConfig)
every_class = pytest.mark.parametrize("config_class", CLASSES)
PRESETS = [(config_class, name) for config_class in CLASSES for name in config_class.presets]


# --- presets ---------------------------------------------------------------------------------------------------------


@every_class
def test_the_first_preset_is_the_default(config_class):
    first, *others = config_class.presets
    assert config_class.preset(first).to_dict() == config_class().to_dict()
    for name in others:
        assert config_class.preset(name).to_dict() != config_class().to_dict()


@every_class
def test_settings_of_a_preset_can_be_replaced(config_class):
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


def test_presets_are_the_published_sizes():
    small = DartConfig.preset("small")
    assert (small.hidden_size, small.num_attention_heads, small.intermediate_size) == (384, 6, 1536)
    assert (small.scorer, small.scorer_head, small.num_hidden_layers) == ("mobilenet_v3_large", "v1", 12)
    base = DartConfig.preset("base")
    assert (base.hidden_size, base.num_attention_heads, base.intermediate_size) == (768, 12, 3072)
    assert base.scorer == "mobilenet_v3_large"

    tiny, small = DartVimConfig.preset("tiny"), DartVimConfig.preset("small")
    assert (tiny.hidden_size, small.hidden_size) == (192, 384)
    assert (tiny.scorer, small.scorer) == ("mobilenet_v3_small", "mobilenet_v3_large")
    for config in (tiny, small):
        assert (config.num_hidden_layers, config.expand, config.state_size, config.conv_kernel) == (24, 2, 16, 4)
        assert (config.layer_norm_eps, config.scorer_head) == (1e-5, "v2")

    small, large = DartRmtConfig.preset("small"), DartRmtConfig.preset("L6")
    assert (small.hidden_sizes, small.depths) == ([64, 128, 256, 512], [3, 4, 18, 4])
    assert (large.hidden_sizes, large.depths) == ([112, 224, 448, 640], [4, 8, 25, 8])
    for config in (small, large):
        assert (config.scorer, config.scorer_head, config.partition) == ("efficientnet_b0", "v1", "grid")
        assert config.chunkwise == [True, True, True, False]


@pytest.mark.parametrize(("config_class", "name"), PRESETS)
def test_presets_have_the_published_number_of_parameters(config_class, name):
    """DeiT's, and in millions Vim's (arXiv 2401.09417) and RMT's (arXiv 2309.11523), besides the scorer's."""
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(config_class.preset(name, num_labels=1000))
    found = model.num_parameters() - sum(parameter.numel() for parameter in model.scorer.parameters())
    if config_class is DartConfig:
        with torch.device("meta"):
            deit = timm.create_model(f"deit_{name}_patch16_224")
        assert found == sum(parameter.numel() for parameter in deit.parameters())
    else:
        millions = {
            ("dart_vim", "tiny"): 7,
            ("dart_vim", "small"): 26,
            ("dart_rmt", "small"): 27,
            ("dart_rmt", "L6"): 95,
        }
        assert found == pytest.approx(1e6 * millions[config_class.model_type, name], rel=0.03)


# --- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config_class", "name"), PRESETS)
def test_a_saved_configuration_is_the_same(config_class, name, tmp_path):
    config = config_class.preset(name, num_labels=7)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is config_class
    loaded.name_or_path = config.name_or_path
    assert loaded.to_dict() == config.to_dict()


def test_the_rank_of_the_time_steps_follows_the_width():
    assert [DartVimConfig(hidden_size=width).time_step_rank for width in (16, 17, 192, 384)] == [1, 2, 12, 24]
    assert DartVimConfig(time_step_rank=5).time_step_rank == 5


@every_class
def test_a_trunk_without_pretrained_weights_is_not_frozen(config_class):
    assert config_class().scorer_frozen
    assert not config_class(scorer="conv").scorer_frozen
    assert config_class(scorer="conv", scorer_frozen=True).scorer_frozen


# --- what is refused -------------------------------------------------------------------------------------------------


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
        ({"scorer": "vgg"}, "scorer='vgg' is unknown: accepted are 'conv', 'timm/<name>', 'mobilenet_v3_small'"),
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


def test_no_stages_at_all_are_refused():
    stages = ("hidden_sizes", "depths", "num_attention_heads", "mlp_ratios", "decay_starts", "decay_ranges")
    with pytest.raises(ValueError, match="one entry for each stage, got hidden_sizes 0, depths 0"):
        DartRmtConfig(**dict.fromkeys((*stages, "chunkwise", "layer_scale"), ()))


WRONG_TYPES = [
    *(
        (each, name, value, accepted)
        for each in CLASSES
        for name, value, accepted in (
            ("partition", "hexagons", "'grid' or 'uniform'"),
            ("num_patches", "9", "int"),
            ("num_patches", True, "int"),
            ("scorer_frozen", "yes", "bool or None"),
        )
    ),
    (DartConfig, "score_normalization", "layer", "'running' or 'image' or 'batch'"),
    (DartVimConfig, "state_size", "16", "int"),
    (DartVimConfig, "scorer_head", "v3", "'v1' or 'v2'"),
    (DartRmtConfig, "partition", "flow", "'grid' or 'uniform'"),
    (DartRmtConfig, "depths", "3", r"list\[int\] or tuple\[int, ...\]"),
]


@pytest.mark.parametrize(("config_class", "name", "value", "accepted"), WRONG_TYPES)
def test_settings_of_the_wrong_type_are_refused(config_class, name, value, accepted, tmp_path):
    message = f"{name} must be .*{accepted}, got {value!r}.$"
    config = config_class()
    config.save_pretrained(tmp_path)
    for give in (
        lambda: config_class(**{name: value}),
        lambda: config_class.preset("small", **{name: value}),
        lambda: AutoConfig.from_pretrained(tmp_path, **{name: value}),
        lambda: setattr(config, name, value),
    ):
        with pytest.raises(ValueError, match=message):
            give()


@every_class
def test_settings_given_while_loading_or_set_later_are_checked(config_class, tmp_path):
    config = config_class()
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_patches must be at least 1, got 0"):
        config.num_patches = 0
    with pytest.raises(ValueError, match="num_patches must be at least 1, got 0"):
        AutoConfig.from_pretrained(tmp_path, num_patches=0)
    # A rule for two settings together.
    with pytest.raises(ValueError, match="reads 3 channels, got num_channels=4"):
        AutoConfig.from_pretrained(tmp_path, num_channels=4)
    loaded, unused = AutoConfig.from_pretrained(tmp_path, num_patches=16, other=1, return_unused_kwargs=True)
    assert loaded.num_patches == 16 and unused == {"other": 1}


@every_class
def test_transformers_own_checks_are_value_errors(config_class):
    with pytest.raises(ValueError, match="`output_attentions` attribute is not supported"):
        config_class(output_attentions=True, attn_implementation="sdpa")


# --- misspelled settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("misspelled", "meant"),
    [("num_patchs", "num_patches"), ("scorer_grid_size", "score_grid_size"), ("drop_path_rates", "drop_path_rate")],
)
@every_class
def test_a_misspelled_setting_is_named_in_a_warning(config_class, misspelled, meant, warnings_of, tmp_path):
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
def test_other_unknown_settings_are_kept_without_a_warning(config_class, warnings_of, tmp_path):
    settings = {"num_labels": 3, "torch_dtype": "float32", "return_dict": True, "architectures": ["A"], "note": "mine"}
    config = config_class(**settings, attn_implementation="eager", output_hidden_states=True)
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).note == "mine"
    assert not [text for text in warnings_of() if "Did you mean" in text]
