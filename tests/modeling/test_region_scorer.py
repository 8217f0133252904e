"""Scorer: trunks, heads, standardisation, freezing."""

import math
import socket
from urllib.error import URLError

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import multiprocessing as mp

from dart_hf.modeling.configuration_dart import DartConfig
from dart_hf.modeling.configuration_region import TORCHVISION_TRUNKS
from dart_hf.modeling.region_scorer import RegionScorer
from dart_hf.modeling.score_statistics import ScoreStatistics
from dart_hf.modeling.scorer_trunk import build_trunk


def make_scorer(**settings) -> RegionScorer:
    torch.manual_seed(0)
    return RegionScorer(DartConfig(**{"scorer": "conv", **settings}))


@pytest.mark.parametrize("head", ["v1", "v2"])
@pytest.mark.parametrize("scorer", [*TORCHVISION_TRUNKS, "conv", "timm/resnet10t", "timm/swin_tiny_patch4_window7_224"])
def test_every_trunk_scores_a_grid(scorer, head):
    model = make_scorer(scorer=scorer, scorer_head=head, image_size=224)
    # Random BatchNorm statistics let features vanish; those of a batch do not.
    model.train()
    model.trunk.train()
    with torch.no_grad():
        pixels = torch.randn(2, 3, 224, 224)
        features = model.trunk(pixels)
        scores = model(pixels)
    assert features.shape[1] == build_trunk(model.config)[1]
    assert scores.shape == (2, 14, 14)
    assert scores.isfinite().all()
    assert scores.flatten(1).std(dim=1).min() > 0.01


