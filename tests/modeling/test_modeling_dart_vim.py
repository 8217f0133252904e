"""DART-Vim: the mixer against its definition, position of the class token, initialisation, precision."""

import math

import pytest
import torch
from helpers.tiny_models import tiny_classifier
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import silu

from dart_hf import DartVimForImageClassification
from dart_hf.modeling.modeling_dart_vim import DartVimMixer, DartVimNorm, DartVimOutput, DartVimScan


def make_new_model(**settings) -> DartVimForImageClassification:
    return tiny_classifier("abcde", "dart_vim", **{"num_hidden_layers": 3, "initializer_range": 0.02, **settings})


def make_model(**settings) -> DartVimForImageClassification:
    """Weights of order one, so that every part affects the logits, and no two channels are alike."""
    model = make_new_model(initializer_range=0.2, score_normalization="running", **settings)
    with torch.no_grad():
        for name, parameter in model.dart_vim.layers.named_parameters():
            if parameter.ndim == 1 or name.endswith("A_log"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def pixels(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(3)).to(dtype)


def literal_direction(scan: DartVimScan, x: torch.Tensor) -> torch.Tensor:
    """Scan one sequence (L, E) forwards, token by token, with the parameters of one direction."""
    rank, states = scan.dt_proj.weight.shape[1], scan.A_log.shape[1]
    kernel = scan.conv1d.weight[:, 0]
    h = torch.zeros_like(scan.A_log)
    results = []
    for t in range(len(x)):
        convolved = scan.conv1d.bias
        for back in range(min(kernel.shape[1], t + 1)):
            convolved = convolved + kernel[:, -1 - back] * x[t - back]
        token = convolved * torch.sigmoid(convolved)
        projected = scan.x_proj.weight @ token
        step, B, C = projected[:rank], projected[rank : rank + states], projected[rank + states :]
        step = torch.log(1 + torch.exp(scan.dt_proj.weight @ step + scan.dt_proj.bias))
        h = torch.exp(-step[:, None] * torch.exp(scan.A_log)) * h + torch.outer(step * token, B)
        results.append(h @ C + scan.D * token)
    return torch.stack(results)


def literal_mixer(mixer: DartVimMixer, hidden_states: torch.Tensor) -> torch.Tensor:
    """One sequence (L, D): both directions read x and the gate z, the second direction from the end."""
    x, z = (hidden_states @ mixer.in_proj.weight.t()).chunk(2, dim=-1)
    forwards = literal_direction(mixer.forward_scan, x) * silu(z)
    backwards = (literal_direction(mixer.backward_scan, x.flip(0)) * silu(z.flip(0))).flip(0)
    return (forwards + backwards) / 2 @ mixer.out_proj.weight.t()


@pytest.mark.parametrize("length", [1, 2, 5, 30])
@pytest.mark.parametrize("settings", [{}, {"conv_kernel": 1, "expand": 1}, {"conv_kernel": 6, "time_step_rank": 5}])
def test_the_mixer_computes_its_definition(length, settings):
    mixer = make_model(**settings).double().dart_vim.layers[1].mixer
    states = torch.randn(2, length, 32, dtype=torch.float64)
    weights = torch.randn(2, length, 32, dtype=torch.float64)
    results = []
    for run in (mixer, lambda states: torch.stack([literal_mixer(mixer, sequence) for sequence in states])):
        output = run(states)
        mixer.zero_grad()
        (output * weights).sum().backward()
        results.append([output.detach(), *(parameter.grad for parameter in mixer.parameters())])
    torch.testing.assert_close(*results)


def test_hidden_states_are_those_of_each_layer():
    model = make_model()
    out = model(pixels(), output_hidden_states=True)
    assert out.attentions is None
    assert [tuple(states.shape) for states in out.hidden_states] == [(3, 10, 32)] * 4
    for layer, before, after in zip(model.dart_vim.layers, out.hidden_states[:-1], out.hidden_states[1:], strict=True):
        torch.testing.assert_close(layer(before), after)
    last = model.dart_vim(pixels()).last_hidden_state
    torch.testing.assert_close(last, model.dart_vim.norm(out.hidden_states[-1]))


@pytest.mark.parametrize(("num_patches", "middle"), [(1, 0), (2, 1), (8, 4), (9, 4), (196, 98)])
def test_the_class_token_is_in_the_middle(num_patches, middle):
    model = make_model().dart_vim
    out = model(pixels(), num_patches=num_patches, output_hidden_states=True)
    tokens, position, _ = model.tokenizer(pixels(), num_patches)
    sequence = out.hidden_states[0]
    torch.testing.assert_close(sequence[:, middle], (model.cls_token + position)[:, 0].expand(3, -1))
    assert torch.equal(sequence[:, :middle], tokens[:, :middle])
    assert torch.equal(sequence[:, middle + 1 :], tokens[:, middle:])
    assert torch.equal(out.pooler_output, out.last_hidden_state[:, middle])


def scans(model) -> list[DartVimScan]:
    return [layer for layer in model.modules() if isinstance(layer, DartVimScan)]


@torch.no_grad()
def assert_initialised(model) -> None:
    """Check the initial weights of Mamba."""
    config = model.config
    for scan in scans(model):
        torch.testing.assert_close(scan.A_log.exp(), torch.arange(1.0, config.state_size + 1).expand_as(scan.A_log))
        assert (scan.D == 1).all()
        bound = config.time_step_rank**-0.5
        assert 0.9 * bound < scan.dt_proj.weight.abs().max() <= bound
        # torch's rule for convolutions; transformers' is a standard deviation of 0.02.
        bound = config.conv_kernel**-0.5
        assert 0.9 * bound < scan.conv1d.weight.abs().max() <= bound
        assert (scan.conv1d.bias == 0).all()
    for layer in model.base_model.layers:
        # Three layers add to the residual stream.
        assert layer.mixer.out_proj.weight.std() == pytest.approx(0.02 / math.sqrt(3), rel=0.1)
    assert 0 < model.base_model.cls_token.std() < 0.1
    steps = torch.cat([nn.functional.softplus(scan.dt_proj.bias) for scan in scans(model)])
    low, high = config.time_step_min, config.time_step_max
    assert 0.999 * low <= steps.min() < 1.2 * low and 0.8 * high < steps.max() <= 1.001 * high
    # Their logarithms lie evenly around the middle.
    assert steps.log().mean() == pytest.approx(math.log(low * high) / 2, abs=0.15 * math.log(high / low))


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"time_step_min": 0.01, "time_step_max": 0.5, "time_step_rank": 7}])
def test_a_new_model_has_mambas_initial_weights(settings):
    model = make_new_model(**settings)
    assert_initialised(model)
    for layer in model.dart_vim.layers:
        assert (layer.norm.weight == 1).all()
        assert layer.mixer.in_proj.weight.std() == pytest.approx(0.02, rel=0.1)
    assert (model.classifier.bias == 0).all()


