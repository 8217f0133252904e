"""The scorer: trunks, heads, normalisation of scores, freezing, pretrained weights."""

import itertools
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
    # With random BatchNorm statistics features would vanish.
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
    """Cell centres are aligned, and borders repeat."""
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
def test_the_v1_head_has_the_published_width(scorer, hidden):
    assert make_scorer(scorer=scorer).head.fc1.out_features == hidden


@pytest.mark.parametrize("head", ["v1", "v2"])
def test_heads_compute_their_definition(head):
    model = make_scorer(scorer_head=head).double().head
    features = torch.randn(2, 96, 3, 5, dtype=torch.float64)
    logits = model(features)
    for image, row, column in itertools.product(range(2), range(3), range(5)):
        cell = features[image, :, row, column]
        if head == "v1":
            expected = model.fc2(torch.nn.functional.gelu(model.fc1(cell)))[0]
        else:
            hidden = torch.nn.functional.gelu(model.fc1(features[image].mean(dim=(1, 2))))
            expected = (cell * torch.sigmoid(model.fc2(hidden))).sum()
        torch.testing.assert_close(logits[image, row, column], expected)
    if head == "v1":
        assert model.squash(torch.tensor(0.0)) == 0.6
    else:
        assert model.squash(torch.tensor(1.0)) == torch.sigmoid(torch.tensor(2.0))


def grids(count: int = 5) -> torch.Tensor:
    return 3 + 2 * torch.randn(count, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def normalized(logits: torch.Tensor) -> torch.Tensor:
    return (logits - logits.mean()) / (logits.std() + 1e-8)


@pytest.mark.parametrize("training", [True, False])
def test_batch_and_image_normalization_compute_their_definition(training):
    logits, statistics = grids(), ScoreStatistics().double().train(training)
    torch.testing.assert_close(statistics(logits, "batch"), normalized(logits))
    torch.testing.assert_close(statistics(logits, "image"), torch.stack([normalized(image) for image in logits]))


@pytest.mark.parametrize("normalization", ["running", "batch"])
def test_training_keeps_running_statistics_and_evaluation_uses_them(normalization):
    statistics = ScoreStatistics().double().train()
    first, second = grids(), 5 * grids() - 1
    torch.testing.assert_close(statistics(first, normalization), normalized(first))
    torch.testing.assert_close(statistics.running_mean, first.mean())
    torch.testing.assert_close(statistics.running_var, first.var())
    statistics(second, normalization)
    mean = 0.9 * first.mean() + 0.1 * second.mean()
    variance = 0.9 * first.var() + 0.1 * second.var()
    torch.testing.assert_close(statistics.running_mean, mean)
    torch.testing.assert_close(statistics.running_var, variance)
    other = grids(1)
    torch.testing.assert_close(statistics.eval()(other, "running"), (other - mean) / (variance.sqrt() + 1e-8))
    assert statistics.num_batches_tracked == 2


def test_gradients_pass_through_batch_statistics():
    weights = torch.randn(5, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    logits = grids().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda s: (ScoreStatistics().double()(s, "running") * weights).sum(), (logits,))


def test_without_running_statistics_scores_are_normalised_by_image_with_one_warning(warnings_of):
    statistics, logits = ScoreStatistics().eval(), grids()
    for _ in range(2):
        torch.testing.assert_close(statistics(logits, "running"), ScoreStatistics()(logits, "image"))
    (warning,) = warnings_of()
    assert "before the first training step" in warning


def test_batch_normalization_of_several_images_warns_once(warnings_of):
    statistics = ScoreStatistics().eval()
    statistics(grids(1), "batch")
    assert warnings_of() == []
    for _ in range(2):
        statistics(grids(2), "batch")
    (warning,) = warnings_of()
    assert "other images of its batch" in warning


@pytest.mark.parametrize("normalization", ["running", "image", "batch"])
@pytest.mark.parametrize("spoil", [math.nan, math.inf, -math.inf, 1e300, "constant"])
def test_an_unusable_image_affects_no_other_image_and_no_statistics(normalization, spoil):
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
    before = {name: value.clone() for name, value in alone.state_dict().items()}
    assert (alone(bad, normalization) == 0).all()
    assert all(torch.equal(value, before[name]) for name, value in alone.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", ["to", "autocast"])
def test_half_precision_does_not_change_the_scores(dtype, cast):
    model, pixels = make_scorer(scorer="mobilenet_v3_small").eval(), torch.randn(2, 3, 64, 64)
    expected = model(pixels)
    with torch.autocast("cpu", dtype=dtype, enabled=cast == "autocast"):
        scores = (model.to(dtype) if cast == "to" else model)(pixels)
    assert torch.equal(scores, expected)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32, torch.int64}
    assert model.double()(pixels.half()).dtype == torch.float64


def _run_process(rank: int, port: int, logits: torch.Tensor, results) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mine = logits[rank * 3 : rank * 3 + 3].clone().requires_grad_(True)
    statistics = ScoreStatistics().double()
    weights = torch.arange(48, dtype=torch.float64).view(3, 4, 4)
    found = statistics(mine, "running")
    (gradient,) = torch.autograd.grad((found * weights).sum(), mine)
    # The second process has no usable image here, but must get the same statistics.
    one_sided = statistics(logits[:3] if rank == 0 else torch.full_like(mine, math.nan), "running")
    kept = {name: value.clone() for name, value in statistics.state_dict().items()}
    # Only one process evaluates, and must not wait for the other.
    alone = statistics.eval()(logits[:3], "batch") if rank == 0 else None
    results[rank] = (found.detach(), gradient, one_sided.detach(), kept, alone)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_training_normalises_over_all_processes_and_evaluation_does_not():
    logits = grids(6)
    logits[4, 0, 0] = math.nan  # the second process has fewer usable images than the first
    usable = torch.tensor([0, 1, 2, 3, 5])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_run_process, args=(port, logits, results), nprocs=2)
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


