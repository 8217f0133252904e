"""DART-RMT: published sizes, retention against its definition, sizes of the maps, stochastic depth, precision."""

import math

import golden
import pytest
import torch
from torch.nn.functional import conv2d

from dart_hf import DartRmtConfig, DartRmtForImageClassification
from dart_hf.modeling.modeling_dart_rmt import DartRmtRetention, DartRmtStage, decay_rates, rotation_frequencies


def make_config(**settings) -> DartRmtConfig:
    defaults = {
        "hidden_sizes": (8, 16, 24, 32),
        "depths": (1, 1, 1, 1),
        "num_attention_heads": (2, 2, 3, 4),
        "mlp_ratios": (2, 2, 2, 2),
        "layer_scale": (False, False, True, True),
        "layer_scale_init_value": 0.5,
        "drop_path_rate": 0.0,
        "projection_size": 48,
        "image_size": 64,
        "patch_size": 8,
        "num_patches": 16,
        "scorer": "conv",
        "num_labels": 5,
    }
    return DartRmtConfig(**{**defaults, **settings})


def make_model(**settings) -> DartRmtForImageClassification:
    torch.manual_seed(0)
    model = DartRmtForImageClassification(make_config(**settings))
    # Weights of order one, so that every part affects the logits.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(10)
    return model.eval()


def pixels(count: int = 3, height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(3))


def test_the_L6_preset_has_the_published_shapes():
    with torch.device("meta"):
        model = DartRmtForImageClassification(DartRmtConfig.preset("L6", num_labels=1000))
    ours = [value.squeeze() for name, value in model.state_dict().items() if not name.startswith("dart_rmt.tokenizer")]
    published = golden.manifest("darmt-L6")["tensors"]
    theirs = [
        spec["shape"] for name, spec in published.items() if not name.startswith("pre_image") and "value" not in spec
    ]
    assert sorted(tuple(value.shape) for value in ours) == sorted(
        tuple(size for size in shape if size != 1) for shape in theirs
    )
    assert model.num_parameters() == pytest.approx(100e6, rel=0.01)


