"""The benchmark measures what its report says. No test looks at how fast anything is."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from dart_hf.benchmark import Settings, run_benchmark
from dart_hf.benchmark.models import PUBLISHED_ACCURACY, BenchmarkModel, benchmark_models, choose_models
from dart_hf.benchmark.report import COMPARISONS
from dart_hf.benchmark.timing import PARTS, interleave, parts_of, training_step

TINY = [
    BenchmarkModel("DART", "Ti", 64, 9),
    BenchmarkModel("timm", "Ti", 32, 4),
    BenchmarkModel("transformers", "Ti", 32, 4),
]
CUDA = torch.cuda.is_available()
NAMES = ["DART-Ti@9", "DeiT-Ti@32", "ViT-Ti@32"]


@pytest.fixture(scope="module")
def tiny_models() -> Iterator[None]:
    """The benchmark with the real models, but small images."""
    with pytest.MonkeyPatch.context() as replaced:
        replaced.setattr("dart_hf.benchmark.models.benchmark_models", lambda: TINY)
        pairs = (("DART-Ti@9", "DeiT-Ti@32"), ("DART-Ti@9", "absent"))
        replaced.setattr("dart_hf.benchmark.report.COMPARISONS", pairs)
        replaced.setattr("dart_hf.benchmark.run.PUBLISHED_ACCURACY", {"DART-Ti@9": 50.0})
        yield


@pytest.fixture(scope="module")
def results(tiny_models, tmp_path_factory) -> tuple[dict[str, Any], Path, str]:
    """What a run returns, its folder, and what it reports. Each model's memory takes a process of its own."""
    output, lines = tmp_path_factory.mktemp("benchmark") / "made", []
    settings = Settings(batch_size=2, rounds=1, calls=3)
    found = run_benchmark(output, settings, ["DART-*", "DeiT-*"], report=lines.append)
    return found, output, "\n".join(lines)


def test_every_model_has_times_speed_and_memory(results):
    found, output, text = results
    assert json.loads((output / "benchmark.json").read_text()) == json.loads(json.dumps(found))
    for name in ("time_split.png", "throughput.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    assert [entry["name"] for entry in found["models"]] == NAMES[:2]
    for entry in found["models"]:
        for times in (entry["inference"], entry["training"]):
            low, high = times["quartiles"]
            assert 0 < low <= times["median"] <= high and times["samples"] == 3
        assert entry["inference"]["images_per_second"] == pytest.approx(2e3 / entry["inference"]["median"], rel=1e-2)
        assert entry["parameters"] > 5e6
        assert 0 < entry["peak_memory"]["inference"] < entry["peak_memory"]["training"]
        assert entry["name"] in text
    dart, deit = found["models"]
    assert tuple(dart["parts"]) == PARTS and set(dart["encoders"]) == {"ours", "timm"}
    assert "parts" not in deit and "encoders" not in deit
    assert found["settings"]["batch_size"] == 2 and found["command"]
    assert found["machine"]["processor"] in text
    assert set(found["machine"]["packages"]) >= {"dart-hf", "torch", "timm"}


def test_comparisons_are_ratios_of_medians(results):
    dart, deit = results[0]["models"]
    (comparison,) = results[0]["comparisons"]
    assert (comparison["model"], comparison["peer"]) == ("DART-Ti@9", "DeiT-Ti@32")
    ours, theirs = dart["inference"]["median"], deit["inference"]["median"]
    scoring = ours - dart["parts"]["encoder + head"]["median"]
    expected = {
        "throughput": theirs / ours,
        "inference_time_all_tokens": (scoring + dart["encoders"]["ours"]["median"]) / theirs,
        "inference_time": ours / theirs,
        "training_time": dart["training"]["median"] / deit["training"]["median"],
        "inference_memory": dart["peak_memory"]["inference"] / deit["peak_memory"]["inference"],
        "training_memory": dart["peak_memory"]["training"] / deit["peak_memory"]["training"],
    }
    assert {name: comparison[name] for name in expected} == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("changed", [{"dtype": "bfloat16"}, {"compile": True, "compile_mode": "default"}])
def test_dtype_and_compile_settings_reach_the_models(tmp_path, monkeypatch, tiny_models, changed):
    seen, compiled, build = [], [], BenchmarkModel.build

    def recorded(entry, attention):
        model = build(entry, attention)
        model.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].dtype))
        return model

    monkeypatch.setattr(torch, "compile", lambda run, mode, dynamic: compiled.append(mode) or run)
    monkeypatch.setattr(BenchmarkModel, "build", recorded)
    settings = Settings(batch_size=1, rounds=1, calls=1, training=False, memory=False, **changed)
    found = run_benchmark(tmp_path, settings)
    assert set(seen) == {torch.bfloat16 if "dtype" in changed else torch.float32}
    # Three models, four parts and two encoders.
    assert compiled == (["default"] * 9 if "compile" in changed else [])
    assert [entry["name"] for entry in found["models"]] == NAMES
    assert "training" not in found["models"][0] and "peak_memory" not in found["models"][0]


