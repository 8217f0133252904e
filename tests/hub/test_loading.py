"""Models on a Hub, as users meet them: loaded by id, with and without dart_hf, converted, used on the command line."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
from helpers.hub_server import READ_TOKEN, HubServer
from PIL import Image
from skimage import data
from timm.models import save_for_hf
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from dart_hf import DartConfig, DartForImageClassification, DartImageProcessor, DartModel

CLEAN_SCRIPT = Path(__file__).parents[1] / "helpers" / "without_dart_hf.py"

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
from dart_hf.cli.main import app

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
    command = [sys.executable, "-m", "dart_hf", "convert", "yinkx3/DART", "--variant", "darvit-tiny"]
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


@pytest.fixture(scope="module")
def photos(picture) -> dict[str, bytes]:
    """A data set of two splits with two images of each class."""
    image = picture.read_bytes()
    return {
        f"{split}/{name}/{number}.png": image
        for split in ("train", "test")
        for name in ("cup", "cat", "rocket")
        for number in range(2)
    }


def test_a_data_set_of_the_hub(command_line, tmp_path, folder, photos):
    """Downloaded to evaluate with, and read as a stream while training."""
    hub, dart_hf = command_line
    hub.add("datasets/user/photos", photos)
    code, printed, complaint = dart_hf("evaluate", "--model", folder, "--data", "user/photos", "--limit", "3")
    assert code == 0, complaint
    assert "3 images of user/photos (test)" in printed
    stream = ["--streaming", "--max-steps", "1", "--per-device-train-batch-size", "2", "--output", tmp_path / "trained"]
    code, printed, complaint = dart_hf("train", "--model", folder, "--data", "user/photos", *stream)
    assert code == 0, complaint
    facts = json.loads((tmp_path / "trained" / "training.json").read_text())
    assert (facts["steps"], facts["data"]["source"]) == (1, "user/photos")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (None, "doesn't exist on the Hub or cannot be accessed; 'hf auth login'"),
        ({"where": "info", "how": 403, "code": "GatedRepo"}, "gated"),
        ({"where": "info", "how": 500}, "500"),
        ({"where": "resolve_head", "how": 403}, "403"),
        ({"where": "info", "how": "drop answer"}, "connection broke.*run this again"),
    ],
)
def test_a_data_set_that_cannot_be_had(command_line, tmp_path, folder, photos, fault, reason, streaming):
    hub, dart_hf = command_line
    name = f"user/{tmp_path.name.replace('_', '-')}"
    if fault is not None:
        hub.add(f"datasets/{name}", photos)
        hub.fail(**fault, path=name, times=100)
    data = ["--model", folder, "--data", name]
    if streaming:
        code, printed, complaint = dart_hf(
            "train", *data, "--streaming", "--max-steps", "1", "--output", tmp_path / "o"
        )
    else:
        code, printed, complaint = dart_hf("evaluate", *data)
    hub.mend()
    assert (code, printed) == (2, "")
    assert re.fullmatch(f"dart-hf: data: there is no folder '{name}', and no such data set .*{reason}.*\n", complaint)
    assert "http" not in complaint


@pytest.fixture(scope="module")
def vit_folders(tmp_path_factory) -> dict[str, Path]:
    """A small ViT of transformers, and one of timm."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("transformers", "timm")}
    ViTModel(
        ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ).save_pretrained(folders["transformers"])
    ViTImageProcessor().save_pretrained(folders["transformers"])
    size = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    save_for_hf(timm.create_model("vit_tiny_patch16_224", num_classes=0, **size), folders["timm"], model_args=size)
    return folders


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_a_vit_of_the_hub(command_line, tmp_path, vit_folders, library):
    hub, dart_hf = command_line

    def convert(name: str) -> tuple[int, str, str]:
        return dart_hf("convert", "--from", "vit", f"user/{name}", "--output", tmp_path / "output")

    def stops(name: str, reason: str, **fault: object) -> None:
        hub.add(f"user/{name}", vit_folders[library], private=name.startswith("private"))
        if fault:
            hub.fail(**fault, times=100)
        code, printed, complaint = convert(name)
        hub.mend()
        assert (code, printed) == (2, "")
        assert re.fullmatch(f"dart-hf: .*user/{name}.*{reason}.*\n", complaint)
        assert "damaged" not in complaint and "http" not in complaint
        assert not (tmp_path / "output").exists()

    stops(f"private-{library}", "no such repository, or it is private.*hf auth login")
    stops(f"gated-{library}", "gated.*hf auth login", where="resolve_head", how=403, code="GatedRepo")
    stops(library, "500", where="lfs_download", how=500)
    stops(library, "connection broke.*run this again", where="lfs_download", how="drop answer", after_bytes=1000)
    code, _, complaint = convert(library)
    assert code == 0, complaint
    assert DartModel.from_pretrained(tmp_path / "output").config.hidden_size == 32