@pytest.mark.parametrize("stage", range(4))
def test_frequencies_and_decay_rates_are_the_published_ones(stage):
    """They agree to about one bit of a float32. Rates computed in float64 would differ by 4e-6."""
    config, published = DartRmtConfig.preset("L6"), golden.manifest("darmt-L6")["tensors"]
    heads = config.num_attention_heads[stage]
    expected = torch.tensor(published[f"layers.{stage}.Relpos.angle"]["value"])
    torch.testing.assert_close(rotation_frequencies(config.hidden_sizes[stage] // heads), expected, rtol=2e-7, atol=0)
    expected = torch.tensor(published[f"layers.{stage}.Relpos.decay"]["value"])
    found = decay_rates(config.decay_starts[stage], config.decay_ranges[stage], heads)
    torch.testing.assert_close(found, expected, rtol=3e-7, atol=0)


def literal_retention(retention: DartRmtRetention, states: torch.Tensor, decays: list[float]) -> torch.Tensor:
    """One map (h, w, C) -> (h, w, C), with the decay rate of each head, over all pairs of positions."""
    height, width, channels = states.shape
    rows, columns = torch.cartesian_prod(torch.arange(height), torch.arange(width)).T
    distances = (rows[:, None] - rows).abs() + (columns[:, None] - columns).abs()
    # Chunkwise, positions of the same row attend to each other, and then those of the same column.
    masks = [rows[:, None] == rows, columns[:, None] == columns] if retention.chunkwise else [distances >= 0]
    head_dim = channels // len(decays)
    frequencies = 10000 ** -torch.linspace(0, 1, head_dim // 2, dtype=torch.float64)
    # Pairs of channels are complex numbers, rotated by their frequency times the position's index.
    rotations = torch.polar(torch.ones(()).double(), torch.arange(height * width)[:, None] * frequencies)
    query, key, value = (
        projection(states).flatten(0, 1).split(head_dim, dim=1)
        for projection in (retention.q_proj, retention.k_proj, retention.v_proj)
    )
    heads = []
    for q, k, v, decay in zip(query, key, value, decays, strict=True):
        q, k = (torch.view_as_complex(x.unflatten(1, (-1, 2)).contiguous()) * rotations for x in (q, k))
        logits = (q @ k.conj().T).real / math.sqrt(head_dim) + decay * distances
        for mask in masks:
            v = logits.masked_fill(~mask, -math.inf).softmax(dim=1) @ v
        heads.append(v)
    values = retention.v_proj(states).permute(2, 0, 1)
    convolution = retention.local_conv
    local = conv2d(values, convolution.weight, convolution.bias, padding=2, groups=channels).permute(1, 2, 0)
    return retention.o_proj(torch.cat(heads, dim=1).view_as(states) + local)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("chunkwise", [True, False])
def test_retention_computes_its_definition(chunkwise, implementation):
    settings = {"depths": (1,), "mlp_ratios": (1,), "layer_scale": (False,), "decay_starts": (1,), "decay_ranges": (3,)}
    config = make_config(hidden_sizes=(8,), num_attention_heads=(2,), chunkwise=(chunkwise,), **settings)
    config._attn_implementation = implementation
    torch.manual_seed(0)
    retention, stage = DartRmtRetention(config, 0).double(), DartRmtStage(config, 0, [0.0])
    states = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    found = retention(states, stage.relative_positions(states.permute(0, 3, 1, 2)))
    decays = [math.log(1 - 2 ** (-1 - 3 * head / 2)) for head in range(2)]
    for image in range(2):
        # The model's frequencies and rates are float32 numbers.
        torch.testing.assert_close(found[image], literal_retention(retention, states[image], decays), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "num_patches", "grid"),
    [
        ((64, 64), 1, (1, 1)),
        ((64, 64), 9, (3, 3)),
        ((64, 64), 25, (5, 5)),
        ((48, 80), 15, (3, 5)),
        ((100, 36), 24, (8, 3)),
    ],
)
@pytest.mark.parametrize("partition", ["grid", "uniform"])
def test_maps_have_the_size_of_the_grid_of_regions(size, num_patches, grid, partition):
    model = make_model(partition=partition)
    out = model(pixels(2, *size), num_patches=num_patches, output_regions=True, output_hidden_states=True)
    rows, columns = grid
    assert out.regions.row_edges.shape == (2, rows + 1) and out.regions.strip_edges.shape == (2, rows * columns + 1)
    # The stem divides a size by four, every stage but the last by two. Odd sizes are rounded up.
    steps = (4, 8, 16, 32, 32)
    expected = [(math.ceil(rows * 8 / step), math.ceil(columns * 8 / step)) for step in steps]
    assert [tuple(features.shape[2:]) for features in out.hidden_states] == expected
    assert out.logits.shape == (2, 5) and out.logits.isfinite().all()
    for stage, before, after in zip(model.dart_rmt.stages, out.hidden_states[:-1], out.hidden_states[1:], strict=True):
        torch.testing.assert_close(stage(before), after)


def test_a_uniform_partition_gives_the_plain_network_and_runs_no_scorer(monkeypatch):
    """64 regions of 8×8 pixels, resampled to 8×8, are the image."""
    model = make_model(partition="uniform", num_patches=64)
    monkeypatch.setattr(model.scorer, "forward", None)
    found = model.dart_rmt(pixels(), output_regions=True)
    torch.testing.assert_close(found.last_hidden_state, model.dart_rmt.encode(pixels()).last_hidden_state)
    assert (found.regions.scores == 1).all()


def test_first_strip_edge_moves_only_the_first_edge():
    edges = [make_model(first_strip_edge=edge)(pixels(), output_regions=True).regions.strip_edges for edge in (0, 2)]
    assert (edges[0][:, 0] == 0).all() and (edges[1][:, 0] == 2).all()
    assert torch.equal(edges[0][:, 1:], edges[1][:, 1:])


def test_a_model_may_have_two_stages_and_one_channel():
    stages = {"hidden_sizes": (8, 12), "depths": (2, 1), "num_attention_heads": (1, 2), "mlp_ratios": (3, 1)}
    stages |= {"chunkwise": (True, False), "layer_scale": (False, True), "decay_starts": (2, 2), "decay_ranges": (4, 6)}
    model = make_model(**stages, num_channels=1)
    out = model(pixels()[:, :1], output_hidden_states=True)
    assert [tuple(features.shape[1:]) for features in out.hidden_states] == [(8, 8, 8), (12, 4, 4), (12, 4, 4)]


def test_stochastic_depth_grows_over_all_stages_and_acts_in_training_only():
    model = make_model(drop_path_rate=0.6, depths=(1, 2, 3, 1)).dart_rmt
    layers = [layer for stage in model.stages for layer in stage.layers]
    assert [layer.drop_path.drop_prob for layer in layers] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])

    maps, last = torch.randn(2, 4, 4, 32), layers[-1]
    positions = model.stages[-1].relative_positions(maps.permute(0, 3, 1, 2))
    last.drop_path.drop_prob = 1.0
    undisturbed = maps + last.position_conv(maps)
    assert not torch.allclose(last(maps, positions), undisturbed, atol=1e-2)
    assert torch.equal(last.train()(maps, positions), undisturbed)


