"""Measure what exporting gains on a CPU. PyTorch, ONNX in float32 and ONNX with 8-bit layers run in turns.

    python benchmarks/export_speed.py --threads 2 --output benchmarks/results/export_speed.json

The weights are random, because time does not depend on them. The accuracy with 8-bit layers does: measure it with your
model (`--model FOLDER`) and your test images.
"""

import argparse
import functools
import importlib.metadata
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import skimage.data
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageClassification

from dart_hf import DartImageProcessor
from dart_hf.benchmark.timing import Settings, interleave, summary
from dart_hf.data.digits_on_photos import PHOTOGRAPHS
from dart_hf.environment import command_line, machine
from dart_hf.export import export_model
from dart_hf.hub.loading import load_model
from dart_hf.presets import preset_config

# Name -> preset, token budget.
MODELS = {"DART-Ti@196": ("tiny", 196), "DART-S@392": ("small", 392), "DART-Vim-Ti@196": ("vim-tiny", 196)}
BATCH_SIZES = (8, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", action="append", help="Measure the model in this folder instead of the published sizes. Repeatable."
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="Threads of PyTorch and of ONNX Runtime."
    )
    parser.add_argument("--rounds", type=int, default=8, help="How many turns of two calls each program gets.")
    parser.add_argument("--output", type=Path, required=True, help="The JSON file to write.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folders = arguments.model or [_save_random(name, Path(scratch, name)) for name in MODELS]
        models = [_measure(Path(folder), Path(scratch), arguments) for folder in folders]
    described = machine()
    described["packages"] |= {name: importlib.metadata.version(name) for name in ("onnx", "onnxscript", "onnxruntime")}
    results = {"command": command_line(), "machine": described, "models": models}
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")


def _measure(folder: Path, scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Times (milliseconds a batch), sizes and logits of a model's programs."""
    model, processor = load_model(folder)
    model = model.cpu().float()
    paths = {
        "ONNX float32": export_model(folder, scratch / f"{folder.name}-float32").path,
        "ONNX int8": export_model(folder, scratch / f"{folder.name}-int8", int8=True).path,
    }
    programs = {"PyTorch": functools.partial(_run_model, model)}
    programs |= {name: _session(path, arguments.threads) for name, path in paths.items()}
    entry: dict[str, Any] = {"name": folder.name, "times": {}}
    for batch_size in BATCH_SIZES:
        images = _crops(processor, model.config.image_size)[:batch_size].clone()
        runs = {(name,): functools.partial(run, images) for name, run in programs.items()}
        settings = Settings(batch_size=batch_size, threads=arguments.threads, rounds=arguments.rounds)
        times = interleave(runs, settings, f"{folder.name}, batch {batch_size}")
        entry["times"][f"batch {batch_size}"] = {name: summary(samples) for (name,), samples in times.items()}
    entry["mebibytes"] = {name: round(path.stat().st_size / 2**20, 1) for name, path in paths.items()}
    entry["logits"] = _compare(programs, _crops(processor, model.config.image_size))
    print(json.dumps(entry, indent=2))
    return entry


def _compare(programs: dict[str, Callable[[torch.Tensor], torch.Tensor]], images: torch.Tensor) -> dict[str, Any]:
    """Compare the programs' logits for crops of photographs with PyTorch's, in batches of eight and one by one."""
    results = {}
    expected = torch.cat([programs["PyTorch"](batch) for batch in images.split(8)])
    for name, run in programs.items():
        together, alone = (torch.cat([run(batch) for batch in images.split(size)]) for size in (8, 1))
        results[name] = {
            "root_mean_square": _share(together - expected, expected),
            "same_top_1": float((together.argmax(1) == expected.argmax(1)).float().mean()),
            # The effect of the other images of a batch.
            "alone_root_mean_square": _share(together - alone, alone),
        }
    return results


def _share(difference: torch.Tensor, whole: torch.Tensor) -> float:
    return round(float((difference.square().mean() / whole.square().mean()).sqrt()), 6)


@torch.inference_mode()
def _run_model(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    return model(pixel_values).logits


def _session(path: Path, threads: int) -> Callable[[torch.Tensor], torch.Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"pixel_values": images.numpy()})[0])


def _crops(processor: DartImageProcessor, size: int) -> torch.Tensor:
    """Four crops of each photograph, its corners, as `pixel_values`."""
    crops = []
    for name in PHOTOGRAPHS:
        picture = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
        side = round(0.7 * min(picture.size))
        for left, top in ((0, 0), (picture.width - side, 0), (0, picture.height - side), (100, 50)):
            crops.append(picture.crop((left, top, left + side, top + side)).resize((size, size)))
    return processor(crops, return_tensors="pt").pixel_values.contiguous()


@torch.no_grad()
def _save_random(name: str, folder: Path) -> Path:
    """Save a model of a published size with random weights. The trunk has the BatchNorm statistics of photographs."""
    preset, num_patches = MODELS[name]
    torch.manual_seed(0)
    config = preset_config(preset, num_patches=num_patches, num_labels=1000, score_normalization="image")
    model, processor = AutoModelForImageClassification.from_config(config), DartImageProcessor()
    for module in model.scorer.trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train().momentum = None
    model.scorer.trunk(_crops(processor, config.image_size)[:16])
    model.scorer.trunk_loaded.fill_(1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
