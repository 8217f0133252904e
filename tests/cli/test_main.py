"""Help, mistakes of users, interruption, and the installed command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import dart_hf.quickstart
from dart_hf import DartForImageClassification, __version__

COMMANDS = [
    *["quickstart", "convert", "train", "evaluate", "calibrate", "predict", "visualize", "publish", "export"],
    "benchmark",
]
# Prints the modules of packages that take seconds to import, if `dart-hf` with these arguments imports them.
HEAVY_IMPORTS = """
import sys
from dart_hf_cli import main
for line in sys.argv[1:]:
    sys.argv[1:] = line.split()
    try:
        main()
    except SystemExit:
        pass
print("imported:", *{"torch", "transformers", "datasets", "huggingface_hub"}.intersection(sys.modules))
"""


def test_help_lists_the_commands(run):
    for result in (run(), run("--help")):
        assert result.exit_code == 0
        assert all(command in result.stdout for command in COMMANDS)
    assert run("--version").stdout == f"dart-hf {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(run, command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: dart-hf {command} " in result.stdout


def test_help_version_and_wrong_options_import_no_torch():
    lines = ["--help", "--version", "paint", *(f"{name} --help" for name in COMMANDS if name != "train"), "predict x"]
    done = subprocess.run([sys.executable, "-c", HEAVY_IMPORTS, *lines], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "imported:"
    assert f"dart-hf {__version__}" in done.stdout.splitlines()


PREDICT = ["predict", "cup.png", "--model"]
VISUALIZE = ["visualize", "cup.png", "--model", "model", "--output"]
EVALUATE = ["evaluate", "--model", "model", "--data"]
CALIBRATE = ["calibrate", "--model", "model", "--data"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["predict", "none.png", "--model", "model"], "There is no image file or folder 'none.png'"),
        (["predict", "half.png", "--model", "model"], "Cannot read 'half.png' as an image: image file is truncated"),
        ([*PREDICT, "empty"], "'empty' holds no model: it has no config.json"),
        ([*PREDICT, "vit"], "'vit', not a DART model"),
        ([*PREDICT, "encoder"], "'encoder' has no classifier: it is DartModel"),
        ([*PREDICT, "incomplete"], "missing classifier.bias"),
        ([*PREDICT, "too-large"], "unexpected extra"),
        ([*PREDICT, "unprepared"], "The folder 'unprepared' has no preprocessor_config.json: save the image processor"),
        ([*PREDICT, "program"], "The folder 'program' holds an exported program, model.onnx"),
        ([*PREDICT, "cup.png"], "'cup.png' is a file"),
        ([*PREDICT, "./none"], "There is no folder './none'"),
        ([*PREDICT, "some/model"], "no folder 'some/model', and the Hub did not give a model of that name"),
        ([*PREDICT, "model", "--num-patches", "0"], "--num-patches"),
        ([*PREDICT, "model", "--top-k", "many"], "--top-k"),
        (["predict", "cup.png"], "Missing option '--model'. See 'dart-hf predict --help'."),
        (["predict", "--model", "model"], "IMAGE"),
        (["visualize", "none.png", "--model", "model", "--output", "out.png"], "There is no image file 'none.png'"),
        (["visualize", "half.png", "--model", "model", "--output", "out.png"], "Cannot read 'half.png'"),
        ([*VISUALIZE, "out.doc"], "'out.doc': its name must end in one of"),
        ([*VISUALIZE, "none/out.png"], "there is no folder 'none'"),
        (["convert", "none.pth", "--output", "out"], "none.pth"),
        (["convert", "text.png", "--output", "out"], "text.png"),
        (["convert", "x", "--output", "out", "--from", "cnn"], "--from must be 'dart' or 'vit', got 'cnn'"),
        (["convert", "x", "--output", "out", "--scorer", "conv"], "--scorer goes with --from vit, got --from dart"),
        (["quickstart", "--steps", "0"], "--steps"),
        ([*EVALUATE, "photos", "--split", "dev"], "'photos' has no split 'dev'; it has 'train', 'test'"),
        ([*EVALUATE, "empty"], "'empty' has no images"),
        ([*EVALUATE, "./none"], "there is no folder './none'"),
        ([*EVALUATE, "other"], "1 of 3 classes ('dog') are none of the model's 3 ('cup', 'cat', 'rocket')"),
        ([*EVALUATE, "damaged"], "cup/5.png' cannot be read"),
        ([*EVALUATE, "damaged", "--workers", "1"], "cup/5.png' cannot be read"),
        ([*EVALUATE, "photos", "--num-patches", "121,abc"], "num_patches must be whole numbers of at least 1"),
        ([*EVALUATE, "photos", "--score-normalization", "layer"], "running, image, batch, got 'layer'"),
        ([*EVALUATE, "photos", "--score-normalization", "running"], "needs statistics, and the model has none"),
        ([*EVALUATE, "photos", "--output", "none/out.json"], "output: there is no folder 'none'"),
        ([*EVALUATE, "photos", "--plot", "out.doc"], "'out.doc': its name must end in one of"),
        (["evaluate", "--model", "encoder", "--data", "photos"], "'encoder' has no classifier: it is DartModel"),
        ([*CALIBRATE, "damaged", "--split", "test", "--output", "out"], "cup/5.png' cannot be read"),
        ([*CALIBRATE, "photos", "--split", "dev", "--output", "out"], "'photos' has no split 'dev'"),
        ([*CALIBRATE, "photos", "--output", "model"], "model is not empty"),
        (["export"], "Missing option '--model'. See 'dart-hf export --help'."),
        (["export", "a", "--model", "model"], "Got unexpected extra arguments: a."),
        (["publish", "user/model"], "Missing option '--model'. See 'dart-hf publish --help'."),
        (["publish", "a", "b", "c"], "Got unexpected extra arguments: a b."),
        (["paint"], "No such command 'paint'."),
        (["--paint"], "No such option: --paint. See 'dart-hf --help'."),
    ],
)
def test_mistake_gives_one_line_and_exit_code_2(run, folder, arguments, words):
    before = set(folder.rglob("*"))
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert set(folder.rglob("*")) == before


def test_bug_keeps_its_traceback(run, folder, monkeypatch):
    def broken(*arguments, **settings):
        raise RuntimeError("a bug")

    monkeypatch.setattr(DartForImageClassification, "forward", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run(*PREDICT, "model")


def test_interrupted_command_prints_its_notes_and_exits_with_130(run, monkeypatch):
    def interrupted(*arguments, **settings):
        interrupt = KeyboardInterrupt()
        interrupt.add_note("Go on with --resume.")
        raise interrupt

    monkeypatch.setattr(dart_hf.quickstart, "run_quickstart", interrupted)
    result = run("quickstart")
    assert (result.exit_code, result.stderr) == (130, "Go on with --resume.\ndart-hf: stopped\n")


def test_installed_command_gives_the_answers_of_the_model(run, folder):
    expected = run("predict", "cup.png", "--json", "--model", "model").stdout
    command = [Path(sys.executable).with_name("dart-hf"), "predict", "cup.png", "--json", "--model", "model"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    answers, wanted = (
        {answer["label"]: answer["probability"] for answer in json.loads(text)[0]["answers"]}
        for text in (done.stdout, expected)
    )
    assert answers == pytest.approx(wanted, abs=1e-5)
