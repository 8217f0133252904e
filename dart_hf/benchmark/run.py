"""Run the benchmark: measure the models, and write the results and plots."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dart_hf.benchmark.memory import peak_memory
from dart_hf.benchmark.models import PUBLISHED_ACCURACY, choose_models
from dart_hf.benchmark.report import compare, draw_throughput, draw_time_split, table
from dart_hf.benchmark.timing import Settings, time_inference, time_training
from dart_hf.environment import command_line, machine, require_packages
from dart_hf.hub.loading import without_warnings
from dart_hf.visualization import save_figure


def run_benchmark(
    output: str | os.PathLike,
    settings: Settings | None = None,
    models: Sequence[str] = ("*",),
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure, and write `benchmark.json`, `time_split.png` and `throughput.png`.

    Args:
        output: Folder for the results; created if missing.
        settings: How to measure.
        models: Patterns of the names of models, such as `"DART-S@*"`.
        report: Called with each line of output.

    Returns:
        The content of `benchmark.json`. Times are milliseconds for a batch, memory is in MiB.

    Raises:
        ValueError: A setting is out of range, or a pattern matches no model.
        OSError: `output` cannot be written to.
        ImportError: matplotlib is not installed.
    """
    settings = settings or Settings()
    settings.check()
    require_packages("The benchmark's plots", "quickstart", "matplotlib")
    chosen = choose_models(models)
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"output: {output} is a file; give a folder.")
    output.mkdir(parents=True, exist_ok=True)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)

    entries = {entry.name: {**asdict(entry), "name": entry.name} for entry in chosen}
    for entry in chosen:
        if entry.name in PUBLISHED_ACCURACY:
            entries[entry.name]["published_accuracy"] = PUBLISHED_ACCURACY[entry.name]
    with without_warnings():
        for name, value in time_inference(chosen, settings).items():
            entries[name].update(value)
        if settings.training:
            for name, value in time_training(chosen, settings).items():
                entries[name]["training"] = value
        if settings.memory:
            for name, value in peak_memory(chosen, settings).items():
                entries[name]["peak_memory"] = value
    results = {
        "command": command_line(),
        "settings": asdict(settings),
        "machine": machine(settings.device),
        "comparisons": compare(entries),
        "models": list(entries.values()),
    }
    (output / "benchmark.json").write_text(json.dumps(results, indent=2) + "\n")
    save_figure(draw_time_split(results), output / "time_split.png")
    save_figure(draw_throughput(results), output / "throughput.png")
    for line in table(results):
        report(line)
    report(f"Wrote {output / 'benchmark.json'}, time_split.png and throughput.png")
    return results
