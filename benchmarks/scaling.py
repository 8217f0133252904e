"""Measure how the time of DART grows with the batch and with the image size.

    python benchmarks/scaling.py --output FILE

If the time grows linearly, the time per image or per pixel is about the same in all lines.
"""

import functools
import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForImageClassification

from dart_hf.benchmark.timing import PARTS, Settings, interleave, parts_of, summary
from dart_hf.environment import command_line, machine
from dart_hf.hub.loading import without_warnings
from dart_hf.presets import PRESETS, preset_config

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
IMAGE_SIZES = (224, 448, 672, 896, 1120)


def main(
    output: Annotated[Path, typer.Option(help="The JSON file to write.")],
    preset: Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}.")] = "tiny",
    num_patches: Annotated[int, typer.Option(help="Token budget.")] = 196,
    rounds: Annotated[int, typer.Option(help="How many turns each case gets.")] = 5,
    threads: Annotated[int | None, typer.Option(help="Threads of PyTorch.")] = None,
) -> None:
    """Measure batches of 448-pixel images, and batches of four images of growing size."""
    if threads is not None:
        torch.set_num_threads(threads)
    settings = Settings(rounds=rounds)
    cases = [("batch", size, 448) for size in BATCH_SIZES] + [("image", 4, size) for size in IMAGE_SIZES]
    runs = {}
    with without_warnings(), torch.inference_mode():
        config = preset_config(preset, num_patches=num_patches, num_labels=1000)
        model = AutoModelForImageClassification.from_config(config).eval()
        for case in cases:
            _, batch_size, image_size = case
            images = torch.randn(batch_size, 3, image_size, image_size).contiguous(memory_format=torch.channels_last)
            runs[(*case, "whole")] = functools.partial(model, images)
            for part, run in parts_of(model, images, settings).items():
                runs[(*case, part)] = run
        times = {key: summary(samples) for key, samples in interleave(runs, settings, "scaling").items()}

    lines = []
    for case in cases:
        grows, batch_size, image_size = case
        line = {"grows": grows, "batch_size": batch_size, "image_size": image_size}
        line |= {part: times[(*case, part)] for part in ("whole", *PARTS)}
        line["whole_per_image"] = round(line["whole"]["median"] / batch_size, 3)
        line["scorer_per_megapixel"] = round(line["scorer"]["median"] / (batch_size * image_size**2 / 1e6), 3)
        lines.append(line)
        typer.echo(
            f"batch {batch_size:3d} of {image_size:4d} pixels: {line['whole_per_image']:8.2f} ms per image, scorer "
            f"{line['scorer_per_megapixel']:6.2f} ms per megapixel, "
            + ", ".join(f"{part} {line[part]['median']:.2f}" for part in PARTS)
        )
    results = {
        "command": command_line(),
        "machine": machine(),
        "milliseconds": lines,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
