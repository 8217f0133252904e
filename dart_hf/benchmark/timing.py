"""Time the models of the benchmark: forward passes, their parts, and training steps.

The models take turns. In every round each model runs once untimed and then a few times timed, so that other work of the
machine slows all of them alike. This is why the calls are not timed by `torch.utils.benchmark.Timer`: it measures one
statement in one block, which cannot be interleaved. As there, the clock waits for the accelerator.

Weights are random. The scores of a random scorer are standardised as usual, so regions differ in size. Reading,
resizing and moving the images is not timed.
"""

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from dart_hf.benchmark.models import NUM_LABELS, SIZES, BenchmarkModel
from dart_hf.environment import synchronized_time
from dart_hf.modeling.image_rebuilder import ImageRebuilder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
PARTS = ("scorer", "partition", "sampling + projection + positions", "encoder + head")


@dataclass(frozen=True)
class Settings:
    """Settings of a measurement.

    Args:
        device: `"cpu"` or `"cuda"`.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`. Inference uses models of this dtype, training uses float32
            models under autocast.
        attention: `"sdpa"`, or `"eager"` for plain matrix products and a softmax.
        batch_size: Images in a batch.
        threads: Threads of PyTorch; by default its own choice.
        compile: Compile every model with `torch.compile`.
        compile_mode: The mode of `torch.compile`, such as `"reduce-overhead"` for CUDA graphs.
        rounds: Turns of each model.
        calls: Timed calls in a turn.
        training: Measure training steps too.
        memory: Measure peak memory too, each model in a process of its own. With `compile` on a CPU this includes the
            memory of the compiler.
    """

    device: str = "cpu"
    dtype: str = "float32"
    attention: str = "sdpa"
    batch_size: int = 8
    threads: int | None = None
    compile: bool = False
    compile_mode: str = "default"
    rounds: int = 5
    calls: int = 2
    training: bool = True
    memory: bool = True

    def check(self) -> None:
        """Check that these settings can be measured here.

        Raises:
            ValueError: A setting is out of range, or there is no such device.
        """
        for name in ("batch_size", "rounds", "calls"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        if self.attention not in ("sdpa", "eager"):
            raise ValueError(f"attention must be 'sdpa' or 'eager', got {self.attention!r}.")
        if self.compile_mode not in COMPILE_MODES:
            raise ValueError(f"compile_mode must be one of {', '.join(COMPILE_MODES)}, got {self.compile_mode!r}.")
        if self.compile_mode != "default" and not self.compile:
            raise ValueError(f"compile_mode={self.compile_mode!r} needs compile=True (--compile).")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be 'cpu' or 'cuda', got {self.device!r}.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "device='cuda' needs a CUDA GPU and a PyTorch built for it; this machine lacks one of them."
            )


def interleave(
    runs: dict[tuple[str, ...], Callable[[], Any]], settings: Settings, description: str
) -> dict[tuple[str, ...], list[float]]:
    """Time functions in turns: in each round each runs once untimed and then `settings.calls` times timed.

    Args:
        runs: Key -> function to call.
        settings: Gives rounds and calls.
        description: Shown before the progress bar.

    Returns:
        Key -> milliseconds of every timed call.
    """
    times: dict[tuple[str, ...], list[float]] = {key: [] for key in runs}
    # The first round is not timed, because it compiles models and allocates memory.
    for number in tqdm(range(settings.rounds + 1), desc=description, unit="round", leave=False):
        for key, run in runs.items():
            timed_call(run, settings)
            for _ in range(settings.calls if number else 0):
                times[key].append(timed_call(run, settings))
    return times


