"""What the tests of `dart-hf train` share: a tiny configuration, folders of digits, and calls of the command."""

from collections.abc import Callable

from typer.testing import CliRunner

from dart_hf.cli.main import app
from dart_hf.training.run import run_training
from dart_hf.training.settings import parse_settings

SIDE = 32
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "initializer_range": 0.1,
    "patch_size": 8,
    "scorer": "conv",
}
CONFIG = {
    "preset": "tiny",
    "model_settings": SMALL,
    "image_size": SIDE,
    "crop_pct": 1.0,
    "num_patches": 16,
    "learning_rate": 3e-3,
    "disable_tqdm": True,
}


def train(*arguments: object, say: Callable[[str], None] = lambda line: None) -> dict:
    return run_training(parse_settings([str(argument) for argument in arguments]), say=say)


def command(*arguments: object):
    return CliRunner().invoke(app, ["train", *map(str, arguments)], prog_name="dart-hf", catch_exceptions=False)


def sentence(result) -> str:
    assert result.exit_code == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("dart-hf: ")]
    assert len(lines) == 1
    return lines[0]
