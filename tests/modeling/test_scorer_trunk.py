"""Trunks: the published layers, and folding of BatchNorm into convolutions."""

import pytest
import torch
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dart_hf.modeling import scorer_trunk
from dart_hf.modeling.configuration_dart import DartConfig
from dart_hf.modeling.configuration_region import TORCHVISION_TRUNKS
from dart_hf.modeling.scorer_trunk import FoldingSequential, build_trunk, folded_weights, run_frozen

TRUNKS = (*TORCHVISION_TRUNKS, "conv")
HEADS = {scorer: ("v1", "v2") if scorer.startswith("mobilenet") else ("v1",) for scorer in TRUNKS}


def make_trunk(scorer: str, head: str = "v1") -> nn.Module:
    """A trunk in evaluation mode whose BatchNorm statistics give features of order one."""
    torch.manual_seed(0)
    trunk = build_trunk(DartConfig(scorer=scorer, scorer_head=head))[0].double()
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    with torch.no_grad():
        trunk.train()(pixels(4))
    return trunk.eval()


def pixels(count: int = 2, height: int = 64, width: int = 96) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def run_unfolded(trunk: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Run every layer separately: a hook on each BatchNorm prevents folding."""
    norms = [module for module in trunk.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [norm.register_forward_hook(lambda *_: None) for norm in norms]
    features = trunk(images)
    for hook in hooks:
        hook.remove()
    return features


class Operations(TorchDispatchMode):
    """Counts the operations that run inside it, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def count_batch_norms(run) -> int:
    with torch.no_grad(), Operations() as operations:
        run()
    return sum("batch_norm" in name for name in operations.names)


@torch.no_grad()
@pytest.mark.parametrize(
    ("scorer", "head", "channels"),
    [
        ("mobilenet_v3_small", "v1", 96),
        ("mobilenet_v3_small", "v2", 576),
        ("mobilenet_v3_large", "v1", 160),
        ("mobilenet_v3_large", "v2", 960),
        ("efficientnet_b0", "v1", 1280),
        ("mnasnet1_0", "v1", 1280),
    ],
)
def test_published_trunks_have_the_published_layers(scorer, head, channels):
    trunk, num_features = build_trunk(DartConfig(scorer=scorer, scorer_head=head))
    assert trunk.eval()(torch.randn(1, 3, 128, 96)).shape == (1, channels, 128 // 32, 96 // 32)
    assert num_features == channels


@pytest.mark.parametrize(("scorer", "head"), [(scorer, head) for scorer in TRUNKS for head in HEADS[scorer]])
def test_folding_does_not_change_the_features(scorer, head):
    trunk = make_trunk(scorer, head)
    expected = run_unfolded(trunk, pixels())
    assert expected.abs().mean() > 1e-3
    torch.testing.assert_close(trunk(pixels()), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scorer", TRUNKS)
def test_evaluation_runs_no_batch_norm_and_training_runs_all(scorer):
    trunk = make_trunk(scorer)
    normalizations = sum(isinstance(module, nn.BatchNorm2d) for module in trunk.modules())
    assert count_batch_norms(lambda: trunk(pixels())) == 0
    assert count_batch_norms(lambda: run_unfolded(trunk, pixels())) == normalizations
    assert count_batch_norms(lambda: trunk.train()(pixels())) == normalizations


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
def test_folded_weights_compute_convolution_and_batch_norm(bias, affine, groups):
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 6, 3, bias=bias, groups=groups).double()
    norm = nn.BatchNorm2d(6, affine=affine).double()
    for tensor in (*norm.parameters(), *norm.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 2)
    weight, offset = folded_weights(convolution, norm.eval())
    expected = norm(convolution(pixels()))
    torch.testing.assert_close(nn.functional.conv2d(pixels(), weight, offset, groups=groups), expected)


@pytest.mark.parametrize("change", ["load_state_dict", "half precision and back", "in place", "through .data"])
def test_changed_weights_take_effect(change):
    trunk, other = make_trunk("conv"), make_trunk("conv")
    before = trunk(pixels())
    for module in other.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.add_(0.5)
    if change == "load_state_dict":
        trunk.load_state_dict(other.state_dict())
    elif change == "half precision and back":
        trunk.bfloat16().double()
        other.bfloat16().double()
        torch.testing.assert_close(trunk(pixels()), before, rtol=0.1, atol=0.1)
        assert not torch.equal(trunk(pixels()), before)
        trunk.load_state_dict(other.state_dict())
    else:
        for target, source in zip(trunk.state_dict().values(), other.state_dict().values(), strict=True):
            (target.data if change == "through .data" else target).copy_(source)
    assert (trunk(pixels()) - before).abs().max() > 1e-3
    torch.testing.assert_close(trunk(pixels()), run_unfolded(other, pixels()))


@pytest.mark.parametrize("scorer", TORCHVISION_TRUNKS)
def test_folding_does_not_change_the_state_dict(scorer):
    part = "layers" if scorer == "mnasnet1_0" else "features"
    published = getattr(torchvision.models.get_model(scorer, weights=None), part).state_dict()
    ours = build_trunk(DartConfig(scorer=scorer))[0].state_dict()
    assert list(ours) == [name for name in published if name in ours]
    assert all(ours[name].shape == published[name].shape for name in ours)


def test_gradients_pass_through_folded_layers():
    trunk = make_trunk("conv")
    gradients = []
    for run in (trunk, lambda images: run_unfolded(trunk, images)):
        trunk.zero_grad()
        run(pixels()).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in trunk.parameters()])
    for folded, unfolded in zip(*gradients, strict=True):
        torch.testing.assert_close(folded, unfolded)


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_hooks_on_a_layer_are_called(kind, position):
    """A folded layer would not call its hooks."""
    sequence, calls = FoldingSequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double().eval(), []
    getattr(sequence[position], f"register_{kind}")(lambda *_: calls.append(1))
    sequence(pixels().requires_grad_()).sum().backward()
    assert calls == [1]


def test_subclasses_of_batch_norm_are_not_folded():
    class Doubling(nn.BatchNorm2d):
        def forward(self, features):
            return 2 * super().forward(features)

    sequence = FoldingSequential(nn.Conv2d(3, 4, 3), Doubling(4)).double().eval()
    plain = FoldingSequential(sequence[0], nn.BatchNorm2d(4)).double().eval()
    torch.testing.assert_close(sequence(pixels()), 2 * plain(pixels()))


@torch.no_grad()
@pytest.mark.parametrize(("images_at_once", "groups"), [(3.9, [3, 3, 1]), (0.5, [1] * 7), (100, [7])])
def test_frozen_trunk_runs_a_few_images_at_a_time(monkeypatch, images_at_once, groups):
    trunk, images, sizes = make_trunk("conv"), pixels(7), []
    expected = trunk(images)
    monkeypatch.setattr(scorer_trunk, "PIXELS_AT_ONCE", int(images_at_once * 64 * 96))
    trunk.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    torch.testing.assert_close(run_frozen(trunk, images), expected)
    assert sizes == groups
