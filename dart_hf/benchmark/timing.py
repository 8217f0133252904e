"""Speed and memory of DART beside the vision transformers that it competes with, measured in one run.

The models take turns: in every round each runs once untimed and then a few times timed, so that what the machine does
meanwhile hits all of them alike. Weights are random; the scores of a random scorer are standardised like any other, so
its regions differ in size. Reading, resizing and moving the images is not part of any time.
"""

import functools
import gc
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from timm.layers import set_fused_attn
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForImageClassification, PreTrainedModel, ViTConfig, ViTForImageClassification

from dart_hf.environment import command_line, machine
from dart_hf.hub.loading import without_warnings
from dart_hf.modeling.image_rebuilder import ImageRebuilder
from dart_hf.presets import preset_config
from dart_hf.visualization import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_LABELS = 1000
DART_IMAGE_SIZE = 448
PATCH_SIZE = 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
# Size -> hidden size, attention heads; twelve layers and an MLP four times as wide in each.
SIZES = {"Ti": (192, 3), "S": (384, 6), "B": (768, 12)}
DART_PRESETS = {
    "Ti": "tiny",
    "S": "small",
    "Vim-Ti": "vim-tiny",
    "Vim-S": "vim-small",
    "RMT-S": "rmt-small",
    "RMT-L6": "rmt-L6",
}
TIMM_NAMES = {"Ti": "deit_tiny_patch16_224", "S": "deit_small_patch16_224", "B": "deit_base_patch16_224"}
BUDGETS = {
    **dict.fromkeys(("Ti", "S"), (121, 196, 288, 392)),
    **dict.fromkeys(("Vim-Ti", "Vim-S"), (196, 392)),
    **dict.fromkeys(("RMT-S", "RMT-L6"), (196,)),
}
# ImageNet-1k top-1 in percent, as the DART paper reports them (arXiv 2506.10390).
PUBLISHED_ACCURACY = {
    "DART-Ti@121": 71.8,
    "DART-Ti@196": 73.8,
    "DART-S@196": 80.6,
    "DART-S@392": 81.8,
    "DART-Vim-Ti@196": 77.2,
    "DART-Vim-Ti@392": 78.9,
    "DART-Vim-S@196": 81.5,
    "DART-Vim-S@392": 82.2,
    "DeiT-Ti@224": 72.2,
    "DeiT-S@224": 79.8,
    "DeiT-S@384": 81.6,
    "DeiT-B@224": 81.8,
}
# What the project promises, as a model and its peer.
COMPARISONS = (("DART-S@392", "DeiT-B@224"), ("DART-S@392", "DeiT-S@384"), ("DART-Ti@196", "DeiT-Ti@224"))
PARTS = ("scorer", "partition", "sampling + projection + positions", "encoder + head")
COLOURS = {"DART": "#d95f02", "timm": "#1b9e77", "transformers": "#7570b3"}


@dataclass(frozen=True)
class Contestant:
    """A model to measure.

    Args:
        family: `"DART"`, `"timm"` or `"transformers"`.
        size: `"Ti"`, `"S"` or `"B"`; a DART's may have another encoder, such as `"Vim-Ti"`.
        image_size: Side in pixels of the images that it reads.
        num_patches: Tokens per image, the class token not counted.
    """

    family: str
    size: str
    image_size: int
    num_patches: int

    @property
    def name(self) -> str:
        """`DART-<size>@<tokens>`, timm's `DeiT-<size>@<pixels>`, transformers' `ViT-<size>@<pixels>`."""
        if self.family == "DART":
            return f"DART-{self.size}@{self.num_patches}"
        return f"{'DeiT' if self.family == 'timm' else 'ViT'}-{self.size}@{self.image_size}"

    def build(self, attention: str = "sdpa") -> nn.Module:
        """The model with random weights and the given implementation of attention."""
        if self.family == "DART":
            config = preset_config(
                DART_PRESETS[self.size],
                num_patches=self.num_patches,
                image_size=self.image_size,
                num_labels=NUM_LABELS,
            )
            # What has no attention takes no implementation of it.
            chosen = {} if config.model_type == "dart_vim" else {"attn_implementation": attention}
            return AutoModelForImageClassification.from_config(config, **chosen)
        if self.family == "timm":
            # A switch for all of timm, which each layer reads when it is made.
            set_fused_attn(attention == "sdpa")
            model = timm.create_model(TIMM_NAMES[self.size], img_size=self.image_size, num_classes=NUM_LABELS)
            set_fused_attn()
            return model
        hidden_size, heads = SIZES[self.size]
        return ViTForImageClassification(
            ViTConfig(
                hidden_size=hidden_size,
                num_attention_heads=heads,
                intermediate_size=4 * hidden_size,
                image_size=self.image_size,
                num_labels=NUM_LABELS,
                attn_implementation=attention,
            )
        )


