"""Mixup, cutmix and label smoothing mix pixels and targets alike."""

import pytest
import torch

from dart_hf.data.batch_mixing import MixImages
from dart_hf.data.seeded_rows import seeded


def numbered(labels: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images whose pixels are the numbers of their classes, and the labels."""
    labels = torch.tensor(labels)
    return labels.float().view(-1, 1, 1, 1).expand(-1, 3, 16, 16).clone(), labels


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_a_mixed_batch_has_the_targets_of_its_pixels(kind):
    # Unseeded, a cut can be empty.
    with seeded(0):
        mixed, targets = MixImages(3, **{kind: 1.0})(*numbered([0, 1, 2]))
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(3))
    torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), targets @ torch.arange(3.0), atol=1e-5, rtol=0)
    assert targets.max() < 1


def test_mixup_and_cutmix_take_turns():
    mix, batch = MixImages(2, mixup=1.0, cutmix=1.0), numbered([0, 1])
    with seeded(0):
        batches = [mix(*batch)[0] for _ in range(30)]
    # Cutmix keeps pixels as they are, mixup blends them.
    assert 5 < sum(bool(((mixed > 0) & (mixed < 1)).any()) for mixed in batches) < 25


def test_label_smoothing_spreads_a_share_over_all_classes():
    pixel_values, labels = numbered([1, 3])
    unmixed, targets = MixImages(4, label_smoothing=0.1)(pixel_values, labels)
    assert torch.equal(unmixed, pixel_values)
    torch.testing.assert_close(targets, torch.tensor([[0.025, 0.925, 0.025, 0.025], [0.025, 0.025, 0.025, 0.925]]))


def test_settings_out_of_range_are_refused():
    for settings, message in (({"mixup": -1}, "mixup must be"), ({"label_smoothing": 1.0}, "label_smoothing must be")):
        with pytest.raises(ValueError, match=message):
            MixImages(3, **settings)
