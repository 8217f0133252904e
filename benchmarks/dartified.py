"""Measure encoders on their whole grid of patches and, dartified, on a part of as many tokens.

    python benchmarks/dartified.py --threads 2 --output benchmarks/results/dartified.json

Forward passes and training steps take turns. The weights are random, because time does not depend on them.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn
from transformers import PreTrainedModel, SiglipVisionConfig, SiglipVisionModel, ViTConfig, ViTModel

from dart_hf.benchmark.timing import Settings, interleave, summary
from dart_hf.environment import command_line, machine
from dart_hf.retrofit.dartify import dartify

SHARES = (0.5, 0.35, 0.25)
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
SO400M = {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "ViT-B/16 at 224": lambda: ViTModel(ViTConfig()),
    "ViT-L/16 at 224": lambda: ViTModel(ViTConfig(**LARGE)),
    "SigLIP-so400m/14 at 384": lambda: SiglipVisionModel(SiglipVisionConfig(**SO400M, image_size=384, patch_size=14)),
}


def main(
    output: Annotated[Path, typer.Option(help="The JSON file to write.")],
    scorer: Annotated[str, typer.Option(help="The scorer of the dartified models.")] = "detail",
    batch_size: Annotated[int, typer.Option(help="Images in a batch.")] = 2,
    rounds: Annotated[int, typer.Option(help="How many turns each case gets.")] = 3,
    threads: Annotated[int | None, typer.Option(help="Threads of PyTorch.")] = None,
    models: Annotated[str, typer.Option(help="Names of models, separated by commas.")] = ",".join(MODELS),
) -> None:
    """Measure the original with all tokens, and the dartified model with half, a third and a quarter of them."""
    if threads is not None:
        torch.set_num_threads(threads)
    settings = Settings(batch_size=batch_size, threads=threads, rounds=rounds, calls=1)
    lines = [line for name in models.split(",") for line in measure(name, scorer, settings)]
    results = {"command": command_line(), "machine": machine(), "settings": vars(settings), "milliseconds": lines}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2) + "\n")


def measure(name: str, scorer: str, settings: Settings) -> list[dict[str, object]]:
    """Lines of the table: an encoder with all tokens, then with fewer."""
    original = MODELS[name]()
    dartified = dartify(original, scorer=scorer)
    side, all_tokens = dartified.config.image_size, dartified.config.num_patches
    images = torch.randn(settings.batch_size, 3, side, side)
    budgets = [round(share * all_tokens) for share in SHARES]
    cases = {all_tokens: original, **{n: functools.partial(dartified, num_patches=n) for n in budgets}}
    parameters = {all_tokens: list(original.parameters()), **{n: list(dartified.parameters()) for n in budgets}}

    with torch.inference_mode():
        for model in (original, dartified):
            model.eval()
        runs = {(tokens,): functools.partial(model, images) for tokens, model in cases.items()}
        inference = interleave(runs, settings, f"{name}, inference")
    for model in (original, dartified):
        model.train()
    runs = {(tokens,): functools.partial(train, model, images, parameters[tokens]) for tokens, model in cases.items()}
    training = interleave(runs, settings, f"{name}, training")

    lines = []
    for tokens in cases:
        line = {"model": name, "tokens": tokens, "scorer": scorer if tokens != all_tokens else None}
        for kind, times in (("inference", inference), ("training step", training)):
            line[kind] = summary(times[tokens,])
            line[f"{kind}, times as fast"] = round(lines[0][kind]["median"] / line[kind]["median"], 2) if lines else 1.0
        lines.append(line)
        typer.echo(json.dumps(line))
    return lines


def train(model: Callable, images: torch.Tensor, parameters: list[nn.Parameter]) -> None:
    """A training step: forward, backward, and a step of plain gradient descent, which needs no memory of its own."""
    model(images).last_hidden_state.square().mean().backward()
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=1e-6)
                parameter.grad = None


if __name__ == "__main__":
    typer.run(main)
