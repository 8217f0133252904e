"""Trunks: the published layers, and that running them fast changes nothing."""

import pytest
import torch
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dart_hf.modeling.configuration_dart import DartConfig
from dart_hf.modeling.configuration_region import TORCHVISION_TRUNKS
from dart_hf.modeling.scorer_trunk import FoldingSequential, build_trunk, folded_weights

TRUNKS = (*TORCHVISION_TRUNKS, "conv")
HEADS = {scorer: ("v1", "v2") if scorer.startswith("mobilenet") else ("v1",) for scorer in TRUNKS}


def make_trunk(scorer: str, head: str = "v1") -> nn.Module:
    """In evaluation mode, with BatchNorm statistics that let features of order one through."""
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
    """Every layer for itself: a hook makes each BatchNorm run as it is."""
    hooks = [
        module.register_forward_hook(lambda *_: None)
        for module in trunk.modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
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


def batch_norms(run) -> int:
    with torch.no_grad(), Operations() as operations:
        run()
    return sum("batch_norm" in name for name in operations.names)


@pytest.mark.parametrize(
    ("scorer", "head", "channels", "stride"),
    [
        ("mobilenet_v3_small", "v1", 96, 32),
        ("mobilenet_v3_small", "v2", 576, 32),
        ("mobilenet_v3_large", "v1", 160, 32),
        ("mobilenet_v3_large", "v2", 960, 32),
        ("efficientnet_b0", "v1", 1280, 32),
        ("mnasnet1_0", "v1", 1280, 32),
    ],
)
def test_published_trunks_read_the_published_layers(scorer, head, channels, stride):
    trunk, num_features = build_trunk(DartConfig(scorer=scorer, scorer_head=head))
    with torch.no_grad():
        assert trunk.eval()(torch.randn(1, 3, 128, 96)).shape == (1, channels, 128 // stride, 96 // stride)
    assert num_features == channels


@pytest.mark.parametrize(("scorer", "head"), [(scorer, head) for scorer in TRUNKS for head in HEADS[scorer]])
def test_folding_changes_no_number(scorer, head):
    trunk = make_trunk(scorer, head)
    expected = run_unfolded(trunk, pixels())
    assert expected.abs().mean() > 1e-3
    torch.testing.assert_close(trunk(pixels()), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scorer", TRUNKS)
def test_no_published_trunk_runs_a_batch_norm_in_evaluation_mode(scorer):
    trunk = make_trunk(scorer)
    normalizations = sum(isinstance(module, nn.BatchNorm2d) for module in trunk.modules())
    assert batch_norms(lambda: trunk(pixels())) == 0
    assert batch_norms(lambda: run_unfolded(trunk, pixels())) == normalizations
    assert batch_norms(lambda: trunk.train()(pixels())) == normalizations


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
def test_folded_weights_are_the_two_layers_in_one(bias, affine, groups):
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 6, 3, bias=bias, groups=groups).double()
    norm = nn.BatchNorm2d(6, affine=affine).double()
    for tensor in (*norm.parameters(), *norm.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 2)
    weight, offset = folded_weights(convolution, norm.eval())
    expected = norm(convolution(pixels()))
    torch.testing.assert_close(nn.functional.conv2d(pixels(), weight, offset, groups=groups), expected)


@pytest.mark.parametrize("change", ["load_state_dict", "half precision and back", "in place", "behind autograd's back"])
def test_whatever_changes_the_weights_takes_effect(change):
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
            (target.data if change == "behind autograd's back" else target).copy_(source)
    assert (trunk(pixels()) - before).abs().max() > 1e-3
    torch.testing.assert_close(trunk(pixels()), run_unfolded(other, pixels()))


@pytest.mark.parametrize("scorer", TORCHVISION_TRUNKS)
def test_folding_does_not_show_in_the_state_dict(scorer):
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


def test_whoever_listens_to_a_layer_hears_it():
    """A hook on a folded layer would never be called."""
    for register in (
        lambda layer, hear: layer.register_forward_hook(hear),
        lambda layer, hear: layer.register_forward_pre_hook(hear),
        lambda layer, hear: layer.register_full_backward_hook(hear),
        lambda layer, hear: layer.register_full_backward_pre_hook(hear),
    ):
        for position in (0, 1):
            sequence, heard = FoldingSequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double().eval(), []
            register(sequence[position], lambda *_, heard=heard: heard.append(1))
            sequence(pixels().requires_grad_()).sum().backward()
            assert heard == [1]


def test_subclasses_of_batch_norm_run_as_they_are():
    class Doubling(nn.BatchNorm2d):
        def forward(self, features):
            return 2 * super().forward(features)

    sequence = FoldingSequential(nn.Conv2d(3, 4, 3), Doubling(4)).double().eval()
    plain = FoldingSequential(sequence[0], nn.BatchNorm2d(4)).double().eval()
    torch.testing.assert_close(sequence(pixels()), 2 * plain(pixels()))
