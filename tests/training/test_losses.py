"""Losses: means over the images of the whole batch, of every kind of target."""

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from dart_hf.training import mean_squared_error, multi_label_cross_entropy, soft_target_cross_entropy

RANDOM = torch.Generator().manual_seed(1)
LOGITS = torch.randn(8, 3, generator=RANDOM)
NUMBERS = torch.randn(8, 3, generator=RANDOM)
# Kind of target -> our loss, torch's, the logits and the targets.
LOSSES = {
    "class indices": (soft_target_cross_entropy, cross_entropy, LOGITS, torch.arange(8) % 3),
    "probabilities": (soft_target_cross_entropy, cross_entropy, LOGITS, NUMBERS.softmax(dim=1)),
    "several labels": (multi_label_cross_entropy, binary_cross_entropy_with_logits, LOGITS, (NUMBERS > 0).float()),
    "numbers": (mean_squared_error, mse_loss, LOGITS, NUMBERS),
    "one number": (mean_squared_error, lambda x, y: mse_loss(x[:, 0], y), LOGITS[:, :1], NUMBERS[:, 0]),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_loss_is_the_mean_over_the_whole_batch(kind):
    loss, torch_loss, logits, targets = LOSSES[kind]
    expected = torch_loss(logits, targets).item()
    assert loss({"logits": logits}, targets).item() == pytest.approx(expected)
    assert loss((logits,), targets).item() == pytest.approx(expected)
    count = 3 * targets.numel()
    for whole in (count, torch.tensor(count), torch.tensor([[count // 2], [count // 2]])):  # the last in DataParallel
        assert loss({"logits": logits}, targets, num_items_in_batch=whole).item() == pytest.approx(expected / 3)


@pytest.mark.parametrize("kind", LOSSES)
def test_images_without_a_label_do_not_count(kind):
    loss, torch_loss, logits, targets = LOSSES[kind]
    logits, targets = logits.clone().requires_grad_(), targets.clone()
    targets[5:] = torch.nan if loss is mean_squared_error else -100
    value = loss({"logits": logits}, targets)
    assert value.item() == pytest.approx(torch_loss(logits[:5], targets[:5]).item())
    value.backward()
    assert logits.grad.isfinite().all() and not logits.grad[5:].any()
    assert loss({"logits": logits[5:]}, targets[5:]).item() == 0


def test_half_precision_is_computed_in_float32():
    soft, half = NUMBERS.softmax(dim=1), LOGITS.to(torch.bfloat16)
    loss = soft_target_cross_entropy({"logits": half}, soft.double())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(cross_entropy(half.float(), soft).item())
    assert soft_target_cross_entropy({"logits": LOGITS.double()}, soft).dtype == torch.float64


@pytest.mark.parametrize(
    ("loss", "labels", "message"),
    [
        (soft_target_cross_entropy, None, "must have labels, got none"),
        (soft_target_cross_entropy, NUMBERS[:, :2], r"shape \(8,\) \(integers\) or \(8, 3\) .* got \(8, 2\)"),
        (soft_target_cross_entropy, torch.ones(8), r"got \(8,\) in torch.float32"),
        (multi_label_cross_entropy, None, "must have labels, got none"),
        (multi_label_cross_entropy, torch.ones(8, 2), r"floating point of shape \(8, 3\), got \(8, 2\)"),
        (multi_label_cross_entropy, torch.ones(8, 3).long(), r"for multi-label classification .* in torch.int64"),
        (mean_squared_error, None, "must have labels, got none"),
        (mean_squared_error, torch.ones(8, 2), r"floating point of shape \(8, 3\), got \(8, 2\)"),
    ],
)
def test_labels_must_suit_the_loss(loss, labels, message):
    with pytest.raises(ValueError, match=message):
        loss({"logits": LOGITS}, labels)
