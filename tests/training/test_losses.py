"""Losses: means over the images of the whole batch, of every kind of target."""

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss, one_hot

from dart_hf.training import mean_squared_error, multi_label_cross_entropy, soft_target_cross_entropy

CLASSES = 3


@pytest.fixture
def logits():
    return torch.randn(8, CLASSES, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def soft():
    return torch.rand(8, CLASSES, generator=torch.Generator().manual_seed(2)).softmax(dim=1)


def test_soft_targets_as_torch_computes_them(logits, soft):
    expected = cross_entropy(logits, soft)
    assert soft_target_cross_entropy({"logits": logits}, soft).item() == pytest.approx(expected.item())
    assert soft_target_cross_entropy((logits,), soft).item() == pytest.approx(expected.item())


def test_class_indices_are_certain_targets(logits):
    labels = torch.arange(8) % CLASSES
    hard = soft_target_cross_entropy({"logits": logits}, labels)
    assert hard.item() == pytest.approx(cross_entropy(logits, labels).item())
    assert hard.item() == pytest.approx(soft_target_cross_entropy({"logits": logits}, one_hot(labels).float()).item())


def test_images_without_a_label_do_not_count(logits, soft):
    labels = torch.arange(8) % CLASSES
    labels[5:], soft[5:] = -100, -100
    logits[6] = torch.nan
    for targets in (labels, soft):
        loss = soft_target_cross_entropy({"logits": logits}, targets)
        assert loss.item() == pytest.approx(cross_entropy(logits[:5], targets[:5]).item())
    assert soft_target_cross_entropy({"logits": logits}, torch.full((8,), -100)).item() == 0


@pytest.mark.parametrize("count", [24, torch.tensor(24), torch.full((2, 1), 12)], ids=["int", "tensor", "DataParallel"])
def test_part_of_a_batch_gives_its_part_of_the_mean(logits, soft, count):
    labels = torch.arange(8) % CLASSES
    mean = cross_entropy(logits, labels).item()
    assert soft_target_cross_entropy({"logits": logits}, labels, num_items_in_batch=count).item() == pytest.approx(
        mean / 3
    )
    mean = cross_entropy(logits, soft).item()
    assert soft_target_cross_entropy({"logits": logits}, soft, count * CLASSES).item() == pytest.approx(mean / 3)


def test_half_precision_is_computed_in_float32(logits, soft):
    half = logits.to(torch.bfloat16)
    loss = soft_target_cross_entropy({"logits": half}, soft.to(torch.float64))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(cross_entropy(half.float(), soft).item())
    assert soft_target_cross_entropy({"logits": logits.double()}, soft).dtype == torch.float64


def test_labels_must_suit_the_logits(logits, soft):
    with pytest.raises(ValueError, match="must have labels, got none"):
        soft_target_cross_entropy({"logits": logits}, None)
    with pytest.raises(ValueError, match=r"shape \(8,\) \(integers\) or \(8, 3\) \(floating point\) .* got \(8, 2\)"):
        soft_target_cross_entropy({"logits": logits}, soft[:, :2])
    with pytest.raises(ValueError, match=r"got \(8,\) in torch.float32"):
        soft_target_cross_entropy({"logits": logits}, torch.ones(8))


@pytest.fixture
def several():
    """Multi-label targets."""
    return torch.randint(2, (8, CLASSES), generator=torch.Generator().manual_seed(5)).float()


def test_multi_label_loss_is_binary_cross_entropy(logits, several):
    expected = binary_cross_entropy_with_logits(logits, several).item()
    assert multi_label_cross_entropy({"logits": logits}, several).item() == pytest.approx(expected)
    part = multi_label_cross_entropy({"logits": logits}, several, num_items_in_batch=24 * CLASSES)
    assert part.item() == pytest.approx(expected / 3)
    several[6:] = -100
    expected = binary_cross_entropy_with_logits(logits[:6], several[:6]).item()
    assert multi_label_cross_entropy({"logits": logits}, several).item() == pytest.approx(expected)


@pytest.mark.parametrize("flat", [True, False])
def test_regression_loss_is_the_mean_squared_error(logits, flat):
    logits, targets = (logits[:, :1], torch.randn(8)) if flat else (logits, torch.randn(8, CLASSES))
    expected = mse_loss(logits[:, 0] if flat else logits, targets).item()
    assert mean_squared_error({"logits": logits}, targets).item() == pytest.approx(expected)
    part = mean_squared_error({"logits": logits}, targets, num_items_in_batch=3 * targets.numel())
    assert part.item() == pytest.approx(expected / 3)


def test_unreadable_image_of_a_regression_gives_no_gradient(logits):
    logits = logits[:, :1].clone().requires_grad_()
    targets = torch.randn(8)
    targets[2] = torch.nan
    loss = mean_squared_error({"logits": logits}, targets)
    readable = torch.arange(8) != 2
    assert loss.item() == pytest.approx(mse_loss(logits[readable, 0], targets[readable]).item())
    loss.backward()
    assert logits.grad.isfinite().all() and logits.grad[2] == 0


def test_labels_must_suit_the_task(logits):
    for loss in (multi_label_cross_entropy, mean_squared_error):
        with pytest.raises(ValueError, match="must have labels, got none"):
            loss({"logits": logits}, None)
        with pytest.raises(ValueError, match=r"floating point of shape \(8, 3\), got \(8, 2\)"):
            loss({"logits": logits}, torch.ones(8, 2))
    with pytest.raises(ValueError, match=r"for multi-label classification .* got \(8, 3\) in torch.int64"):
        multi_label_cross_entropy({"logits": logits}, torch.ones(8, 3).long())
