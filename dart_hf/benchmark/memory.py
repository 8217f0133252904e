"""Measure the peak memory of the benchmark's models."""

import functools
import gc
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from tqdm import tqdm

from dart_hf.benchmark.models import BenchmarkModel
from dart_hf.benchmark.timing import DTYPES, Settings, compiled, random_images, timed_call, training_step
from dart_hf.hub.loading import without_warnings


def peak_memory(chosen: Sequence[BenchmarkModel], settings: Settings) -> dict[str, dict[str, float] | None]:
    """Measure each model in a new process, so that memory that others left does not count.

    Returns:
        Name of a model -> MiB that building it and two steps take, for `inference` and `training`; None if it could not
        be measured.
    """
    context = multiprocessing.get_context("spawn")
    results = {}
    for entry in tqdm(chosen, desc="memory", unit="model", leave=False):
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            try:
                results[entry.name] = pool.submit(_measure_memory, entry, settings, torch.get_num_threads()).result()
            except BrokenProcessPool:
                # The system killed the process, most likely because it took too much memory.
                results[entry.name] = None
    return results


@without_warnings()
def _measure_memory(entry: BenchmarkModel, settings: Settings, threads: int) -> dict[str, float] | None:
    torch.set_num_threads(threads)
    before = memory_high_water(settings.device)
    if before is None:
        return None
    results = {}
    model = entry.build(settings.attention).eval().to(settings.device, DTYPES[settings.dtype])
    run = functools.partial(compiled(model, settings), random_images(entry, settings).to(DTYPES[settings.dtype]))
    with torch.inference_mode():
        for _ in range(2):
            timed_call(run, settings)
    results["inference"] = round(memory_high_water(settings.device) - before, 1)
    if settings.training:
        del model, run
        gc.collect()
        step = training_step(entry, settings)
        for _ in range(2):
            timed_call(step, settings)
        results["training"] = round(memory_high_water(settings.device) - before, 1)
    return results


def memory_high_water(device: str) -> float | None:
    """The largest number of MiB that this process has used so far, on the GPU if the device is `"cuda"`.

    None if the system does not report it.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next(int(line.split()[1]) / 2**10 for line in status.splitlines() if line.startswith("VmHWM:"))
