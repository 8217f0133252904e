"""DART-RMT: retention by its definition, any map, stochastic depth, half precision."""

import cmath
import math

import golden
import numpy as np
import pytest
import torch

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


TWO_STAGES = {
    "hidden_sizes": (8, 12),
    "depths": (2, 1),
    "num_attention_heads": (1, 2),
    "mlp_ratios": (3, 1),
    "chunkwise": (True, False),
    "layer_scale": (False, True),
    "decay_starts": (2, 2),
    "decay_ranges": (4, 6),
}


def make_model(**settings) -> DartRmtForImageClassification:
    torch.manual_seed(0)
    model = DartRmtForImageClassification(make_config(**settings))
    # Weights of order one, so that every part matters for the logits.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(10)
    return model.eval()


def pixels(count: int = 3, height: int = 64, width: int = 64, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(3)).to(dtype)


# --- the published sizes ---------------------------------------------------------------------------------------------


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
    """To the last bit of a float32 or so: computed in float64, the rates would be off by 4e-6."""
    config, published = DartRmtConfig.preset("L6"), golden.manifest("darmt-L6")["tensors"]
    heads = config.num_attention_heads[stage]
    expected = torch.tensor(published[f"layers.{stage}.Relpos.angle"]["value"])
    torch.testing.assert_close(rotation_frequencies(config.hidden_sizes[stage] // heads), expected, rtol=2e-7, atol=0)
    expected = torch.tensor(published[f"layers.{stage}.Relpos.decay"]["value"])
    found = decay_rates(config.decay_starts[stage], config.decay_ranges[stage], heads)
    torch.testing.assert_close(found, expected, rtol=3e-7, atol=0)


# --- retention -------------------------------------------------------------------------------------------------------


def literal_attention(query, key, value, places, decay: float) -> np.ndarray:
    """One head's attention over positions that have places: query and key complex (L, E/2), value (L, E)."""
    result = np.zeros_like(value)
    for i, here in enumerate(places):
        logits = [
            # Pairs of channels as complex numbers: what counts is the angle between query and key.
            (query[i] @ key[j].conj()).real / math.sqrt(2 * len(query[i])) + decay * np.abs(here - there).sum()
            for j, there in enumerate(places)
        ]
        weights = np.exp(logits) / np.exp(logits).sum()
        result[i] = sum(weight * value[j] for j, weight in enumerate(weights))
    return result


def turned(channels: np.ndarray) -> np.ndarray:
    """(h, w, E) -> complex (h, w, E/2): each pair of channels turned by its frequency times the position's index."""
    height, width, head_dim = channels.shape
    pairs = channels[..., ::2] + 1j * channels[..., 1::2]
    for row in range(height):
        for column in range(width):
            for pair in range(head_dim // 2):
                frequency = 10000 ** -(pair / max(head_dim // 2 - 1, 1))
                pairs[row, column, pair] *= cmath.exp(1j * (row * width + column) * frequency)
    return pairs


def literal_local_convolution(value: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """5×5, of each channel by itself: (h, w, C) -> (h, w, C)."""
    height, width, _ = value.shape
    result = np.zeros_like(value) + bias
    for row in range(height):
        for column in range(width):
            for i in range(5):
                for j in range(5):
                    y, x = row + i - 2, column + j - 2
                    if 0 <= y < height and 0 <= x < width:
                        result[row, column] += weight[:, 0, i, j] * value[y, x]
    return result


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("chunkwise", [True, False])
def test_retention_is_what_its_definition_says(chunkwise, implementation):
    height, width, heads, head_dim = 3, 5, 2, 4
    settings = {"depths": (1,), "mlp_ratios": (1,), "layer_scale": (False,), "decay_starts": (1,), "decay_ranges": (3,)}
    config = make_config(hidden_sizes=(8,), num_attention_heads=(heads,), chunkwise=(chunkwise,), **settings)
    config._attn_implementation = implementation
    torch.manual_seed(0)
    retention, stage = DartRmtRetention(config, 0).double(), DartRmtStage(config, 0, [0.0])
    states = torch.randn(2, height, width, 8, dtype=torch.float64)
    with torch.no_grad():
        found = retention(states, stage.relative_positions(states.permute(0, 3, 1, 2)))
        projections = (retention.q_proj(states), retention.k_proj(states), retention.v_proj(states))

    places = np.stack(np.meshgrid(range(height), range(width), indexing="ij"), axis=-1)
    for image in range(2):
        query, key, value = (projection[image].numpy() for projection in projections)
        retained = np.zeros_like(value)
        for head in range(heads):
            channels = slice(head * head_dim, (head + 1) * head_dim)
            q, k, v = turned(query[..., channels]), turned(key[..., channels]), value[..., channels].copy()
            decay = math.log(1 - 2 ** (-1 - 3 * head / heads))
            if chunkwise:
                for row in range(height):
                    v[row] = literal_attention(q[row], k[row], v[row], places[row], decay)
                for column in range(width):
                    v[:, column] = literal_attention(q[:, column], k[:, column], v[:, column], places[:, column], decay)
            else:
                flat = (array.reshape(height * width, -1) for array in (q, k, v, places))
                v = literal_attention(*flat, decay).reshape(v.shape)
            retained[..., channels] = v
        convolution, out = retention.local_conv, retention.o_proj
        local = literal_local_convolution(value, convolution.weight.detach().numpy(), convolution.bias.detach().numpy())
        expected = (retained + local) @ out.weight.detach().numpy().T + out.bias.detach().numpy()
        # The model's frequencies and rates are float32 numbers.
        np.testing.assert_allclose(found[image].numpy(), expected, rtol=0, atol=1e-6)


# --- outputs, budgets, maps ------------------------------------------------------------------------------------------


def test_outputs():
    model = make_model()
    labels = torch.tensor([0, 1, 4])
    out = model(pixels(), labels=labels, output_hidden_states=True)
    assert out.logits.shape == (3, 5) and out.regions is None and out.attentions is None
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, labels))
    # A rebuilt image of 4×4 regions of 8×8 pixels.
    shapes = [(3, 8, 8, 8), (3, 16, 4, 4), (3, 24, 2, 2), (3, 32, 1, 1), (3, 32, 1, 1)]
    assert [tuple(features.shape) for features in out.hidden_states] == shapes
    for stage, before, after in zip(model.dart_rmt.stages, out.hidden_states[:-1], out.hidden_states[1:], strict=True):
        torch.testing.assert_close(stage(before), after)
    bare = model.dart_rmt(pixels())
    assert bare.hidden_states is None
    torch.testing.assert_close(bare.last_hidden_state, out.hidden_states[-1])
    torch.testing.assert_close(model.classifier(bare.pooler_output), out.logits)


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
def test_any_budget_and_image_shape(size, num_patches, grid, partition):
    model = make_model(partition=partition)
    out = model(pixels(2, *size), num_patches=num_patches, output_regions=True, output_hidden_states=True)
    rows, columns = grid
    assert out.regions.row_edges.shape == (2, rows + 1) and out.regions.strip_edges.shape == (2, rows * columns + 1)
    # Two steps down in the stem, and one at the end of every stage but the last; odd sizes are rounded up.
    steps = (4, 8, 16, 32, 32)
    expected = [(math.ceil(rows * 8 / step), math.ceil(columns * 8 / step)) for step in steps]
    assert [tuple(features.shape[2:]) for features in out.hidden_states] == expected
    assert out.logits.shape == (2, 5) and out.logits.isfinite().all()


def test_a_uniform_partition_is_the_plain_network_and_needs_no_scorer(monkeypatch):
    """64 regions of 8×8 pixels, resampled to 8×8, are the image."""
    model = make_model(partition="uniform", num_patches=64)
    monkeypatch.setattr(model.scorer, "forward", None)
    found = model.dart_rmt(pixels(), output_regions=True)
    torch.testing.assert_close(found.last_hidden_state, model.dart_rmt.encode(pixels()))
    assert (found.regions.scores == 1).all()


def test_the_published_strip_starts_at_its_third_column():
    edges = [make_model(first_strip_edge=edge)(pixels(), output_regions=True).regions.strip_edges for edge in (0, 2)]
    assert (edges[0][:, 0] == 0).all() and (edges[1][:, 0] == 2).all()
    assert torch.equal(edges[0][:, 1:], edges[1][:, 1:])


@pytest.mark.parametrize("partition", ["grid", "uniform"])
def test_a_budget_that_fills_no_grid_is_refused(partition):
    model = make_model(partition=partition).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"num_patches=13 does not fill the 4 rows .* the nearest .* are 12 and 16"):
        model(pixels(), num_patches=13)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_any_number_of_stages_and_channels():
    model = make_model(**TWO_STAGES, num_channels=1)
    out = model(pixels()[:, :1], output_hidden_states=True)
    assert [tuple(features.shape[1:]) for features in out.hidden_states] == [(8, 8, 8), (12, 4, 4), (12, 4, 4)]


# --- training --------------------------------------------------------------------------------------------------------


def test_stochastic_depth_grows_over_the_stages_and_drops_in_training_only():
    model = make_model(drop_path_rate=0.6, depths=(1, 2, 3, 1)).dart_rmt
    layers = [layer for stage in model.stages for layer in stage.layers]
    assert [layer.drop_path.drop_prob for layer in layers] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])

    maps, last = torch.randn(2, 4, 4, 32), layers[-1]
    positions = model.stages[-1].relative_positions(maps.permute(0, 3, 1, 2))
    last.drop_path.drop_prob = 1.0
    undisturbed = maps + last.position_conv(maps)
    assert not torch.allclose(last(maps, positions), undisturbed, atol=1e-2)
    assert torch.equal(last.train()(maps, positions), undisturbed)


def test_layer_scale_is_a_setting_of_the_stage():
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


# --- loading ---------------------------------------------------------------------------------------------------------


def test_what_a_checkpoint_lacks_is_initialised(tmp_path):
    make_model(layer_scale=(False, False, False, False)).save_pretrained(tmp_path)
    loaded = DartRmtForImageClassification.from_pretrained(
        tmp_path, layer_scale=[True, False, False, False], num_labels=3, ignore_mismatched_sizes=True
    )
    assert (loaded.dart_rmt.stages[0].layers[0].layer_scale1 == 0.5).all()
    assert loaded.classifier.weight.shape == (3, 48) and 0 < loaded.classifier.weight.abs().max() < 0.1


# --- half precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["weights", "autocast"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("dtype", "noise"), [(torch.bfloat16, 0.05), (torch.float16, 0.006)])
def test_half_precision_keeps_the_partition(dtype, noise, implementation, mode, tmp_path):
    model = make_model(num_patches=64)
    model.set_attn_implementation(implementation)
    expected = model(pixels(), output_regions=True)
    if mode == "weights":
        model.save_pretrained(tmp_path)
        model = DartRmtForImageClassification.from_pretrained(tmp_path, dtype=dtype, attn_implementation=implementation)
        assert {parameter.dtype for parameter in model.scorer.parameters()} == {torch.float32}
        found = model(pixels(), output_regions=True)
    else:
        with torch.autocast("cpu", dtype=dtype):
            found = model(pixels(), output_regions=True)
    assert torch.equal(found.regions.strip_edges, expected.regions.strip_edges)
    assert found.logits.dtype == dtype
    assert 0 < (found.logits - expected.logits).abs().max() / expected.logits.abs().max() < noise


def test_positions_are_computed_in_float32_in_a_half_precision_model():
    """bfloat16 knows no odd number above 256, and a map of 56×56 has 3,136 positions."""
    stage = make_model().dart_rmt.stages[0]
    expected = stage.relative_positions(torch.zeros(1, 8, 30, 20))
    found = stage.bfloat16().relative_positions(torch.zeros(1, 8, 30, 20, dtype=torch.bfloat16))
    assert torch.equal(found.cos, expected.cos) and torch.equal(found.decays[1], expected.decays[1])
    wide = stage.double().relative_positions(torch.zeros(1, 8, 30, 20, dtype=torch.float64))
    assert wide.cos.dtype == wide.decays[0].dtype == torch.float64