def trunk_state(scorer: RegionScorer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in scorer.trunk.state_dict().items()}


def train_one_step(scorer: RegionScorer) -> None:
    optimizer = torch.optim.SGD([p for p in scorer.parameters() if p.requires_grad], lr=1.0)
    (scorer(torch.randn(4, 3, 64, 64)) * torch.randn(4, 14, 14)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("scorer", ["mobilenet_v3_small", "conv"])
@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_trunks_do_not_change_in_training_and_others_do(scorer, frozen):
    model = make_scorer(scorer=scorer, scorer_frozen=frozen).train()
    before = trunk_state(model)
    train_one_step(model)
    changed = {name for name, value in trunk_state(model).items() if not torch.equal(value, before[name])}
    assert any(name.endswith("weight") for name in changed) != frozen
    assert any("running_mean" in name for name in changed) != frozen
    assert not (frozen and changed)


def test_an_image_of_nan_keeps_training_finite():
    model = make_scorer().train()
    pixels = torch.randn(3, 3, 64, 64)
    pixels[1, 0, 5, 5] = math.nan
    scores = model(pixels)
    assert scores.isfinite().all()
    assert scores[1].unique().numel() == 1 and scores[0].unique().numel() > 1
    assert all(value.isfinite().all() for value in model.state_dict().values())
    scores.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_frozen_trunk_without_weights_warns_once(warnings_of):
    model = make_scorer(scorer="mobilenet_v3_small").eval()
    for _ in range(2):
        with torch.no_grad():
            model(torch.randn(1, 3, 64, 64))
    (warning,) = (text for text in warnings_of() if "The scorer is dead" in text)
    assert "load_pretrained_scorer" in warning


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
def test_torchvision_weights_are_loaded_from_a_file(tmp_path, suffix, whole):
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
def test_timm_weights_are_loaded_from_a_file(tmp_path, name):
    source = timm.create_model(name, pretrained=False)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    model = make_scorer(scorer=f"timm/{name}")
    model.load_pretrained_trunk(tmp_path / "weights.pth")
    assert not model.is_dead
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = source.eval().forward_intermediates(pixels, intermediates_only=True)[-1]
        torch.testing.assert_close(model.features(pixels)[0], expected)


def test_torchvision_weights_are_downloaded(monkeypatch):
    source = torchvision.models.mobilenet_v3_small(weights=None).state_dict()
    requests = []

    def download(url, check_hash, **options):
        requests.append((url, check_hash))
        if len(requests) == 1:
            raise URLError("no route to host")
        return source

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    model = make_scorer(scorer="mobilenet_v3_small")
    with pytest.raises(OSError, match=r"could not be downloaded .*no route to host.*give a local file"):
        model.load_pretrained_trunk()
    assert model.is_dead
    model.load_pretrained_trunk()
    assert "mobilenet_v3_small" in requests[1][0] and requests[1][1] is True
    assert torch.equal(model.trunk[0][0].weight, source["features.0.0.weight"])


def test_timm_weights_are_downloaded(monkeypatch):
    source = timm.create_model("resnet10t", pretrained=False, features_only=True, out_indices=(-1,))
    model = make_scorer(scorer="timm/resnet10t")
    requests = []

    def create(name, pretrained, **options):
        requests.append((name, pretrained))
        return source

    monkeypatch.setattr(timm, "create_model", create)
    model.load_pretrained_trunk()
    assert requests == [("resnet10t", True)]
    assert not model.is_dead
    assert all(torch.equal(model.trunk.model.state_dict()[name], value) for name, value in source.state_dict().items())


class WritesAFile:
    """Unpickling it would write a file."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return type(self.path).touch, (self.path,)


def test_unsuitable_weights_are_refused_and_change_nothing(tmp_path):
    model, path = make_scorer(scorer="mobilenet_v3_small"), tmp_path / "weights.pth"
    before = trunk_state(model)
    good = torchvision.models.mobilenet_v3_small(weights=None).state_dict()
    missing = "features.3.block.0.0.weight"
    for content, message in [
        (None, r"weights\.pth do not exist"),
        ({name: good[name] for name in good if name != missing}, r"has no tensor '3\.block\.0\.0\.weight'"),
        ({**good, "features.0.0.weight": torch.zeros(16, 3, 5, 5)}, r"'0\.0\.weight' in shape \(16, 3, 5, 5\)"),
        ({"optimizer": good}, "are not a state dict"),
        (WritesAFile(tmp_path / "written"), "damaged, or cannot be read without executing code"),
    ]:
        if content is not None:
            torch.save(content, path)
        with pytest.raises(FileNotFoundError if content is None else ValueError, match=message):
            model.load_pretrained_trunk(path)
    assert not (tmp_path / "written").exists()
    for damaged in (path, tmp_path / "weights.safetensors"):
        damaged.write_bytes(b"nonsense")
        with pytest.raises(ValueError, match="damaged, or cannot be read without executing code"):
            model.load_pretrained_trunk(damaged)
    with pytest.raises(ValueError, match="no pretrained weights"):
        make_scorer(scorer="conv").load_pretrained_trunk()
    assert model.is_dead
    assert all(torch.equal(value, before[name]) for name, value in trunk_state(model).items())


def test_a_timm_trunk_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="scorer='timm/nonsense' cannot be built"):
        make_scorer(scorer="timm/nonsense")


def test_a_conv_trunk_reads_any_number_of_channels():
    assert make_scorer(num_channels=1)(torch.randn(2, 1, 32, 32)).shape == (2, 14, 14)
