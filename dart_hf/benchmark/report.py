"""Results of the benchmark as ratios, as a table and as plots."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dart_hf.benchmark.timing import PARTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The pairs for which the project promises a speed: a model and its peer.
COMPARISONS = (("DART-S@392", "DeiT-B@224"), ("DART-S@392", "DeiT-S@384"), ("DART-Ti@196", "DeiT-Ti@224"))
COLOURS = {"DART": "#d95f02", "timm": "#1b9e77", "transformers": "#7570b3"}


def compare(entries: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Throughput, time and memory of models as multiples of their peers', for the pairs in [`COMPARISONS`]."""

    def ratio(model: dict, peer: dict, *path: str) -> float | None:
        for step in path:
            model, peer = (model or {}).get(step), (peer or {}).get(step)
        return round(model / peer, 3) if model and peer else None

    def all_tokens(entry: dict[str, Any]) -> dict[str, float]:
        """The time that the model would take if its last layer computed all tokens, as the layers of its peers do."""
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
    """Bars of the time of one forward pass: by part for a DART, whole for its peers."""
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
        # Peers lie close together: names of DARTs are above their points, other names below.
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
