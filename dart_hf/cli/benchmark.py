"""`dart-hf benchmark`."""

from pathlib import Path
from typing import Annotated

import typer

from dart_hf.cli.options import BatchSize

EXAMPLE = "dart-hf benchmark --output results --models 'DART-S@392,DeiT-B@224' --batch-size 16"


def benchmark(
    output: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="Where benchmark.json and the plots go. Created if missing, overwritten."),
    ] = Path("benchmark"),
    models: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Names or patterns, separated by commas: DART-Ti@… and DART-S@… with 121, 196, 288 or 392 tokens, "
            "DART-Vim-Ti@… and DART-Vim-S@… with 196 or 392, DART-RMT-S@196 and DART-RMT-L6@196; "
            "DART-Ti@196 and DART-S@392 with another scorer, only if named: /detail or /encoder; "
            "DeiT-… (timm) and ViT-… (transformers) as Ti@, S@ and B@224, S@384, S@448 pixels.",
        ),
    ] = "*",
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Where the models run.")] = "cpu",
    dtype: Annotated[
        str, typer.Option(metavar="float32|bfloat16|float16", help="Precision. Training uses autocast.")
    ] = "float32",
    attention: Annotated[
        str, typer.Option(metavar="sdpa|eager", help="'eager' computes attention with plain matrix products.")
    ] = "sdpa",
    batch_size: BatchSize = 8,
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Threads of PyTorch. Default: its own choice.")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile every model with torch.compile.")] = False,
    compile_mode: Annotated[
        str, typer.Option(metavar="MODE", help="Mode of torch.compile, e.g. 'reduce-overhead' for CUDA graphs.")
    ] = "default",
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="How many turns each model gets.")] = 5,
    calls: Annotated[int, typer.Option(metavar="N", min=1, help="Timed calls in a turn.")] = 2,
    training: Annotated[bool, typer.Option(help="Measure training steps too.")] = True,
    memory: Annotated[bool, typer.Option(help="Measure peak memory too.")] = True,
) -> None:
    """Measure speed and memory beside timm's DeiT and transformers' ViT, taking turns."""
    from dart_hf.benchmark import Settings, run_benchmark

    settings = Settings(
        device=device,
        dtype=dtype,
        attention=attention,
        batch_size=batch_size,
        threads=threads,
        compile=compiled,
        compile_mode=compile_mode,
        rounds=rounds,
        calls=calls,
        training=training,
        memory=memory,
    )
    names = [name.strip() for name in models.split(",") if name.strip()]
    run_benchmark(output, settings, names, report=typer.echo)
