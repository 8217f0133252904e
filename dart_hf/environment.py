"""The surroundings of a run: the machine, the command that is running, and the optional packages."""

import importlib.metadata
import platform
import shlex
import sys
import timeit
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch


def machine(device: str = "cpu") -> dict[str, Any]:
    """The hardware and the versions that a measurement ran on."""
    packages = ("dart-hf", "torch", "torchvision", "transformers", "timm")
    return {
        "processor": _processor_name(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {package: importlib.metadata.version(package) for package in packages},
    }


def synchronized_time() -> float:
    """The clock in seconds, read when the accelerator has finished all its work.

    `torch.utils.benchmark.timer` does the same, but its import warns on machines with a CUDA compiler and no GPU.
    """
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return timeit.default_timer()


def command_line() -> str:
    """The command that is running, without the folder of its program."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def require_packages(purpose: str, extra: str, *modules: str) -> None:
    """Check that optional packages are installed.

    Args:
        purpose: The purpose that needs them, as the start of the error message: `"Drawing"`.
        extra: The extra of this package that installs them.
        modules: The names by which they are imported.

    Raises:
        ImportError: One of them is missing.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ImportError(
            f"{purpose} needs {', '.join(missing)}, which is not installed: pip install 'dart-hf[{extra}]'."
        )


def _processor_name() -> str:
    try:
        information = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in information if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
