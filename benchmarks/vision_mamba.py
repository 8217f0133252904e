"""Compare this library's selective scan with others, and measure how DART-Vim's time and memory grow with length.

    python benchmarks/vision_mamba.py --output benchmarks/results/vision_mamba.json

The same model runs with each scan in turn:

- `chunks`: this library's scan;
- `transformers`: the scan of transformers' Mamba without a kernel. It computes all factors, then loops over the tokens;
- `loop`: a loop over the tokens that computes each token's factors when it needs them;
- `mambapy`: mambapy's parallel scan, if that package is installed;
- `kernel`: mamba_ssm's CUDA kernel, on a GPU with that package;
- `none`: no scan, which shows the time of everything else;
- `compiled`: this library's scan in a model under torch.compile. This needs a C++ compiler.
"""

import functools
import importlib.util
import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from dart_hf import DartVimForImageClassification
from dart_hf.benchmark.memory import memory_high_water
from dart_hf.benchmark.timing import Settings, interleave, summary
from dart_hf.environment import command_line, machine
from dart_hf.hub.loading import without_warnings
from dart_hf.modeling import modeling_dart_vim, selective_scan
from dart_hf.presets import preset_config

LENGTHS = (49, 98, 196, 392, 784, 1568)
NUM_LABELS = 1000


def step_by_step(
    x: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, backwards: bool = False
) -> torch.Tensor:
    """Same arguments and result as [`selective_scan.selective_scan`]."""
    state = x.new_zeros(x.shape[0], *A.shape)
    steps = list(zip(*(tensor.unbind(1) for tensor in (x, delta, B, C)), strict=True))[:: -1 if backwards else 1]
    y = []
    for x_t, delta_t, B_t, C_t in steps:
        state = torch.exp(delta_t[..., None] * A) * state + (delta_t * x_t)[..., None] * B_t[:, None]
        y.append((state * C_t[:, None]).sum(dim=2))
    return torch.stack(y[:: -1 if backwards else 1], dim=1)


def as_transformers_does(
    x: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, backwards: bool = False
) -> torch.Tensor:
    """Same arguments and result as [`selective_scan.selective_scan`]."""
    if backwards:
        return as_transformers_does(*(tensor.flip(1) for tensor in (x, delta)), A, B.flip(1), C.flip(1)).flip(1)
    x, delta, B, C = (tensor.transpose(1, 2) for tensor in (x, delta, B, C))
    return mamba_selective_scan(x, delta, A, B, C).transpose(1, 2)


def as_mambapy_does(
    x: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, backwards: bool = False
) -> torch.Tensor:
    """Same arguments and result as [`selective_scan.selective_scan`]."""
    from mambapy.pscan import pscan

    if backwards:
        return as_mambapy_does(*(tensor.flip(1) for tensor in (x, delta)), A, B.flip(1), C.flip(1)).flip(1)
    states = pscan(torch.exp(delta[..., None] * A), (delta * x)[..., None] * B[:, :, None])
    return (states @ C[..., None])[..., 0]


def no_scan(x: torch.Tensor, *others: Any) -> torch.Tensor:
    """Return the input: the model without its scans."""
    return x


def scans(device: str) -> dict[str, Callable]:
    """The scans by their names at the top of this file."""
    chosen: dict[str, Callable] = {
        "chunks": selective_scan.selective_scan,
        "loop": step_by_step,
        "transformers": as_transformers_does,
        "none": no_scan,
    }
    if importlib.util.find_spec("mambapy"):
        chosen["mambapy"] = as_mambapy_does
    if device == "cuda" and selective_scan.cuda_kernel() is not None:
        chosen["kernel"] = selective_scan.selective_scan
    return chosen


def build(preset: str, num_patches: int, device: str, layers: int | None = None) -> DartVimForImageClassification:
    changes = {} if layers is None else {"num_hidden_layers": layers}
    config = preset_config(
        preset, num_patches=num_patches, num_labels=NUM_LABELS, score_normalization="image", **changes
    )
    return DartVimForImageClassification(config).to(device)


def pictures(batch_size: int, device: str) -> torch.Tensor:
    return torch.randn(batch_size, 3, 448, 448, device=device).contiguous(memory_format=torch.channels_last)


def inference(model: DartVimForImageClassification, images: torch.Tensor) -> None:
    with torch.inference_mode():
        model.eval()(images)


def training(model: DartVimForImageClassification, images: torch.Tensor) -> None:
    """Forward and backward pass. The optimiser is left out: its time does not depend on the scan."""
    labels = torch.arange(len(images), device=images.device)
    model.train()(images, labels=labels).loss.backward()
    model.zero_grad()


def with_scan(name: str, scan: Callable, run: Callable[[], None]) -> None:
    with (
        patch.object(modeling_dart_vim, "selective_scan", scan),
        patch.object(selective_scan, "USE_CUDA_KERNEL", name == "kernel"),
    ):
        run()