def contestants() -> list[Contestant]:
    """DART at its budgets, and DeiT and ViT of the sizes and resolutions of the paper's comparison."""
    plain = [(size, 224) for size in SIZES] + [("S", 384), ("S", 448)]
    return [
        *(Contestant("DART", size, DART_IMAGE_SIZE, budget) for size, budgets in BUDGETS.items() for budget in budgets),
        *(
            Contestant(family, size, image_size, (image_size // PATCH_SIZE) ** 2)
            for family in ("timm", "transformers")
            for size, image_size in plain
        ),
    ]


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Args:
        device: `"cpu"` or `"cuda"`.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`. Inference runs models of this dtype, training runs float32
            models under autocast.
        attention: `"sdpa"`, or `"eager"` for plain matrix products and a softmax.
        batch_size: Images at once.
        threads: Threads of PyTorch; as many as it takes by itself without.
        compile: Whether every model is compiled (`torch.compile`).
        compile_mode: Its mode, such as `"reduce-overhead"` for CUDA graphs.
        rounds: How often each model has its turn.
        calls: How many timed calls make a turn.
        training: Whether training steps are measured too.
        memory: Whether peak memory is measured too, each model in a process of its own. With `compile` on a CPU it
            includes the compiler's.
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
        """Raise a ValueError that names the first setting that cannot be measured here."""
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
            raise ValueError("device='cuda' needs a CUDA GPU and a PyTorch built for it; neither was found together.")


def run_benchmark(
    output: str | os.PathLike,
    settings: Settings | None = None,
    models: Sequence[str] = ("*",),
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure, and write `benchmark.json`, `time_split.png` and `throughput.png`.

    Args:
        output: Folder for the results; made if missing.
        settings: How to measure.
        models: Patterns of the names to measure, such as `"DART-S@*"`.
        say: Takes each line meant for the reader.

    Returns:
        What `benchmark.json` holds. Times are milliseconds for a batch, memory is MiB.

    Raises:
        ValueError: A setting is out of range, or a pattern names no model.
        OSError: `output` cannot be written to.
    """
    settings = settings or Settings()
    settings.check()
    chosen = _choose(models)
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
        for name, value in _time_inference(chosen, settings).items():
            entries[name].update(value)
        if settings.training:
            for name, value in _time_training(chosen, settings).items():
                entries[name]["training"] = value
        if settings.memory:
            for name, value in _peak_memory(chosen, settings).items():
                entries[name]["peak_memory"] = value
    results = {
        "command": command_line(),
        "settings": asdict(settings),
        "machine": machine(settings.device),
        "comparisons": _compare(entries),
        "models": list(entries.values()),
    }
    (output / "benchmark.json").write_text(json.dumps(results, indent=2) + "\n")
    save_figure(draw_time_split(results), output / "time_split.png")
    save_figure(draw_throughput(results), output / "throughput.png")
    for line in table(results):
        say(line)
    say(f"Wrote {output / 'benchmark.json'}, time_split.png and throughput.png")
    return results


def _choose(patterns: Sequence[str]) -> list[Contestant]:
    known = contestants()
    for pattern in patterns:
        if not any(fnmatch(entry.name, pattern) for entry in known):
            names = ", ".join(entry.name for entry in known)
            raise ValueError(f"models={pattern!r} names no model; accepted are patterns of {names}.")
    return [entry for entry in known if any(fnmatch(entry.name, pattern) for pattern in patterns)]


# --- time ------------------------------------------------------------------------------------------------------------


def _time_inference(chosen: Sequence[Contestant], settings: Settings) -> dict[str, dict[str, Any]]:
    """Per model: `parameters`, `inference`; of a DART also `parts`, and of its ViTs `encoders`."""
    runs: dict[tuple[str, ...], Callable[[], Any]] = {}
    results: dict[str, dict[str, Any]] = {}
    for entry in chosen:
        model = entry.build(settings.attention).eval().requires_grad_(False)
        results[entry.name] = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
        model = model.to(settings.device, DTYPES[settings.dtype])
        images = _images(entry, settings).to(DTYPES[settings.dtype])
        runs[entry.name, "inference"] = functools.partial(_compiled(model, settings), images)
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
    """The steps of one forward of a DART classifier, each on the results of the one before."""
    tokenizer, num_patches, size = model.base_model.tokenizer, model.config.num_patches, images.shape[2:]
    rebuilds = isinstance(tokenizer, ImageRebuilder)

    def score(images: torch.Tensor) -> torch.Tensor:
        return tokenizer.score(images.contiguous(memory_format=torch.channels_last))

    def partition(scores: torch.Tensor) -> Any:
        return tokenizer.partition(scores, num_patches, *size)

    with torch.inference_mode():
        scores = score(images)
        regions = partition(scores)
        channels_last = images.contiguous(memory_format=torch.channels_last)
        inputs = tokenizer(images)[:-1]
    arguments = ((images,), (scores,), (channels_last, regions), inputs)
    steps = (score, partition, tokenizer.rebuild if rebuilds else tokenizer.embed, _encoder_and_head(model))
    return {
        part: functools.partial(_compiled(step, settings), *given)
        for part, step, given in zip(PARTS, steps, arguments, strict=True)
    }


def _encoder_and_head(model: PreTrainedModel) -> Callable[..., torch.Tensor]:
    """What comes after the tokenizer, given what it returns without the regions."""
    base, classifier = model.base_model, model.classifier
    return {
        "dart": lambda tokens, place: classifier(base.encode(tokens, place, class_token_only=True)[:, 0]),
        "dart_vim": lambda tokens, place: classifier(base.encode(tokens, place)[:, tokens.shape[1] // 2]),
        "dart_rmt": lambda rebuilt: classifier(base.pooler(base.encode(rebuilt))),
    }[model.config.model_type]


def _encoders(entry: Contestant, model: PreTrainedModel, settings: Settings) -> dict[str, Callable]:
    """The encoder for all tokens, and timm's at the same length, of a ViT."""
    if model.config.model_type != "dart":
        return {}
    peer = Contestant("timm", entry.size, 224, 196).build(settings.attention).eval().requires_grad_(False)
    peer = nn.Sequential(*peer.blocks, peer.norm).to(settings.device, DTYPES[settings.dtype])
    shape = (settings.batch_size, entry.num_patches, SIZES[entry.size][0])
    tokens = torch.randn(shape, device=settings.device, dtype=DTYPES[settings.dtype])
    class_position = torch.zeros_like(tokens[:1, :1])
    return {
        "ours": functools.partial(_compiled(model.dart.encode, settings), tokens, class_position),
        "timm": functools.partial(_compiled(peer, settings), torch.cat([tokens, tokens[:, :1]], dim=1)),
    }


def _time_training(chosen: Sequence[Contestant], settings: Settings) -> dict[str, dict[str, float]]:
    runs = {(entry.name,): _training_step(entry, settings) for entry in chosen}
    return {name: summary(samples) for (name,), samples in interleave(runs, settings, "training").items()}


def _training_step(entry: Contestant, settings: Settings) -> Callable[[], None]:
    """Forward, loss, backward and AdamW's step on one batch; a DART's frozen trunk stays frozen."""
    model = entry.build(settings.attention).to(settings.device).train()
    images = _images(entry, settings)
    labels = torch.randint(NUM_LABELS, (settings.batch_size,), device=settings.device)
    optimizer = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    forward = _compiled(model, settings)
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


def interleave(
    runs: dict[tuple[str, ...], Callable[[], Any]], settings: Settings, description: str
) -> dict[tuple[str, ...], list[float]]:
    """Milliseconds of every call, by run: in each round a run has one untimed call and then `settings.calls` timed."""
    times: dict[tuple[str, ...], list[float]] = {key: [] for key in runs}
    # The first round is not counted: there the models are compiled and memory is taken.
    for number in tqdm(range(settings.rounds + 1), desc=description, unit="round", leave=False):
        for key, run in runs.items():
            _call(run, settings)
            for _ in range(settings.calls if number else 0):
                times[key].append(_call(run, settings))
    return times


def _call(run: Callable[[], Any], settings: Settings) -> float:
    if settings.compile:
        # With CUDA graphs: nothing of the last call is read any more.
        torch.compiler.cudagraph_mark_step_begin()
    _synchronize(settings)
    started = time.perf_counter()
    run()
    _synchronize(settings)
    return (time.perf_counter() - started) * 1e3


def _synchronize(settings: Settings) -> None:
    if settings.device == "cuda":
        torch.cuda.synchronize()


def _compiled(run: Callable, settings: Settings) -> Callable:
    if not settings.compile:
        return run
    # All of transformers' models share the code of one decorator, and past a number of versions of it the compiler
    # would leave the rest as it is.
    config = torch._dynamo.config
    config.recompile_limit = config.accumulated_recompile_limit = 1000
    return torch.compile(run, mode=settings.compile_mode, dynamic=False)


def _images(entry: Contestant, settings: Settings) -> torch.Tensor:
    """Random pixel values in the memory layout that the family's own preprocessing makes."""
    shape = (settings.batch_size, 3, entry.image_size, entry.image_size)
    layout = torch.channels_last if entry.family == "DART" else torch.contiguous_format
    return torch.randn(shape, device=settings.device).contiguous(memory_format=layout)


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median, first and third quartile of milliseconds, and how many there are."""
    low, middle, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else samples * 3
    return {"median": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)], "samples": len(samples)}


# --- memory ----------------------------------------------------------------------------------------------------------


def _peak_memory(chosen: Sequence[Contestant], settings: Settings) -> dict[str, dict[str, float] | None]:
    """MiB that building the model and two steps take, each in a new process: what others left does not count."""
    context = multiprocessing.get_context("spawn")
    results = {}
    for entry in tqdm(chosen, desc="memory", unit="model", leave=False):
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            try:
                results[entry.name] = pool.submit(_measure_memory, entry, settings, torch.get_num_threads()).result()
            except BrokenProcessPool:
                # The system killed it, most likely for taking too much memory.
                results[entry.name] = None
    return results


@without_warnings()
def _measure_memory(entry: Contestant, settings: Settings, threads: int) -> dict[str, float] | None:
    torch.set_num_threads(threads)
    before = memory_high_water(settings.device)
    if before is None:
        return None
    results = {}
    model = entry.build(settings.attention).eval().to(settings.device, DTYPES[settings.dtype])
    run = functools.partial(_compiled(model, settings), _images(entry, settings).to(DTYPES[settings.dtype]))
    with torch.inference_mode():
        for _ in range(2):
            _call(run, settings)
    results["inference"] = round(memory_high_water(settings.device) - before, 1)
    if settings.training:
        del model, run
        gc.collect()
        step = _training_step(entry, settings)
        for _ in range(2):
            _call(step, settings)
        results["training"] = round(memory_high_water(settings.device) - before, 1)
    return results


def memory_high_water(device: str) -> float | None:
    """The most MiB taken so far: by the process, or on the GPU. None where the system does not tell."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next(int(line.split()[1]) / 2**10 for line in status.splitlines() if line.startswith("VmHWM:"))


# --- results ---------------------------------------------------------------------------------------------------------


def _compare(entries: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times its peer's throughput and its peer's time, memory and training step a model has."""

    def ratio(model: dict, peer: dict, *path: str) -> float | None:
        for step in path:
            model, peer = (model or {}).get(step), (peer or {}).get(step)
        return round(model / peer, 3) if model and peer else None

    def all_tokens(entry: dict[str, Any]) -> dict[str, float]:
        """The time if the last layer computed all tokens, as the peers' does."""
        encoder = entry["encoders"]["ours"]["median"] - entry["parts"]["encoder + head"]["median"]
        return {"median": entry["inference"]["median"] + encoder}

    return [
        {
            "model": name,
            "peer": peer,
            "inference_time_all_tokens": ratio(all_tokens(entries[name]), entries[peer]["inference"], "median"),
            "throughput": ratio(entries[name], entries[peer], "inference", "images_per_second"),
            "inference_time": ratio(entries[name], entries[peer], "inference", "median"),
            "training_time": ratio(entries[name], entries[peer], "training", "median"),
            "inference_memory": ratio(entries[name], entries[peer], "peak_memory", "inference"),
            "training_memory": ratio(entries[name], entries[peer], "peak_memory", "training"),
        }
        for name, peer in COMPARISONS
        if name in entries and peer in entries
    ]


def table(results: dict[str, Any]) -> Iterator[str]:
    """The results as lines of text."""
    where, settings = results["machine"], results["settings"]
    yield (
        f"{where['gpu'] or where['processor']}, {where['threads']} threads, {settings['dtype']}, batch "
        f"{settings['batch_size']}, {_mode(settings)}; medians, ms for a batch"
    )
    heads = ("", "inference", "images/s", "training step", "MiB inference", "MiB training", *PARTS, "encoder / timm's")
    yield "  ".join(f"{head:>{max(12, len(head))}}" for head in heads)
    for entry in results["models"]:
        whole, memory = entry["inference"]["median"], entry.get("peak_memory") or {}
        encoders = {name: encoder["median"] for name, encoder in entry.get("encoders", {}).items()}
        cells = [
            entry["name"],
            f"{whole:.1f}",
            f"{entry['inference']['images_per_second']:.1f}",
            f"{entry['training']['median']:.1f}" if "training" in entry else "",
            *(f"{memory[kind]:.0f}" if kind in memory else "" for kind in ("inference", "training")),
            *(f"{entry['parts'][part]['median'] / whole:.1%}" if "parts" in entry else "" for part in PARTS),
            f"{encoders['ours'] / encoders['timm']:.3f}" if encoders else "",
        ]
        yield "  ".join(f"{cell:>{max(12, len(head))}}" for cell, head in zip(cells, heads, strict=True))
    for comparison in results["comparisons"]:
        ratios = (
            f"{what.replace('_', ' ')} {comparison[what]:.2f}"
            for what in comparison
            if isinstance(comparison[what], float)
        )
        yield f"{comparison['model']} : {comparison['peer']}  {', '.join(ratios)}"


def draw_time_split(results: dict[str, Any]) -> "Figure":
    """Where the time of one forward goes, beside the plain transformers' time."""
    from matplotlib.figure import Figure

    entries = results["models"]
    figure = Figure(figsize=(9, 0.36 * len(entries) + 1.6), layout="constrained")
    axes = figure.subplots()
    shades = ("#7f2704", "#d94801", "#fd8d3c", "#fdd0a2")
    for row, entry in enumerate(entries):
        parts = entry.get("parts")
        start = 0.0
        for part, shade in zip(PARTS, shades, strict=True) if parts else ():
            length = parts[part]["median"]
            axes.barh(row, length, left=start, color=shade, label=part if entry is _first_dart(entries) else None)
            start += length
        if not parts:
            axes.barh(row, entry["inference"]["median"], color=COLOURS[entry["family"]])
    axes.set_yticks(range(len(entries)), [entry["name"] for entry in entries])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds for a batch")
    axes.set_title(_caption(results))
    if _first_dart(entries):
        axes.legend(loc="upper right")
    return figure


def draw_throughput(results: dict[str, Any]) -> "Figure":
    """Images per second against the published accuracy."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    labelled = set()
    for entry in results["models"]:
        if "published_accuracy" not in entry:
            continue
        family, speed = entry["family"], entry["inference"]["images_per_second"]
        axes.scatter(
            speed,
            entry["published_accuracy"],
            color=COLOURS[family],
            label=None if family in labelled else {"DART": "DART", "timm": "DeiT (timm)"}[family],
        )
        labelled.add(family)
        # Rivals lie side by side: the names of one family stand above their points, those of the other below.
        place = {"xytext": (0, 6 if family == "DART" else -12), "textcoords": "offset points", "ha": "center"}
        axes.annotate(entry["name"], (speed, entry["published_accuracy"]), fontsize=8, **place)
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_xlabel("images per second")
    axes.set_ylabel("published ImageNet-1k top-1 (%)")
    axes.set_title(_caption(results))
    if labelled:
        axes.legend()
    return figure


def _first_dart(entries: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    return next((entry for entry in entries if "parts" in entry), None)


def _caption(results: dict[str, Any]) -> str:
    where, settings = results["machine"], results["settings"]
    processor = where["gpu"] or f"{where['processor']}, {where['threads']} threads"
    return f"{processor}, {settings['dtype']}, batch {settings['batch_size']}, {_mode(settings)}"


def _mode(settings: dict[str, Any]) -> str:
    compiled = f"compiled ({settings['compile_mode']})" if settings["compile"] else "not compiled"
    return f"{compiled}, {settings['attention']} attention"
