"""Run `dart-hf train` on the quickstart's digits, and measure accuracy and time.

    python benchmarks/fine_tuning.py --output FILE

The images are written to a folder. The command trains on them with the settings in `fine_tuning.yaml`. Then a
pipeline reads the test images with the saved model.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
import yaml

from dart_hf.data.digits_on_photos import digits_on_photos
from dart_hf.environment import command_line, machine
from dart_hf.quickstart import pipeline_accuracy

CONFIG = Path(__file__).with_suffix(".yaml")
PLACEMENTS = {"train": 20, "test": 3}


def main(
    output: Annotated[Path, typer.Option(help="The JSON file to write.")],
    seed: Annotated[int, typer.Option(help="Random seed of the images, the initial weights and the training.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads of PyTorch.")] = 2,
    steps: Annotated[int | None, typer.Option(help="Training steps. Default: those of fine_tuning.yaml.")] = None,
) -> None:
    """Train, test and record."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        data, model = Path(folder) / "digits", Path(folder) / "model"
        data.mkdir()
        # As in the quickstart, training digits are up to a third larger: larger digits are learned sooner.
        train = digits_on_photos("train", PLACEMENTS["train"], digit_sizes=(28, 64), seed=seed)
        test = digits_on_photos("test", PLACEMENTS["test"], seed=seed)
        train.to_parquet(data / "train.parquet")
        test.to_parquet(data / "test.parquet")

        arguments = ["--config", str(CONFIG), "--data", str(data), "--output", str(model), "--seed", str(seed)]
        arguments += ["--max-steps", str(steps)] if steps else []
        started = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "dart_hf", "train", *arguments],
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
            check=True,
        )
        seconds = time.monotonic() - started
        results = {
            "command": command_line(),
            "machine": machine(),
            "config": yaml.safe_load(CONFIG.read_text()),
            "train_pictures": len(train),
            "test_pictures": len(test),
            "seconds": round(seconds, 1),
            "accuracy": pipeline_accuracy(model, test),
        }
    typer.echo(f"{results['accuracy']:.1%} of {len(test):,} test images after {seconds:.0f} seconds")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