def compare_scans(
    preset: str,
    run: Callable,
    settings: Settings,
    layers: int | None = None,
    leave_out: Sequence[str] = (),
    compiled: bool = False,
) -> dict[str, Any]:
    """Milliseconds of the model with each scan except `leave_out`, and the ratio of each to ours."""
    images, model = pictures(settings.batch_size, settings.device), build(preset, 196, settings.device, layers)
    runs = {
        (name,): functools.partial(with_scan, name, scan, functools.partial(run, model, images))
        for name, scan in scans(settings.device).items()
        if name not in leave_out
    }
    if compiled:
        run_compiled = functools.partial(run, torch.compile(model), images)
        runs["compiled",] = functools.partial(with_scan, "compiled", selective_scan.selective_scan, run_compiled)
    times = {name: summary(samples) for (name,), samples in interleave(runs, settings, run.__name__).items()}
    for name, measured in times.items():
        measured["times_ours"] = round(measured["median"] / times["chunks"]["median"], 2)
        measured["images_per_second"] = round(settings.batch_size / measured["median"] * 1e3, 2)
        typer.echo(
            f"{run.__name__:9s} batch {settings.batch_size}, {model.config.num_hidden_layers} layers, {name:12s} "
            f"{measured['median']:9.1f} ms, {measured['times_ours']:6.2f} × ours"
        )
    where = {"batch_size": settings.batch_size, "layers": model.config.num_hidden_layers}
    return {"run": run.__name__, **where, "milliseconds": times}


def grow(preset: str, settings: Settings) -> list[dict[str, float]]:
    """Time per image and per token, and peak memory, at every length."""
    images = pictures(settings.batch_size, settings.device)
    models = {length: build(preset, length, settings.device) for length in LENGTHS}
    runs = {
        (length, run.__name__): functools.partial(run, model, images)
        for length, model in models.items()
        for run in (inference, training)
    }
    times = {key: summary(samples) for key, samples in interleave(runs, settings, "lengths").items()}
    lines = []
    for length in LENGTHS:
        line: dict[str, float] = {"num_patches": length}
        for run in (inference, training):
            per_image = times[length, run.__name__]["median"] / settings.batch_size
            line[f"{run.__name__}_ms_per_image"] = round(per_image, 2)
            line[f"{run.__name__}_us_per_token"] = round(per_image / (length + 1) * 1e3, 1)
            line[f"{run.__name__}_mib"] = measure_memory(run, preset, length, settings)
        lines.append(line)
    return lines


def measure_memory(run: Callable, preset: str, length: int, settings: Settings) -> float:
    """MiB that building the model and running it once take, in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_memory, run.__name__, preset, length, settings, torch.get_num_threads()).result()


def _memory(run: str, preset: str, length: int, settings: Settings, threads: int) -> float:
    torch.set_num_threads(threads)
    before = memory_high_water(settings.device)
    with without_warnings():
        model = build(preset, length, settings.device)
        {"inference": inference, "training": training}[run](model, pictures(settings.batch_size, settings.device))
    return round(memory_high_water(settings.device) - before, 1)


def main(
    output: Annotated[Path, typer.Option(help="The JSON file to write.")],
    preset: Annotated[str, typer.Option(help="vim-tiny or vim-small.")] = "vim-tiny",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    batch_size: Annotated[int, typer.Option(help="Images in one batch.")] = 8,
    rounds: Annotated[int, typer.Option(help="How many turns each case gets.")] = 5,
    threads: Annotated[int | None, typer.Option(help="Threads of PyTorch.")] = None,
    lengths: Annotated[bool, typer.Option(help="Also measure time and memory at several lengths.")] = True,
) -> None:
    """Measure, and write a JSON file."""
    if threads is not None:
        torch.set_num_threads(threads)
    settings = Settings(device=device, batch_size=batch_size, rounds=rounds, calls=1)
    settings.check()
    with without_warnings():
        compared = [
            compare_scans(preset, inference, settings, compiled=True),
            compare_scans(preset, inference, replace(settings, batch_size=1)),
            # The gradient of transformers' loop takes time quadratic in the length, and mambapy's scan keeps 10 GiB.
            compare_scans(preset, training, replace(settings, rounds=2), leave_out=("transformers", "mambapy")),
            compare_scans(preset, training, settings, layers=2),
        ]
        lines = grow(preset, settings) if lengths else []
    for line in lines:
        typer.echo(", ".join(f"{name} {value}" for name, value in line.items()))
    results = {
        "command": command_line(),
        "machine": machine(device),
        "mambapy": version("mambapy") if importlib.util.find_spec("mambapy") else None,
        "preset": preset,
        "scans_at_196_tokens": compared,
        "lengths": {"batch_size": batch_size, "by_tokens": lines},
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