OWN = ("A_log", ".D", "dt_proj.weight", "dt_proj.bias", "conv1d.weight", "conv1d.bias", "out_proj.weight", "cls_token")


@pytest.mark.parametrize("missing", [*OWN, OWN])
def test_only_weights_missing_from_a_checkpoint_are_initialised(missing, tmp_path):
    """They get the values of a new model, although loading first builds the model without memory."""
    model = make_new_model()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if not name.endswith(missing)}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, info = DartVimForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == set(tensors) - set(kept)
    assert_initialised(loaded)
    for name, value in kept.items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_stochastic_depth_grows_with_depth_and_drops_in_training_only():
    model = make_model(drop_path_rate=0.4).dart_vim
    assert [layer.drop_path.drop_prob for layer in model.layers] == pytest.approx([0.0, 0.2, 0.4])
    states, last = torch.randn(2, 10, 32), model.layers[-1]
    last.drop_path.drop_prob = 1.0
    assert not torch.allclose(last(states), states, atol=1e-2)
    assert torch.equal(last.train()(states), states)


@pytest.mark.parametrize(("dtype", "wide"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_the_residual_stream_has_at_least_float32_precision(dtype, wide):
    model = make_model().to(dtype)
    out = model.dart_vim(pixels(), output_hidden_states=True)
    assert {states.dtype for states in out.hidden_states} == {wide}
    assert out.last_hidden_state.dtype == out.pooler_output.dtype == dtype
    # A large sum keeps the small result that a layer adds.
    layer, residual = model.dart_vim.layers[0], 256 + torch.randn(2, 10, 32, dtype=wide)
    assert torch.equal(layer(residual) - residual, (residual + layer.mixer(layer.norm(residual))) - residual)
    assert not torch.equal(layer(residual).to(torch.bfloat16).to(wide), layer(residual))


@pytest.mark.parametrize("mode", ["weights", "autocast"])
def test_time_steps_are_computed_in_float32(mode, monkeypatch):
    """A bfloat16 number near -7, where the bias of a small time step lies, is wrong by up to 1.6% of the step."""
    seen = []

    def record_dtypes(x, delta, A, *others):
        seen.append((x.dtype, delta.dtype, A.dtype))
        return x

    monkeypatch.setattr("dart_hf.modeling.modeling_dart_vim.selective_scan", record_dtypes)
    model = make_model().to(torch.bfloat16 if mode == "weights" else torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        model(pixels())
    assert set(seen) == {(torch.bfloat16, torch.float32, torch.float32)} and len(seen) == 2 * 3


def test_the_norm_has_the_precision_of_the_residual_stream():
    norm = DartVimNorm(4, eps=1e-5).half()
    normalised = norm(torch.tensor([[1e6, -1e6, 1e6, 0.0]]))
    assert normalised.dtype == torch.float16
    torch.testing.assert_close(normalised[0], torch.tensor([1.1547, -1.1547, 1.1547, 0.0]).half())


def test_only_true_linear_layers_extend_nn_linear():
    """Tools for adapters and quantisation replace every `nn.Linear`. Some of them leave subclasses out."""
    layers = [layer for layer in make_model().modules() if isinstance(layer, nn.Linear)]
    assert all(type(layer).forward is nn.Linear.forward for layer in layers)
    assert {type(layer) for layer in layers} == {nn.Linear, DartVimOutput}


@pytest.mark.slow
def test_a_second_budget_compiles_for_all_further_budgets():
    torch.compiler.reset()
    model = make_model(num_hidden_layers=1).double()
    images = pixels(torch.float64)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    graphs = []
    with torch.no_grad():
        for num_patches in (9, 10, 12, 20):
            found = compiled(images, num_patches=num_patches).logits
            torch.testing.assert_close(found, model(images, num_patches=num_patches).logits)
            graphs.append(counter.frame_count)
    assert graphs[0] < graphs[1] == graphs[-1]