def timed_call(run: Callable[[], Any], settings: Settings) -> float:
    """Call a function and return the milliseconds that it took."""
    if settings.compile:
        # With CUDA graphs, the outputs of the last call may be overwritten now.
        torch.compiler.cudagraph_mark_step_begin()
    started = synchronized_time()
    run()
    return (synchronized_time() - started) * 1e3


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Milliseconds -> their median, first and third quartile, and number."""
    low, middle, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else samples * 3
    return {"median": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)], "samples": len(samples)}


def time_inference(chosen: Sequence[BenchmarkModel], settings: Settings) -> dict[str, dict[str, Any]]:
    """Time forward passes.

    Returns:
        Name of a model -> its number of `parameters`, and times: `inference`, for a DART its `parts`, and for a DART
        with a ViT as encoder its `encoders`.
    """
    runs: dict[tuple[str, ...], Callable[[], Any]] = {}
    results: dict[str, dict[str, Any]] = {}
    for entry in chosen:
        model = entry.build(settings.attention).eval().requires_grad_(False)
        results[entry.name] = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
        model = model.to(settings.device, DTYPES[settings.dtype])
        images = random_images(entry, settings).to(DTYPES[settings.dtype])
        runs[entry.name, "inference"] = functools.partial(compiled(model, settings), images)
        if entry.family == "DART":
            for part, run in parts_of(model, images, settings).items():
                runs[entry.name, "parts", part] = run
            for encoder, run in _encoders(entry, model, settings).items():
                runs[entry.name, "encoders", encoder] = run
    with torch.inference_mode():
        times = interleave(runs, settings, "inference")
    for (name, *place), samples in times.items():
        target = results[name]
        for step in place[:-1]:
            target = target.setdefault(step, {})
        target[place[-1]] = summary(samples)
    for entry in chosen:
        measured = results[entry.name]["inference"]
        measured["images_per_second"] = round(settings.batch_size / measured["median"] * 1e3, 2)
    return results


def parts_of(model: PreTrainedModel, images: torch.Tensor, settings: Settings) -> dict[str, Callable]:
    """The steps of a forward pass of a DART classifier as functions without arguments.

    Each step gets what the step before it computes.

    Args:
        model: The classifier.
        images: (B, C, H, W).
        settings: Say whether the steps are compiled.

    Returns:
        Name of a part -> function, in the order of [`PARTS`].
    """
    tokenizer, num_patches, size = model.base_model.tokenizer, model.config.num_patches, images.shape[2:]
    rebuilds = isinstance(tokenizer, ImageRebuilder)

    def score(images: torch.Tensor) -> torch.Tensor:
        return model.score(images.contiguous(memory_format=torch.channels_last))

    def partition(scores: torch.Tensor) -> Any:
        return tokenizer.partition(scores, num_patches, *size)

    with torch.inference_mode():
        scores = score(images)
        regions = partition(scores)
        channels_last = images.contiguous(memory_format=torch.channels_last)
        inputs = tokenizer(images, look=model.base_model.look)[:-1]
    arguments = ((images,), (scores,), (channels_last, regions), inputs)
    steps = (score, partition, tokenizer.rebuild if rebuilds else tokenizer.embed, _encoder_and_head(model))
    return {
        part: functools.partial(compiled(step, settings), *given)
        for part, step, given in zip(PARTS, steps, arguments, strict=True)
    }


def _encoder_and_head(model: PreTrainedModel) -> Callable[..., torch.Tensor]:
    """A function of the tokenizer's outputs but the regions, which returns the logits."""
    base, classifier = model.base_model, model.classifier
    return {
        "dart": lambda tokens, place: classifier(base.encode(tokens, place, class_token_only=True).pooler_output),
        "dart_vim": lambda tokens, place: classifier(base.encode(tokens, place).pooler_output),
        "dart_rmt": lambda rebuilt: classifier(base.encode(rebuilt).pooler_output),
    }[model.config.model_type]


def _encoders(entry: BenchmarkModel, model: PreTrainedModel, settings: Settings) -> dict[str, Callable]:
    """The encoder of a DART with a ViT, computed for all tokens, and timm's with as many tokens."""
    if model.config.model_type != "dart":
        return {}
    peer = BenchmarkModel("timm", entry.size, 224, 196).build(settings.attention).eval().requires_grad_(False)
    peer = nn.Sequential(*peer.blocks, peer.norm).to(settings.device, DTYPES[settings.dtype])
    shape = (settings.batch_size, entry.num_patches, SIZES[entry.size][0])
    tokens = torch.randn(shape, device=settings.device, dtype=DTYPES[settings.dtype])
    class_position = torch.zeros_like(tokens[:1, :1])
    return {
        "ours": functools.partial(compiled(model.dart.encode, settings), tokens, class_position),
        "timm": functools.partial(compiled(peer, settings), torch.cat([tokens, tokens[:, :1]], dim=1)),
    }


def time_training(chosen: Sequence[BenchmarkModel], settings: Settings) -> dict[str, dict[str, float]]:
    """Time training steps: name of a model -> [`summary`]."""
    runs = {(entry.name,): training_step(entry, settings) for entry in chosen}
    return {name: summary(samples) for (name,), samples in interleave(runs, settings, "training").items()}


def training_step(entry: BenchmarkModel, settings: Settings) -> Callable[[], None]:
    """A function that trains on one batch: forward, loss, backward and a step of AdamW. Frozen trunks stay frozen."""
    model = entry.build(settings.attention).to(settings.device).train()
    images = random_images(entry, settings)
    labels = torch.randint(NUM_LABELS, (settings.batch_size,), device=settings.device)
    optimizer = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    forward = compiled(model, settings)
    autocast = torch.autocast(settings.device, DTYPES[settings.dtype], enabled=settings.dtype != "float32")

    def step() -> None:
        with autocast:
            outputs = forward(images)
            logits = outputs if isinstance(outputs, torch.Tensor) else outputs.logits
            loss = nn.functional.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compiled(run: Callable, settings: Settings) -> Callable:
    """The function, compiled if the settings ask for it."""
    if not settings.compile:
        return run
    # All models of transformers share the code of one decorator. Without higher limits the compiler would give
    # up after some versions of it. torch.compile takes a limit itself only in recent versions of PyTorch.
    config = torch._dynamo.config
    config.recompile_limit = config.accumulated_recompile_limit = 1000
    return torch.compile(run, mode=settings.compile_mode, dynamic=False)


def random_images(entry: BenchmarkModel, settings: Settings) -> torch.Tensor:
    """Random pixel values, in the memory layout that the family's own preprocessing makes."""
    shape = (settings.batch_size, 3, entry.image_size, entry.image_size)
    layout = torch.channels_last if entry.family == "DART" else torch.contiguous_format
    return torch.randn(shape, device=settings.device).contiguous(memory_format=layout)