def test_layer_scale_multiplies_the_layers_of_its_stages():
    model = make_model(layer_scale=(True, False, False, True), layer_scale_init_value=0.25).dart_rmt
    first, second = model.stages[0].layers[0], model.stages[1].layers[0]
    assert second.layer_scale1 is None and second.layer_scale2 is None
    assert (first.layer_scale1 == 0.25).all() and (first.layer_scale2 == 0.25).all()

    maps = torch.randn(2, 4, 4, 8)
    positions = model.stages[0].relative_positions(maps.permute(0, 3, 1, 2))
    plain = maps + first.position_conv(maps)
    with torch.no_grad():
        scaled = [first(maps, positions)]
        for parameter, value in ((first.layer_scale2, 0.0), (first.layer_scale1, 0.5), (first.layer_scale1, 0.0)):
            parameter.fill_(value)
            scaled.append(first(maps, positions))
    _, once, twice, none = scaled
    assert not torch.equal(scaled[0], once)
    torch.testing.assert_close(twice - plain, 2 * (once - plain))
    assert torch.equal(none, plain)


def test_layer_scale_missing_from_a_checkpoint_is_initialised(tmp_path):
    make_model(layer_scale=(False, False, False, False)).save_pretrained(tmp_path)
    loaded = DartRmtForImageClassification.from_pretrained(
        tmp_path, layer_scale=[True, False, False, False], num_labels=3, ignore_mismatched_sizes=True
    )
    assert (loaded.dart_rmt.stages[0].layers[0].layer_scale1 == 0.5).all()
    assert loaded.classifier.weight.shape == (3, 48) and 0 < loaded.classifier.weight.abs().max() < 0.1


def test_positions_are_computed_in_float32_in_a_half_precision_model():
    """bfloat16 has no odd numbers above 256, and a map of 56×56 has 3,136 positions."""
    stage = make_model().dart_rmt.stages[0]
    expected = stage.relative_positions(torch.zeros(1, 8, 30, 20))
    found = stage.bfloat16().relative_positions(torch.zeros(1, 8, 30, 20, dtype=torch.bfloat16))
    assert torch.equal(found.cos, expected.cos) and torch.equal(found.decays[1], expected.decays[1])
    wide = stage.double().relative_positions(torch.zeros(1, 8, 30, 20, dtype=torch.float64))
    assert wide.cos.dtype == wide.decays[0].dtype == torch.float64
