"""Take tokens from a trained ViT in several ways, let it learn from itself without labels, and measure its accuracy.

    python benchmarks/retrofit.py --output FILE

A small ViT of transformers learns the quickstart's digits on photographs, on its whole grid of patches. Then it reads
half, a third and a quarter as many tokens: right after the switch, and after a distillation in which the original is
the teacher and nobody sees a label. One student for each method learns all three budgets. Each finished seed is written
at once, and the same command goes on after an interruption.
"""

import copy
import itertools
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import DataLoader
from transformers import ViTConfig, ViTForImageClassification, ViTModel, get_cosine_schedule_with_warmup, set_seed

from dart_hf import DartImageProcessor, dartify
from dart_hf.data.digits_on_photos import digits_on_photos
from dart_hf.environment import command_line, machine
from dart_hf.retrofit import distill
from dart_hf.retrofit.features import feature_distance
from dart_hf.training import train_classifier

# Images and digits are those of the quickstart, whose training digits are up to a third larger.
IMAGE_SIZE, PATCH_SIZE, TRAIN_SIZES, TEST_SIZES = 112, 14, (28, 64), (28, 48)
ALL_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
BUDGETS = [round(ALL_TOKENS * share) for share in (1 / 2, 1 / 3, 1 / 4)]
NUM_LAYERS = 4
# Right after the switch, and after distillation.
ACCURACIES = ("accuracy", "distilled")


def main(
    output: Annotated[Path, typer.Option(help="The JSON file to write.")],
    seeds: Annotated[str, typer.Option(help="Seeds of the images, the weights and the training.")] = "0,1,2",
    steps: Annotated[int, typer.Option(min=1, help="Training steps of an original, of 64 images.")] = 1000,
    distill_steps: Annotated[int, typer.Option(min=1, help="Steps of a distillation.")] = 600,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a step of a distillation.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="The highest learning rate of a distillation.")] = 1e-3,
    placements: Annotated[int, typer.Option(min=1, help="Training images of each digit.")] = 20,
    threads: Annotated[int, typer.Option(min=1, help="Threads of PyTorch.")] = 1,
) -> None:
    """Train, take tokens away, distill, test and record."""
    torch.set_num_threads(threads)
    distillation = {"steps": distill_steps, "batch_size": batch_size, "learning_rate": learning_rate}
    settings = {"steps": steps, "placements": placements, "distillation": distillation}
    results = read_results(output, settings)
    for seed in map(int, seeds.split(",")):
        if seed in [run["seed"] for run in results["runs"]]:
            continue
        started = time.monotonic()
        lines = []
        for line in measure(seed, steps, placements, distillation):
            typer.echo(f"seed {seed}, {time.monotonic() - started:.0f} s: {json.dumps(line)}")
            lines.append(line)
        # Another process may have written other seeds meanwhile.
        results = read_results(output, settings)
        results["runs"].append({"seed": seed, "seconds": round(time.monotonic() - started), "lines": lines})
        results["runs"].sort(key=lambda run: run["seed"])
        results["summary"] = summary([run["lines"] for run in results["runs"]])
        output.write_text(json.dumps(results, indent=2) + "\n")
    for line in results["summary"]:
        numbers = [f"{name} {line[name][0]:.1%} ± {line[name][1]:.1%}" for name in ACCURACIES if name in line]
        typer.echo(f"{line['method']:>26}, {line['tokens']} tokens: {', '.join(numbers)}")