def test_training_step_changes_weights_but_not_the_frozen_trunk(monkeypatch):
    built, build = [], BenchmarkModel.build
    monkeypatch.setattr(BenchmarkModel, "build", lambda entry, _: built.append(build(entry)) or built[-1])
    step = training_step(TINY[0], Settings(batch_size=2, dtype="bfloat16"))
    before = {name: tensor.clone() for name, tensor in built[0].state_dict().items()}
    step()
    changed = {name for name, tensor in built[0].state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed >= {"dart.tokenizer.projection.weight", "classifier.weight"}
    assert not any(".trunk." in name for name in changed)


@pytest.mark.parametrize("entry", TINY, ids=NAMES)
@torch.no_grad()
def test_attention_setting_reaches_every_family(entry):
    original = torch.nn.functional.scaled_dot_product_attention
    for attention, expected in (("sdpa", 12), ("eager", 0)):
        with patch.object(torch.nn.functional, "scaled_dot_product_attention", wraps=original) as fused:
            entry.build(attention).eval()(torch.zeros(1, 3, entry.image_size, entry.image_size))
        assert fused.call_count == expected


def test_models_take_turns():
    """There is one untimed round. In each other round each model has an untimed call, then the timed ones."""
    calls = []
    runs = {(name,): lambda name=name: calls.append(name) or time.sleep(0.002) for name in "ab"}
    times = interleave(runs, Settings(rounds=2, calls=2), "test")
    assert "".join(calls) == "ab" + "aaabbb" * 2
    assert {name: len(samples) for (name,), samples in times.items()} == {"a": 4, "b": 4}
    assert all(sample > 0 for samples in times.values() for sample in samples)


def test_models_with_another_scorer_are_chosen_only_by_name(monkeypatch):
    monkeypatch.setattr("dart_hf.benchmark.models.benchmark_models", benchmark_models)
    chosen = [entry.name for entry in choose_models(["DART-S@392*", "DART-*/encoder"])]
    assert chosen == ["DART-S@392", "DART-Ti@196/encoder", "DART-S@392/encoder"]


def test_published_numbers_and_comparisons_are_of_benchmark_models():
    names = {entry.name for entry in benchmark_models()}
    assert {"DART-Ti@121", "DART-S@392", "DART-Vim-S@196", "DART-RMT-L6@196", "DeiT-B@224", "ViT-S@448"} <= names
    assert set(PUBLISHED_ACCURACY) <= names and {name for pair in COMPARISONS for name in pair} <= names


@pytest.mark.parametrize(("size", "scorer"), [("Ti", None), ("Ti", "encoder"), ("Vim-Ti", None), ("RMT-S", None)])
def test_parts_compute_the_logits_of_the_whole(size, scorer):
    model = BenchmarkModel("DART", size, 64, 9, scorer).build().eval()
    images = torch.randn(2, 3, 64, 64)
    parts = parts_of(model, images, Settings())
    assert tuple(parts) == PARTS
    with torch.inference_mode():
        *_, logits = [run() for run in parts.values()]
        torch.testing.assert_close(logits, model(images).logits)


@pytest.mark.parametrize("size", ["Ti", "S", "B"])
def test_timm_and_transformers_models_have_the_same_size(size):
    with torch.device("meta"):
        deit, vit = (BenchmarkModel(family, size, 224, 196).build() for family in ("timm", "transformers"))
    assert sum(p.numel() for p in deit.parameters()) == sum(p.numel() for p in vit.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0."),
        ({"rounds": 0}, "rounds must be at least 1, got 0."),
        ({"threads": 0}, "threads must be at least 1, got 0."),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'."),
        ({"attention": "flash"}, "attention must be 'sdpa' or 'eager', got 'flash'."),
        ({"compile_mode": "fast", "compile": True}, "compile_mode must be one of default, reduce-overhead, .*'fast'."),
        ({"compile_mode": "reduce-overhead"}, "compile_mode='reduce-overhead' needs compile=True"),
        ({"device": "tpu"}, "device must be 'cpu' or 'cuda', got 'tpu'."),
        pytest.param({"device": "cuda"}, "needs a CUDA GPU", marks=pytest.mark.skipif(CUDA, reason="there is a GPU")),
    ],
)
def test_unusable_settings_are_refused_before_writing(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        run_benchmark(tmp_path / "out", Settings(**settings))
    with pytest.raises(ValueError, match=r"models='DART-L' matches no model; accepted are patterns of DART-"):
        run_benchmark(tmp_path / "out", models=["DART-L"])
    assert not (tmp_path / "out").exists()
