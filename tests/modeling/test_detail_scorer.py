"""The scorer "detail": local contrast without a network."""

import itertools
import math

import pytest
import torch
from helpers.tiny_models import ENCODERS, tiny_classifier

from dart_hf.modeling.configuration_dart import DartConfig
from dart_hf.modeling.region_scorer import RegionScorer
from dart_hf.modeling.scorer_trunk import CONTRAST_FLOOR, build_trunk


def share(index: int, size: int, cell: int, grid_size: int) -> float:
    """The length of a cell that one of `size` equal parts of the same line covers."""
    return max(0.0, min((index + 1) / size, (cell + 1) / grid_size) - max(index / size, cell / grid_size))


def contrast(luminance: torch.Tensor, grid_size: int, row: int, column: int) -> float:
    """Mean absolute difference of horizontal neighbours in a cell, plus that of vertical ones."""
    height, width = luminance.shape
    total = 0.0
    for step_y, step_x in ((0, 1), (1, 0)):
        rows, columns = height - step_y, width - step_x
        weighted = weights = 0.0
        for y, x in itertools.product(range(rows), range(columns)):
            weight = share(y, rows, row, grid_size) * share(x, columns, column, grid_size)
            weighted += weight * abs(luminance[y + step_y, x + step_x] - luminance[y, x]).item()
            weights += weight
        total += weighted / weights if weights else 0.0
    return total


@pytest.mark.parametrize("num_channels", [3, 2])
@pytest.mark.parametrize("size", [(8, 8), (7, 10), (2, 3), (1, 6), (5, 1), (1, 1)])
def test_the_map_is_the_logarithm_of_the_contrast(size, num_channels):
    grid_size = 4
    trunk, num_features = build_trunk(DartConfig(scorer="detail", num_channels=num_channels, score_grid_size=grid_size))
    images = torch.randn(2, num_channels, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = trunk(images)
    assert found.shape == (2, num_features, grid_size, grid_size)
    for number, row, column in itertools.product(range(2), range(grid_size), range(grid_size)):
        if num_channels == 3:
            luminance = 0.299 * images[number, 0] + 0.587 * images[number, 1] + 0.114 * images[number, 2]
        else:
            luminance = images[number].mean(dim=0)
        expected = math.log(contrast(luminance, grid_size, row, column) + CONTRAST_FLOOR)
        assert found[number, 0, row, column].item() == pytest.approx(expected, abs=1e-9)
    assert trunk(images.bfloat16()).dtype == torch.float32


def test_gain_and_offset_act_between_standardisation_and_sigmoid():
    scorer = RegionScorer(DartConfig(scorer="detail", score_normalization="image")).eval()
    images = torch.randn(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    logits = scorer.trunk(images)[:, 0]
    standardized = (logits - logits.mean(dim=(1, 2), keepdim=True)) / logits.std(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(scorer(images), standardized.sigmoid() + 0.1, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        scorer.head.squash.gain.fill_(3)
        scorer.head.squash.offset.fill_(-1)
    torch.testing.assert_close(scorer(images), (3 * standardized - 1).sigmoid() + 0.1, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ENCODERS)
def test_regions_follow_content_at_once(model_type):
    """A textured quarter of a flat image gets much more than a quarter of the regions, before any training."""
    model = tiny_classifier(model_type=model_type, scorer="detail", score_grid_size=8, score_normalization="image")
    image = torch.zeros(1, 3, 64, 64)
    image[:, :, 8:40, 24:56] = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))
    inside = []
    for shown in (image, torch.zeros_like(image)):
        with torch.no_grad():
            found = model(shown, num_patches=64, output_regions=True).regions.boxes()
        x, y = (found.boxes[0, :, :2] + found.boxes[0, :, 2:]).unbind(1)
        within = (x > 48) & (x < 112) & (y > 16) & (y < 80)
        inside.append(found.tokens[0][within].unique().numel())
    assert inside[1] == 16
    assert inside[0] >= 24


def test_it_learns_a_gain_and_an_offset_and_nothing_else():
    model = tiny_classifier(scorer="detail", score_normalization="running").train()
    learned = dict(model.scorer.named_parameters())
    assert learned.keys() == {"head.squash.gain", "head.squash.offset"}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 3, 32, 32), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    optimizer.step()
    assert learned["head.squash.gain"] != 1 and learned["head.squash.offset"] != 0
    assert model.scorer.statistics.num_batches_tracked == 1


def test_images_without_detail_or_with_nan_get_constant_scores_and_change_no_others():
    scorer = RegionScorer(DartConfig(scorer="detail"))
    images = torch.randn(4, 3, 50, 30, generator=torch.Generator().manual_seed(0))
    images[1] = 0.7
    images[2, 0, 3, 4] = math.nan
    scores = scorer(images)
    assert scores.isfinite().all()
    assert scores[1].unique().numel() == scores[2].unique().numel() == 1
    torch.testing.assert_close(scores[[0, 3]], RegionScorer(scorer.config)(images[[0, 3]]))


def test_it_is_never_dead_has_no_weights_to_load_and_nothing_to_unfreeze(warnings_of):
    model = tiny_classifier(scorer="detail", scorer_frozen=False)
    model.freeze_scorer(False)
    assert model.config.scorer_frozen and not model.scorer.is_dead
    model.require_scorer_weights()
    assert not [text for text in warnings_of() if "dead" in text]
    with pytest.raises(
        ValueError, match=r"scorer='detail' has no pretrained weights: it computes the local contrast\.$"
    ):
        model.load_pretrained_scorer()