@pytest.mark.parametrize("size", [(7, 7), (20, 28), (1, 3)])
def test_scores_are_resized_bilinearly(size):
    """Against the rule written out: cell centres align, borders repeat."""
    model = make_scorer(score_normalization="image", score_grid_size=5).double().eval()
    logits = torch.randn(1, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model.head.forward = lambda features: logits
    model.head.squash = lambda standardized: standardized

    def weights(cells: int) -> torch.Tensor:
        matrix = torch.zeros(5, cells, dtype=torch.float64)
        for target in range(5):
            position = max((target + 0.5) * cells / 5 - 0.5, 0)
            low = min(int(position), cells - 1)
            matrix[target, low] += 1 - (position - low)
            matrix[target, min(low + 1, cells - 1)] += position - low
        return matrix

    resized = weights(size[0]) @ logits[0] @ weights(size[1]).T
    expected = (resized - resized.mean()) / (resized.std() + 1e-8)
    torch.testing.assert_close(model(torch.zeros(1, 3, 32, 32, dtype=torch.float64))[0], expected)


@pytest.mark.parametrize(("scorer", "hidden"), [("mobilenet_v3_small", 96), ("mobilenet_v3_large", 160), ("conv", 96)])
def test_width_of_the_per_cell_head(scorer, hidden):
    assert make_scorer(scorer=scorer).head.fc1.out_features == hidden


def test_heads_compute_their_definition():
    for head in ("v1", "v2"):
        model = make_scorer(scorer_head=head).double().head
        f = torch.randn(2, 96, 3, 5, dtype=torch.float64)
        logits = model(f)
        for image in range(2):
            for row in range(3):
                for column in range(5):
                    cell = f[image, :, row, column]
                    if head == "v1":
                        expected = model.fc2(torch.nn.functional.gelu(model.fc1(cell)))[0]
                    else:
                        hidden = torch.nn.functional.gelu(model.fc1(f[image].mean(dim=(1, 2))))
                        expected = (cell * torch.sigmoid(model.fc2(hidden))).sum()
                    torch.testing.assert_close(logits[image, row, column], expected)
    assert make_scorer(scorer_head="v1").head.squash(torch.tensor(0.0)) == 0.6
    assert make_scorer(scorer_head="v2").head.squash(torch.tensor(1.0)) == torch.sigmoid(torch.tensor(2.0))


# --- standardisation -------------------------------------------------------------------------------------------------


def grids(count: int = 5) -> torch.Tensor:
    return 3 + 2 * torch.randn(count, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_batch_normalization_is_the_published_rule():
    logits = grids()
    found = ScoreStatistics().eval()(logits, "batch")
    torch.testing.assert_close(found, (logits - logits.mean()) / (logits.std() + 1e-8))


def test_image_normalization_uses_each_image():
    logits = grids()
    for training in (True, False):
        found = ScoreStatistics().train(training)(logits, "image")
        expected = torch.stack([(image - image.mean()) / (image.std() + 1e-8) for image in logits])
        torch.testing.assert_close(found, expected)


def test_running_normalization_trains_on_the_batch_and_evaluates_on_what_it_kept():
    statistics = ScoreStatistics().double().train()
    first, second = grids(), 5 * grids() - 1
    torch.testing.assert_close(statistics(first, "running"), statistics.eval()(first, "batch"))
    torch.testing.assert_close(statistics.running_mean, first.mean())
    torch.testing.assert_close(statistics.running_var, first.var())
    statistics.train()(second, "running")
    mean = 0.9 * first.mean() + 0.1 * second.mean()
    variance = 0.9 * first.var() + 0.1 * second.var()
    torch.testing.assert_close(statistics.running_mean, mean)
    torch.testing.assert_close(statistics.running_var, variance)
    assert statistics.num_batches_tracked == 2
    other = grids(1)
    torch.testing.assert_close(statistics.eval()(other, "running"), (other - mean) / (variance.sqrt() + 1e-8))
    assert statistics.num_batches_tracked == 2


def test_batch_statistics_carry_gradients():
    logits = grids().requires_grad_(True)
    weights = torch.randn(5, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: (ScoreStatistics().double()(s, "running") * weights).sum(), (logits,))


def test_running_without_statistics_uses_the_image_and_says_so_once(warnings_of):
    statistics = ScoreStatistics().eval()
    logits = grids()
    torch.testing.assert_close(statistics(logits, "running"), ScoreStatistics()(logits, "image"))
    statistics(logits, "running")
    assert [text for text in warnings_of() if "before the first training step" in text] == warnings_of()
    assert len(warnings_of()) == 1


def test_training_under_the_published_rule_keeps_statistics():
    statistics = ScoreStatistics().double().train()
    statistics(grids(), "batch")
    torch.testing.assert_close(statistics.running_var, grids().var())
    assert statistics.num_batches_tracked == 1


def test_batch_normalization_warns_once_and_only_for_several_images(warnings_of):
    statistics = ScoreStatistics().eval()
    statistics(grids(1), "batch")
    assert warnings_of() == []
    statistics(grids(2), "batch")
    statistics(grids(2), "batch")
    assert len(warnings_of()) == 1
    assert "other images of its batch" in warnings_of()[0]


@pytest.mark.parametrize("normalization", ["running", "image", "batch"])
@pytest.mark.parametrize("spoil", [math.nan, math.inf, -math.inf, 1e300, "constant"])
def test_an_unusable_image_changes_neither_its_neighbours_nor_the_statistics(normalization, spoil):
    logits = grids().requires_grad_(True)
    bad = torch.full((1, 4, 4), 2.0, dtype=torch.float64)
    if spoil != "constant":
        bad[0, 1, 1] = spoil
    alone, together = ScoreStatistics().double(), ScoreStatistics().double()
    expected = alone(logits, normalization)
    found = together(torch.cat([logits, bad]), normalization)
    torch.testing.assert_close(found[:-1], expected)
    assert (found[-1] == 0).all()
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(together.state_dict()[name], value)
    (gradient,) = torch.autograd.grad(found.square().sum() + found[0, 0, 0], logits)
    assert gradient.isfinite().all()


def test_a_batch_without_a_usable_image_leaves_the_statistics():
    statistics = ScoreStatistics()
    statistics(torch.full((2, 4, 4), math.nan), "running")
    assert statistics.num_batches_tracked == 0
    assert statistics.running_mean == 0 and statistics.running_var == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", ["to", "autocast"])
def test_half_precision_changes_no_score(dtype, cast):
    model, pixels = make_scorer(scorer="mobilenet_v3_small").eval(), torch.randn(2, 3, 64, 64)
    expected = model(pixels)
    if cast == "autocast":
        with torch.autocast("cpu", dtype=dtype):
            scores = model(pixels)
    else:
        scores = model.to(dtype)(pixels)
    assert torch.equal(scores, expected)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32, torch.int64}
    assert model.double()(pixels.half()).dtype == torch.float64


def _one_of_two_processes(rank: int, port: int, logits: torch.Tensor, results) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mine = logits[rank * 3 : rank * 3 + 3].clone().requires_grad_(True)
    statistics = ScoreStatistics().double()
    weights = torch.arange(48, dtype=torch.float64).view(3, 4, 4)
    found = statistics(mine, "running")
    (gradient,) = torch.autograd.grad((found * weights).sum(), mine)
    # Of the second process no image is usable here: it must come to the same statistics as the first.
    lonely = statistics(logits[:3] if rank == 0 else torch.full_like(mine, math.nan), "running")
    kept = {name: value.clone() for name, value in statistics.state_dict().items()}
    # In evaluation a process may be alone: this would wait for ever if it asked the other one.
    alone = statistics.eval()(logits[:3], "batch") if rank == 0 else None
    results[rank] = (found.detach(), gradient, lonely.detach(), kept, alone)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_training_standardises_over_all_processes_and_evaluation_does_not():
    logits = grids(6)
    logits[4, 0, 0] = math.nan  # of the second process: it counts fewer images than the first
    usable = torch.tensor([0, 1, 2, 3, 5])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_one_of_two_processes, args=(port, logits, results), nprocs=2)
        first, second = results[0], results[1]

    single = ScoreStatistics().double()
    whole = logits.clone().requires_grad_(True)
    expected = single(whole, "running")
    weights = torch.arange(48, dtype=torch.float64).view(3, 4, 4).repeat(2, 1, 1)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), whole)
    torch.testing.assert_close(torch.cat([first[0], second[0]]), expected.detach())
    torch.testing.assert_close(torch.cat([first[1], second[1]])[usable], gradient[usable])

    torch.testing.assert_close(first[2], single(logits[:3], "running"))
    for name, value in single.state_dict().items():
        torch.testing.assert_close(first[3][name], value)
        torch.testing.assert_close(second[3][name], value)
    torch.testing.assert_close(first[4], ScoreStatistics().eval()(logits[:3], "batch"))


