"""`python -m dart_hf`, for launchers: `accelerate launch -m dart_hf train ...`, `torchrun -m dart_hf train ...`."""

from dart_hf.cli.main import app

app(prog_name="dart-hf")
