"""What is installed: every package of the repository."""

import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_package_is_installed():
    """A folder that is missing from pyproject.toml works in an editable installation and is absent from the wheel."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "dart_hf").rglob("*.py")}
    expected = {".".join(folder.parts) for folder in folders} | {"dart_hf.modeling", "dart_hf.conversion"}
    assert sorted(settings["packages"]) == sorted(expected)


def test_make_names_a_missing_file_of_constraints():
    run = subprocess.run(["make", "-n", "test", "CONSTRAINTS=none.txt"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0 and "There is no file CONSTRAINTS=none.txt" in run.stderr
