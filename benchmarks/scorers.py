"""Train the quickstart's model with each scorer, and measure accuracy, regions on the digit and time.

    python benchmarks/scorers.py --output FILE

No weights are downloaded: MobileNetV3 learns from scratch, as "conv" does. Each finished training is written at once,
and the same command goes on after an interruption.
"""

import json
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import torch
import typer
from transformers import set_seed

from dart_hf.data.digits_on_photos import digits_on_photos
from dart_hf.environment import command_line, machine
from dart_hf.evaluation import count_regions_on_boxes
from dart_hf.quickstart import small_dart
from dart_hf.training import train_classifier

# Those of the quickstart, whose training digits are up to a third larger.
IMAGE_SIZE, NUM_PATCHES, TRAIN_SIZES, TEST_SIZES = 112, 49, (28, 64), (28, 48)
SCORERS: dict[str, dict[str, Any]] = {
    "detail": {"scorer": "detail"},
    "encoder": {"scorer": "encoder"},
    "encoder, 1 layer": {"scorer": "encoder", "scorer_layers": 1},
    "conv": {"scorer": "conv"},
    "mobilenet_v3_small": {"scorer": "mobilenet_v3_small", "scorer_frozen": False},
    "uniform regions": {"partition": "uniform"},
}


def main(
    output: Annotated[Path, typer.Option(help="The JSON file to write.")],
    scorers: Annotated[str, typer.Option(help="Names, separated by ';'.")] = ";".join(SCORERS),
    seeds: Annotated[int, typer.Option(min=1, help="Number of trainings with each scorer.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 1400,
    threads: Annotated[int, typer.Option(help="Threads of PyTorch.")] = 2,
) -> None:
    """Train, test and record."""
    torch.set_num_threads(threads)
    results = {"command": command_line(), "machine": machine(), "steps": steps, "runs": [], "summary": {}}
    if output.exists():
        results = json.loads(output.read_text())
        if results["steps"] != steps:
            raise typer.BadParameter(f"{output} has results of {results['steps']} steps; choose another --output.")
    done = {(run["scorer"], run["seed"]) for run in results["runs"]}
    output.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(seeds):
        for name in scorers.split(";"):
            if (name, seed) in done:
                continue
            results["runs"].append({"scorer": name, "seed": seed, **train(SCORERS[name], seed, steps)})
            results["summary"] = summary(results["runs"])
            output.write_text(json.dumps(results, indent=2) + "\n")
            typer.echo(json.dumps(results["runs"][-1]))
    for name, numbers in results["summary"].items():
        typer.echo(f"{name:>20}  " + ", ".join(f"{key} {value[0]} ± {value[1]}" for key, value in numbers.items()))


def train(settings: dict[str, Any], seed: int, steps: int) -> dict[str, float]:
    """Train and test once. All runs have the same test images."""
    images = digits_on_photos("train", 20, IMAGE_SIZE, TRAIN_SIZES, seed)
    test = digits_on_photos("test", 3, IMAGE_SIZE, TEST_SIZES, seed=0)
    set_seed(seed)
    model, processor = small_dart(images.features["label"].names, IMAGE_SIZE, NUM_PATCHES, **settings)
    before = count_regions_on_boxes(model, processor, test)["learned"]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        trainer = train_classifier(model, processor, images, test, folder, steps, seed=seed)
        seconds = time.monotonic() - started
        accuracy = trainer.evaluate()["eval_accuracy"]
    return {
        "accuracy": round(accuracy, 4),
        "regions_on_digit_before_training": round(before, 2),
        "regions_on_digit": round(count_regions_on_boxes(model, processor, test)["learned"], 2),
        "training_seconds": round(seconds, 1),
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Mean and standard deviation over the seeds of every number, for each scorer."""

    def over_seeds(values: list[float]) -> list[float]:
        return [round(mean(values), 4), round(stdev(values), 4) if len(values) > 1 else 0.0]

    numbers = [key for key in runs[0] if key not in ("scorer", "seed")]
    return {
        name: {key: over_seeds([run[key] for run in runs if run["scorer"] == name]) for key in numbers}
        for name in dict.fromkeys(run["scorer"] for run in runs)
    }


if __name__ == "__main__":
    typer.run(main)