@pytest.mark.slow
def test_distributed_training_compiles_as_one_graph():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("fake", store=store, rank=0, world_size=2)
    try:
        statistics = ScoreStatistics().double()
        logits = grids().requires_grad_(True)
        compiled = torch.compile(statistics, fullgraph=True, backend="aot_eager")
        found = compiled(logits, "running")
        found.square().sum().backward()
        assert logits.grad.isfinite().all()
    finally:
        torch.distributed.destroy_process_group()
        torch.compiler.reset()


# --- freezing --------------------------------------------------------------------------------------------------------


def trunk_state(scorer: RegionScorer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in scorer.trunk.state_dict().items()}


def train_one_step(scorer: RegionScorer) -> None:
    optimizer = torch.optim.SGD([p for p in scorer.parameters() if p.requires_grad], lr=1.0)
    (scorer(torch.randn(4, 3, 64, 64)) * torch.randn(4, 14, 14)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("scorer", ["mobilenet_v3_small", "conv"])
@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_trunks_stay_and_others_train(scorer, frozen):
    model = make_scorer(scorer=scorer, scorer_frozen=frozen).train()
    assert model.trunk.training != frozen
    assert all(parameter.requires_grad != frozen for parameter in model.trunk.parameters())
    before, head = trunk_state(model), model.head.fc1.weight.clone()
    train_one_step(model)
    moved = {name for name, value in trunk_state(model).items() if not torch.equal(value, before[name])}
    if frozen:
        assert not moved
    else:
        assert any(name.endswith("weight") for name in moved)
        assert any("running_mean" in name for name in moved)
    if scorer == "conv":
        assert not torch.equal(model.head.fc1.weight, head)


def test_a_nan_image_spoils_no_trunk_in_training():
    model = make_scorer().train()
    pixels = torch.randn(3, 3, 64, 64)
    pixels[1, 0, 5, 5] = math.nan
    scores = model(pixels)
    assert scores.isfinite().all()
    assert scores[1].unique().numel() == 1 and scores[0].unique().numel() > 1
    assert all(value.isfinite().all() for value in model.state_dict().values())
    scores.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# --- weights ---------------------------------------------------------------------------------------------------------


def test_a_frozen_trunk_without_weights_says_so_once(warnings_of):
    model = make_scorer(scorer="mobilenet_v3_small").eval()
    for _ in range(2):
        with torch.no_grad():
            model(torch.randn(1, 3, 64, 64))
    dead = [text for text in warnings_of() if "The scorer is dead" in text]
    assert len(dead) == 1
    assert "load_pretrained_scorer" in dead[0]


def test_trained_and_unfrozen_trunks_are_not_dead(warnings_of):
    model = make_scorer(scorer_frozen=False)
    assert not model.is_dead
    train_one_step(model)
    model.set_frozen(True)
    assert not model.is_dead
    model.eval()(torch.randn(1, 3, 64, 64))
    assert not [text for text in warnings_of() if "dead" in text]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("whole", [True, False])
def test_torchvision_weights_from_a_file(tmp_path, suffix, whole):
    source = torchvision.models.mobilenet_v3_small(weights=None)
    state_dict = source.state_dict() if whole else source.features[:11].state_dict()
    path = tmp_path / f"weights{suffix}"
    save_file(state_dict, path) if suffix == ".safetensors" else torch.save(state_dict, path)
    model = make_scorer(scorer="mobilenet_v3_small")
    assert model.is_dead
    model.load_pretrained_trunk(path)
    assert not model.is_dead
    for name, value in source.features[:11].state_dict().items():
        assert torch.equal(model.trunk.state_dict()[name], value)


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto"])
def test_timm_weights_from_a_file(tmp_path, name):
    source = timm.create_model(name, pretrained=False)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    model = make_scorer(scorer=f"timm/{name}")
    model.load_pretrained_trunk(tmp_path / "weights.pth")
    assert not model.is_dead
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = source.eval().forward_intermediates(pixels, intermediates_only=True)[-1]
        torch.testing.assert_close(model.features(pixels)[0], expected)


def test_the_library_download_is_what_is_loaded(monkeypatch):
    source = torchvision.models.mobilenet_v3_small(weights=None).state_dict()
    asked = []

    def download(url, **options):
        asked.append((url, options.get("check_hash")))
        return source

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    model = make_scorer(scorer="mobilenet_v3_small")
    model.load_pretrained_trunk()
    assert len(asked) == 1 and "mobilenet_v3_small" in asked[0][0] and asked[0][1] is True
    assert torch.equal(model.trunk[0][0].weight, source["features.0.0.weight"])


class WritesAFile:
    """Its pickle writes a file when it is executed."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return type(self.path).touch, (self.path,)


def test_a_failed_download_says_what_else_can_be_done(monkeypatch):
    def download(url, **options):
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    model = make_scorer(scorer="mobilenet_v3_small")
    with pytest.raises(OSError, match=r"could not be downloaded .*no route to host.*give a local file"):
        model.load_pretrained_trunk()
    assert model.is_dead


def test_timm_weights_from_the_library(monkeypatch):
    plain = timm.create_model("resnet10t", pretrained=False, features_only=True, out_indices=(-1,))
    model = make_scorer(scorer="timm/resnet10t")
    asked = []

    def create(name, pretrained, **options):
        asked.append((name, pretrained))
        return plain

    monkeypatch.setattr(timm, "create_model", create)
    model.load_pretrained_trunk()
    assert asked == [("resnet10t", True)]
    assert not model.is_dead
    for name, value in plain.state_dict().items():
        assert torch.equal(model.trunk.model.state_dict()[name], value)


def test_unsuitable_weights_are_refused_and_change_nothing(tmp_path):
    model = make_scorer(scorer="mobilenet_v3_small")
    before = trunk_state(model)
    good = torchvision.models.mobilenet_v3_small(weights=None).state_dict()

    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth do not exist"):
        model.load_pretrained_trunk(tmp_path / "nowhere.pth")
    torch.save(
        {name: value for name, value in good.items() if name != "features.3.block.0.0.weight"}, tmp_path / "a.pth"
    )
    with pytest.raises(ValueError, match=r"has no tensor '3\.block\.0\.0\.weight'"):
        model.load_pretrained_trunk(tmp_path / "a.pth")
    torch.save({**good, "features.0.0.weight": torch.zeros(16, 3, 5, 5)}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"'0\.0\.weight' in shape \(16, 3, 5, 5\)"):
        model.load_pretrained_trunk(tmp_path / "b.pth")
    torch.save({"optimizer": good}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match="are not a state dict"):
        model.load_pretrained_trunk(tmp_path / "c.pth")
    for name in ("d.pth", "d.safetensors"):
        (tmp_path / name).write_bytes(b"nonsense")
        with pytest.raises(ValueError, match="damaged, or cannot be read without executing code"):
            model.load_pretrained_trunk(tmp_path / name)
    torch.save(WritesAFile(tmp_path / "written"), tmp_path / "e.pth")
    with pytest.raises(ValueError, match="damaged, or cannot be read without executing code"):
        model.load_pretrained_trunk(tmp_path / "e.pth")
    assert not (tmp_path / "written").exists()
    with pytest.raises(ValueError, match="no pretrained weights"):
        make_scorer(scorer="conv").load_pretrained_trunk()

    assert model.is_dead
    assert all(torch.equal(value, before[name]) for name, value in trunk_state(model).items())


def test_unknown_trunks_are_refused():
    with pytest.raises(ValueError, match="scorer='resnet18' is unknown: accepted are 'conv', 'timm/<name>'"):
        DartConfig(scorer="resnet18")
    with pytest.raises(ValueError, match="scorer='timm/nonsense' cannot be built"):
        RegionScorer(DartConfig(scorer="timm/nonsense"))
    with pytest.raises(ValueError, match="reads 3 channels, got num_channels=1"):
        DartConfig(num_channels=1)
    assert RegionScorer(DartConfig(num_channels=1, scorer="conv"))(torch.randn(2, 1, 32, 32)).shape == (2, 14, 14)
