"""Models on a Hub, as users meet them: loaded by id, with and without dart_hf, converted, used on the command line."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hub_server import READ_TOKEN, HubServer
from PIL import Image
from skimage import data

from dart_hf import DartConfig, DartForImageClassification, DartImageProcessor

CLEAN_SCRIPT = Path(__file__).with_name("without_dart_hf.py")

# Loads the model in the three ways that users do.
BY_ID = """
import json, sys
import torch
from PIL import Image
import dart_hf
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

_, name, picture = sys.argv
classify = pipeline("image-classification", model=name)
pixels = AutoImageProcessor.from_pretrained(name)(Image.open(picture), return_tensors="pt").pixel_values
with torch.no_grad():
    print(json.dumps({
        "class": dart_hf.DartForImageClassification.from_pretrained(name)(pixels).logits[0].tolist(),
        "auto": AutoModelForImageClassification.from_pretrained(name)(pixels).logits[0].tolist(),
        "pipeline": {answer["label"]: answer["score"] for answer in classify(picture)},
    }))
"""

COMMANDS = """
import json, sys
from typer.testing import CliRunner
from dart_hf.cli import app

for line in sys.stdin:
    result = CliRunner().invoke(app, json.loads(line))
    print(json.dumps([result.exit_code, result.stdout, result.stderr]), flush=True)
"""


def tiny_model(seed: int) -> DartForImageClassification:
    torch.manual_seed(seed)
    config = DartConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, patch_size=4, num_patches=9,
        scorer="conv", id2label={0: "cup", 1: "cat", 2: "rocket"}, initializer_range=0.5,
    )  # fmt: skip
    return DartForImageClassification(config).eval()


def saved(model: DartForImageClassification, folder: Path) -> Path:
    model.save_pretrained(folder)
    DartImageProcessor(size=32, crop_size=32).save_pretrained(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def model() -> DartForImageClassification:
    return tiny_model(0)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    return saved(model, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "cup.png"
    Image.fromarray(data.coffee()).save(path)
    return path


@pytest.fixture(scope="module")
def command_line(tmp_path_factory) -> Iterator[tuple[HubServer, Callable[..., tuple[int, str, str]]]]:
    """A Hub, and `dart-hf` for somebody without a token: arguments -> exit code, what it prints, and its complaint."""
    with HubServer() as hub, hub.conversation(COMMANDS, tmp_path_factory.mktemp("home")) as ask:
        yield hub, lambda *arguments: tuple(json.loads(ask(json.dumps([str(each) for each in arguments]))))


def test_a_model_loads_by_its_id(hub, tmp_path, model, folder, picture):
    hub.add("user/model", folder)
    done = hub.run([sys.executable, "-c", BY_ID, "user/model", picture], tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    pixels = DartImageProcessor.from_pretrained(folder)(Image.open(picture), return_tensors="pt").pixel_values
    with torch.no_grad():
        logits = model(pixels).logits[0]
    torch.testing.assert_close(torch.tensor(found["class"]), logits)
    torch.testing.assert_close(torch.tensor(found["auto"]), logits)
    assert found["pipeline"] == pytest.approx(
        dict(zip(["cup", "cat", "rocket"], logits.softmax(0).tolist(), strict=True))
    )


def test_a_revision_of_a_private_model_loads_by_its_own_code(hub, tmp_path, model, folder):
    revision = hub.add("user/model", folder, private=True)
    hub.add("user/model", saved(tiny_model(1), tmp_path / "newer"))
    command = [sys.executable, "-P", CLEAN_SCRIPT, "user/model", tmp_path / "resaved", revision.id]
    done = hub.run(command, tmp_path, READ_TOKEN)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    with torch.no_grad():
        logits = model(torch.linspace(-1, 1, 3 * 32 * 32).sin().view(1, 3, 32, 32)).logits[0]
    assert found["classes"] == ["transformers_modules"] * 3
    assert found["dart_hf"] is False
    torch.testing.assert_close(torch.tensor(found["logits"]), logits)
    torch.testing.assert_close(torch.tensor(found["again"]), logits)
    assert found["labels"] == 3


def test_the_authors_checkpoint_is_converted_from_the_hub(hub, tmp_path, stand_in, converted):
    hub.add("yinkx3/DART", {"darvit-tiny.pth": stand_in("darvit-tiny").read_bytes()})
    command = [Path(sys.executable).with_name("dart-hf"), "convert", "yinkx3/DART", "--variant", "darvit-tiny"]
    done = hub.run([*command, "--output", "dart-tiny"], tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "Wrote dart-tiny\n", "")
    assert contents(tmp_path / "dart-tiny") == contents(converted("darvit-tiny"))


def test_a_checkpoint_that_cannot_be_had(command_line, tmp_path, stand_in):
    hub, dart_hf = command_line
    output = tmp_path / "dart-tiny"
    convert = ("convert", "yinkx3/DART", "--variant", "darvit-tiny", "--output", output)

    def expect(reason: str) -> None:
        code, printed, complaint = dart_hf(*convert)
        hub.mend()
        assert (code, printed) == (2, "")
        assert re.fullmatch(f"dart-hf: checkpoint: there is no file 'yinkx3/DART', and .*{reason}.*\n", complaint)
        assert list(tmp_path.iterdir()) == []

    expect("no such repository")
    hub.add("yinkx3/DART", {"darvit-sm.pth": b"another"})
    expect("no such file")
    hub.add("yinkx3/DART", {"darvit-tiny.pth": stand_in("darvit-tiny").read_bytes()})
    hub.fail("lfs_download", 500)
    expect("500")
    hub.fail("resolve_head", "drop answer")
    expect("connection broke.*run this again")
    hub.fail("lfs_download", "drop answer", after_bytes=1_000_000, times=100)
    expect("connection broke.*run this again")
    assert dart_hf(*convert) == (0, f"Wrote {output}\n", "")
    assert (output / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("user/absent", "there is no such repository, or it is private.*hf auth login"),
        ("user/private", "there is no such repository, or it is private.*hf auth login"),
        ("user/empty", "config.json"),
        ("user/gated", "access"),
        ("user/refused", "403"),
        ("user/broken", "connection broke.*run this again"),
        ("user/half", "500"),
    ],
)
def test_a_model_that_cannot_be_had(command_line, folder, picture, name, reason):
    hub, dart_hf = command_line
    if name != "user/absent":
        files = {} if name == "user/empty" else contents(folder)
        hub.add(name, {**files, "name.txt": name.encode()}, private=name == "user/private")
    hub.fail("resolve_head", 403, code="GatedRepo", path="user/gated", times=100)
    hub.fail("resolve_head", 403, path="user/refused", times=100)
    hub.fail("resolve_head", "drop answer", path="user/broken", times=100)
    hub.fail("lfs_download", 500, times=100)
    code, printed, complaint = dart_hf("predict", picture, "--model", name)
    hub.mend()
    assert (code, printed) == (2, "")
    assert re.fullmatch(f"dart-hf: .*{name}.*{reason}.*\n", complaint)
    assert "huggingface.co" not in complaint  # this Hub is another


def test_a_prediction_from_the_hub(command_line, folder, picture):
    hub, dart_hf = command_line
    hub.add("user/model", folder)
    code, printed, _ = dart_hf("predict", picture, "--model", "user/model", "--top-k", "1")
    assert code == 0
    assert re.fullmatch(rf"{re.escape(str(picture))}\n +[\d.]+%  (cup|cat|rocket)\n", printed)
