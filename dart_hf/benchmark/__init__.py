"""Measure speed and memory of DART beside timm's DeiT and transformers' ViT."""

from dart_hf.benchmark.run import run_benchmark
from dart_hf.benchmark.timing import Settings

__all__ = ["Settings", "run_benchmark"]
