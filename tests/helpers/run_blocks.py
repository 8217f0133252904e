"""Run the code blocks of a page of documentation: `run_blocks.py < blocks.json`, a list of (place, language, code).

The Python blocks share their names, as in a notebook. Commands run in bash, but `dart-hf` runs in this process, which
saves the time of importing torch for each command. The first block that fails ends the run with exit code 1.
"""

import json
import shlex
import subprocess
import sys
from glob import glob

from dart_hf.cli.main import app


def run_command(line: str) -> None:
    words = shlex.split(line, comments=True)
    if words[:1] != ["dart-hf"]:
        subprocess.run(["bash", "-ec", line], check=True)
        return
    arguments = [path for word in words[1:] for path in (sorted(glob(word)) if "*" in word else [word])]
    try:
        app(arguments, prog_name="dart-hf")
    except SystemExit as stop:
        if stop.code:
            raise RuntimeError(f"{line}: exit code {stop.code}") from None


def main() -> None:
    names = {"__name__": "__main__"}
    for place, language, code in json.load(sys.stdin):
        print("Running", place, flush=True)
        if language == "python":
            exec(compile(code, place, "exec"), names)
        else:
            for line in filter(None, code.replace("\\\n", " ").splitlines()):
                run_command(line)


if __name__ == "__main__":
    main()