def read_results(output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The results in `output`, or new ones without any run."""
    if output.exists():
        results = json.loads(output.read_text())
        if results["settings"] != settings:
            raise typer.BadParameter(f"{output} has results with other settings; choose another --output.")
        return {**results, "command": command_line()}
    output.parent.mkdir(parents=True, exist_ok=True)
    plans = {name: {budget: merging(budget, count) for budget in BUDGETS} for name, count in COUNTS.items()}
    results = {"command": command_line(), "machine": machine(), "settings": settings}
    return {**results, "tokens_after_each_layer": plans, "runs": []}


def measure(seed: int, steps: int, placements: int, distillation: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Lines of the table for one original: its accuracy, then that of each method with each budget."""
    train = digits_on_photos("train", placements, IMAGE_SIZE, TRAIN_SIZES, seed)
    test = digits_on_photos("test", 3, IMAGE_SIZE, TEST_SIZES, seed)
    set_seed(seed)
    original, processor = small_vit(train.features["label"].names)
    with tempfile.TemporaryDirectory() as folder:
        train_classifier(original, processor, train, test, folder, steps, seed=seed, use_cpu=True)
    original.eval()
    pixel_values = processor(test["image"][:], return_tensors="pt")["pixel_values"]
    labels = torch.tensor(test["label"][:])

    @torch.no_grad()
    def accuracy(logits: Callable[[Tensor], Tensor]) -> float:
        # The same tokens are dropped before and after.
        set_seed(seed)
        answers = torch.cat([logits(images).argmax(dim=1) for images in pixel_values.split(90)])
        return round((answers == labels).double().mean().item(), 4)

    yield {"method": "original", "tokens": ALL_TOKENS, "accuracy": accuracy(lambda images: original(images).logits)}
    methods = {
        "flow": Regions(original, "flow"),
        "uniform": Regions(original, "uniform"),
        "random dropping": FewerTokens(original, read_some),
        **{name: FewerTokens(original, partial(read_merged, count=count)) for name, count in COUNTS.items()},
    }
    for name, method in methods.items():
        lines = [{"method": name, "tokens": n, "accuracy": accuracy(partial(method.logits, budget=n))} for n in BUDGETS]
        # Merging that reaches the budget in the last layer has lost nothing that could be learned.
        if name != AT_THE_END:
            method.learn(train.select_columns("image"), processor, **distillation, seed=seed)
            for line in lines:
                line["distilled"] = accuracy(partial(method.logits, budget=line["tokens"]))
        yield from lines


def small_vit(labels: Sequence[str]) -> tuple[ViTForImageClassification, DartImageProcessor]:
    """A ViT of the size of the quickstart's model, and its image processor."""
    config = ViTConfig(
        hidden_size=96,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=3,
        intermediate_size=384,
        initializer_range=0.1,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    processor = DartImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=IMAGE_SIZE)
    return ViTForImageClassification(config), processor


class Regions:
    """The dartified original."""

    def __init__(self, original: ViTForImageClassification, partition: str) -> None:
        self.original = original
        # The recorded run standardised scores by statistics that the distillation measured.
        settings = {"scorer": "detail", "score_normalization": "running"}
        self.student = dartify(original, num_patches=BUDGETS[0], partition=partition, **settings)

    def logits(self, images: Tensor, budget: int) -> Tensor:
        return self.student(images, num_patches=budget).logits

    def learn(self, images: Dataset, processor: DartImageProcessor, **settings: Any) -> None:
        settings |= {"num_patches": BUDGETS, "save_strategy": "no", "use_cpu": True}
        with tempfile.TemporaryDirectory() as folder:
            distill(self.student, self.original, images, processor, folder, **settings)


class FewerTokens:
    """The original itself, which loses tokens on the way.

    It has no regions to place back on a grid, so it learns the class token alone; all else is as in `distill`.

    Args:
        read: ViT, images (B, C, H, W) and budget -> class tokens (B, D) after the last norm.
    """

    def __init__(self, original: ViTForImageClassification, read: Callable[..., Tensor]) -> None:
        self.original = original
        self.student = copy.deepcopy(original)
        self.read = read

    def logits(self, images: Tensor, budget: int) -> Tensor:
        return self.student.classifier(self.read(self.student.vit, images, budget))

    def learn(self, images: Dataset, processor: DartImageProcessor, seed: int, **settings: Any) -> None:
        set_seed(seed)

        def collate(rows: Sequence[dict[str, Any]]) -> Tensor:
            return processor([row["image"] for row in rows], return_tensors="pt")["pixel_values"]

        loader = DataLoader(images, settings["batch_size"], shuffle=True, collate_fn=collate)
        batches = itertools.chain.from_iterable(itertools.repeat(loader))
        steps = settings["steps"]
        optimizer = torch.optim.AdamW(self.student.parameters(), settings["learning_rate"], weight_decay=0.01)
        schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
        for pixel_values in itertools.islice(batches, steps):
            with torch.no_grad():
                wanted = self.original.vit(pixel_values).last_hidden_state[:, 0]
            found = self.read(self.student.vit, pixel_values, random.choice(BUDGETS))
            optimizer.zero_grad()
            feature_distance(found, wanted, cosine_weight=0.9, smooth_l1_weight=0.1).backward()
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
            optimizer.step()
            schedule.step()


def read_some(vit: ViTModel, images: Tensor, budget: int) -> Tensor:
    """Read `budget` patches of each image, drawn at random."""
    tokens = vit.embeddings(images)
    drawn = 1 + torch.rand(tokens.shape[0], tokens.shape[1] - 1).argsort(dim=1)[:, :budget, None]
    tokens = torch.cat([tokens[:, :1], tokens.take_along_dim(drawn, dim=1)], dim=1)
    for layer in vit.layers:
        tokens = layer(tokens)
    return vit.layernorm(tokens)[:, 0]


def read_merged(vit: ViTModel, images: Tensor, budget: int, count: Callable[[Sequence[int]], float]) -> Tensor:
    """Merge tokens between attention and MLP of each layer, as ToMe does (arXiv 2210.09461), see [`merging`]."""
    tokens = vit.embeddings(images)
    sizes = torch.ones_like(tokens[..., :1])
    for layer, num_left in zip(vit.layers, merging(budget, count)[1:], strict=True):
        normed = layer.layernorm_before(tokens)
        # A token of n patches gets the attention of n.
        attended, _ = layer.attention(normed, attention_mask=sizes.log().mT[:, None])
        keys = layer.attention.k_proj(normed).unflatten(2, (-1, layer.attention.head_dim)).mean(dim=2)
        tokens, sizes = merge(tokens + attended, sizes, keys, num_left)
        tokens = tokens + layer.mlp(layer.layernorm_after(tokens))
    return vit.layernorm(tokens)[:, 0]


def merge(tokens: Tensor, sizes: Tensor, keys: Tensor, num_left: int) -> tuple[Tensor, Tensor]:
    """Merge tokens (B, 1 + N, D) of `sizes` (B, 1 + N, 1) until the class token and `num_left` remain.

    Bipartite soft matching: of every second token, those go whose keys have the most similar partners among the others.
    """
    keys = normalize(keys, dim=-1)
    similarity = keys[:, ::2] @ keys[:, 1::2].mT
    # The class token stays.
    similarity[:, 0] = -torch.inf
    best, partners = similarity.max(dim=-1)
    order = best.argsort(dim=1, descending=True)[..., None]
    going, staying = order.tensor_split([tokens.shape[1] - 1 - num_left], dim=1)
    sums = torch.cat([tokens * sizes, sizes], dim=-1)
    even, odd = sums[:, ::2], sums[:, 1::2]
    targets = partners[..., None].take_along_dim(going, dim=1).expand(-1, -1, sums.shape[2])
    odd = odd.scatter_add(1, targets, even.take_along_dim(going, dim=1))
    # The class token, the first of all, stays the first.
    sums = torch.cat([even.take_along_dim(staying.sort(dim=1).values, dim=1), odd], dim=1)
    return sums[..., :-1] / sums[..., -1:], sums[..., -1:]


def merging(budget: int, count: Callable[[Sequence[int]], float]) -> list[int]:
    """The number of patch tokens at first and after each layer, for which `count` comes nearest to the budget.

    All layers take the same number of tokens away, at most half of those that they get.
    """
    plans = [
        list(itertools.accumulate([taken] * NUM_LAYERS, lambda n, taken: n - min(taken, n // 2), initial=ALL_TOKENS))
        for taken in range(ALL_TOKENS // 2 + 1)
    ]
    return min(plans, key=lambda plan: abs(count(plan) - budget))


AT_THE_END, ON_AVERAGE = "merging, budget at the end", "merging, budget on average"
COUNTS: dict[str, Callable[[Sequence[int]], float]] = {
    AT_THE_END: lambda plan: plan[-1],
    # Of what attention and MLP of all layers read.
    ON_AVERAGE: lambda plan: mean([*plan[:-1], *plan[1:]]),
}


def summary(runs: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The lines of the table, with mean and standard deviation over the seeds in place of each accuracy."""

    def over_seeds(values: list[float]) -> list[float]:
        return [round(mean(values), 4), round(stdev(values), 4) if len(values) > 1 else 0.0]

    return [
        {key: over_seeds([line[key] for line in same]) if key in ACCURACIES else same[0][key] for key in same[0]}
        for same in zip(*runs, strict=True)
    ]


if __name__ == "__main__":
    typer.run(main)
