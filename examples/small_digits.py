"""Small digits on large photographs: does it help to put the tokens where the digit is?

This trains the quickstart's model on digits of 24-40 pixels on pictures of 224 pixels, with 49 tokens. It compares
learned regions (partition "flow") with equal ones ("uniform"), for several seeds. Each finished training is saved at
once. Run it again with the same settings to go on after an interruption.

    python examples/small_digits.py --output examples/results/small_digits.json
"""

import argparse
import json
import multiprocessing
import platform
import shlex
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.utils import logging

from dart_hf.data.digits_on_photos import digits_on_photos
from dart_hf.evaluation import count_regions_on_boxes
from dart_hf.quickstart import small_dart
from dart_hf.training import train_classifier

SETTINGS = {
    "image_size": 224,
    "digit_sizes": [24, 40],
    "num_patches": 49,
    "steps": 3000,
    "batch_size": 64,
    "learning_rate": 2e-3,
    "train_placements": 32,
    "test_placements": 3,
}
PARTITIONS = ("flow", "uniform")
PACKAGES = ("dart-hf", "torch", "transformers", "datasets", "scikit-learn", "scikit-image")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare learned and even tokens on small digits.")
    parser.add_argument("--output", type=Path, default=Path("small_digits.json"), help="JSON file for the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"], help="training steps")
    parser.add_argument("--processes", type=int, default=2, help="trainings at a time, each on one core")
    arguments = parser.parse_args()

    settings = {**SETTINGS, "steps": arguments.steps}
    results = _read(arguments.output, settings)
    done = {(run["seed"], run["partition"]) for run in results["runs"]}
    todo = [(seed, name) for seed in arguments.seeds for name in PARTITIONS if (seed, name) not in done]
    print(f"{len(todo)} trainings to do, {len(done)} done before.", flush=True)
    # A forked process would inherit torch's threads in an unknown state.
    with ProcessPoolExecutor(arguments.processes, multiprocessing.get_context("spawn")) as pool:
        for finished in as_completed([pool.submit(run, seed, name, settings) for seed, name in todo]):
            results["runs"].append(finished.result())
            results["runs"].sort(key=lambda entry: (entry["seed"], entry["partition"]))
            results["summary"] = summary(results["runs"])
            arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results["summary"], indent=2))


def run(seed: int, partition: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Train once and measure. All runs have the same test pictures."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    started = time.monotonic()
    pictures = {"image_size": settings["image_size"], "digit_sizes": tuple(settings["digit_sizes"])}
    train = digits_on_photos("train", settings["train_placements"], **pictures, seed=seed)
    test = digits_on_photos("test", settings["test_placements"], **pictures, seed=0)
    set_seed(seed)
    model, image_processor = small_dart(
        train.features["label"].names, settings["image_size"], settings["num_patches"], partition=partition
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = train_classifier(
            model,
            image_processor,
            train,
            test,
            folder,
            settings["steps"],
            settings["batch_size"],
            settings["learning_rate"],
            seed=seed,
            progress=Lines(f"{partition}, seed {seed}"),
            disable_tqdm=True,
        )
        accuracy = trainer.evaluate()["eval_accuracy"]
    counts = count_regions_on_boxes(model, image_processor, test)
    minutes = (time.monotonic() - started) / 60
    print(f"{partition}, seed {seed}: accuracy {accuracy:.1%}, {minutes:.0f} minutes", flush=True)
    return {
        "seed": seed,
        "partition": partition,
        "accuracy": accuracy,
        "regions_on_digit": counts["learned"],
        "minutes": round(minutes, 1),
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds for each partition, and the ratio of regions on the digit, flow to uniform."""
    means = {
        name: {
            key: mean(run[key] for run in runs if run["partition"] == name) for key in ("accuracy", "regions_on_digit")
        }
        for name in PARTITIONS
        if any(run["partition"] == name for run in runs)
    }
    if len(means) == len(PARTITIONS):
        means["regions_ratio"] = means["flow"]["regions_on_digit"] / means["uniform"]["regions_on_digit"]
    return means


class Lines(TrainerCallback):
    """Print a line now and then. Two progress bars at a time would overwrite each other."""

    def __init__(self, name: str, every: int = 250) -> None:
        self.name = name
        self.every = every

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.global_step % self.every == 0 and "loss" in (logs or {}):
            loss = float(logs["loss"])
            print(f"{self.name}: step {state.global_step} of {state.max_steps}, loss {loss:.2f}", flush=True)


def _read(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Read the results so far, or begin new ones.

    Raises:
        SystemExit: The file holds results of other settings.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return {
            "command": shlex.join(["python", *sys.argv]),
            "settings": settings,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "processor": _processor(),
            "runs": [],
        }
    results = json.loads(path.read_text())
    if results["settings"] != settings:
        sys.exit(f"{path} holds results of other settings: {results['settings']}. Choose another --output.")
    return results


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
