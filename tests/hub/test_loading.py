"""Models and data sets on a Hub, as users load them: by id, with and without dart_hf, and on the command line."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
from helpers.hub_server import READ_TOKEN, HubServer
from helpers.tiny_models import tiny_classifier
from PIL import Image
from skimage import data
from timm.models import save_for_hf
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from dart_hf import DartForImageClassification, DartImageProcessor, DartModel

LABELS = ("cup", "cat", "rocket")
CLEAN_SCRIPT = Path(__file__).parents[1] / "helpers" / "without_dart_hf.py"

# Answers a list of arguments of `dart-hf` with its exit code, output and errors; "load ID IMAGE" with logits.
CLIENT = """
import json, sys, time
import torch
from typer.testing import CliRunner
import dart_hf
from dart_hf.cli.main import app
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

time.sleep = lambda seconds: None  # between the client's tries


def load(name, picture):
    pixels = AutoImageProcessor.from_pretrained(name)(picture, return_tensors="pt").pixel_values
    classes = [dart_hf.DartForImageClassification, AutoModelForImageClassification]
    with torch.no_grad():
        logits = [each.from_pretrained(name)(pixels).logits[0].tolist() for each in classes]
    answers = pipeline("image-classification", model=name)(picture)
    return [*logits, {answer["label"]: answer["score"] for answer in answers}]


for line in sys.stdin:
    command, *arguments = json.loads(line)
    if command == "load":
        print(json.dumps(load(*arguments)), flush=True)
    else:
        result = CliRunner().invoke(app, [command, *arguments])
        # torch warns once where CUDA_HOME is set without a GPU.
        errors = [line for line in result.stderr.splitlines(True) if "torch/utils/cpp_extension.py" not in line]
        print(json.dumps([result.exit_code, result.stdout, "".join(errors)]), flush=True)
"""
Client = Callable[..., list]


@pytest.fixture(scope="module")
def model() -> DartForImageClassification:
    return tiny_classifier(LABELS, score_normalization="image")


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    DartImageProcessor(size=32, crop_size=32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "cup.png"
    Image.fromarray(data.coffee()).resize((60, 40)).save(path)
    return path


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as hub:
        yield hub


@pytest.fixture(scope="module")
def dart_hf(hub, tmp_path_factory) -> Iterator[Client]:
    """`dart-hf` for somebody without a token: takes arguments, returns exit code, output and errors."""
    with hub.conversation(CLIENT, tmp_path_factory.mktemp("home")) as ask:
        yield lambda *arguments: json.loads(ask(json.dumps([str(each) for each in arguments])))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_model_loads_by_its_id(hub, dart_hf, model, folder, picture):
    hub.add("user/model", folder)
    by_class, by_auto_class, by_pipeline = dart_hf("load", "user/model", picture)
    pixels = DartImageProcessor.from_pretrained(folder)(str(picture), return_tensors="pt").pixel_values
    with torch.no_grad():
        logits = model(pixels).logits[0]
    torch.testing.assert_close(torch.tensor(by_class), logits)
    torch.testing.assert_close(torch.tensor(by_auto_class), logits)
    assert by_pipeline == pytest.approx(dict(zip(LABELS, logits.softmax(0).tolist(), strict=True)))
    exit_code, printed, _ = dart_hf("predict", picture, "--model", "user/model", "--top-k", "1")
    assert exit_code == 0
    assert re.fullmatch(rf"{re.escape(str(picture))}\n +[\d.]+%  (cup|cat|rocket)\n", printed)


def test_revision_of_a_private_model_loads_with_its_own_code(hub, tmp_path, model, folder):
    revision = hub.add("user/secret", folder, private=True)
    hub.add("user/secret", {"modeling_dart.py": b"broken"})
    command = [sys.executable, "-P", CLEAN_SCRIPT, "user/secret", tmp_path / "resaved", revision.id]
    done = hub.run(command, tmp_path, READ_TOKEN)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    with torch.no_grad():
        logits = model(torch.linspace(-1, 1, 3 * 32 * 32).sin().view(1, 3, 32, 32)).logits[0]
    assert (found["classes"], found["dart_hf"], found["labels"]) == (["transformers_modules"] * 3, False, 3)
    torch.testing.assert_close(torch.tensor(found["logits"]), logits)
    torch.testing.assert_close(torch.tensor(found["again"]), logits)


def test_checkpoint_of_the_authors_is_converted_from_the_hub(hub, dart_hf, tmp_path, stand_in, converted):
    output = tmp_path / "dart-tiny"
    convert = ("convert", "yinkx3/DART", "--variant", "darvit-tiny", "--output", output)

    def check_refused(reason: str) -> None:
        exit_code, printed, complaint = dart_hf(*convert)
        hub.mend()
        assert (exit_code, printed) == (2, "")
        assert re.fullmatch(f"dart-hf: checkpoint: there is no file 'yinkx3/DART', and .*{reason}.*\n", complaint)
        assert list(tmp_path.iterdir()) == []

    check_refused("no such repository")
    hub.add("yinkx3/DART", {"darvit-sm.pth": b"another"})
    check_refused("no such file")
    hub.add("yinkx3/DART", {"darvit-tiny.pth": stand_in("darvit-tiny").read_bytes()})
    hub.fail("lfs_download", 500)
    check_refused("500")
    hub.fail("lfs_download", "drop answer", after_bytes=1_000_000, times=100)
    check_refused("connection broke.*run this again")
    assert dart_hf(*convert) == [0, f"Wrote {output}\n", ""]
    assert contents(output) == contents(converted("darvit-tiny"))


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
        ("user/dropped", "connection broke.*run this again"),
    ],
)
def test_model_that_cannot_be_downloaded_is_explained(hub, dart_hf, folder, picture, name, reason):
    if name != "user/absent":
        files = {} if name == "user/empty" else contents(folder)
        hub.add(name, {**files, "name.txt": name.encode()}, private=name == "user/private")
    hub.fail("resolve_head", 403, code="GatedRepo", path="user/gated", times=100)
    hub.fail("resolve_head", 403, path="user/refused", times=100)
    hub.fail("resolve_head", "drop answer", path="user/broken", times=100)
    hub.fail("lfs_download", 500 if name == "user/half" else "drop answer", times=100)
    for command in (("predict", picture), ("publish", "user/copy")):
        exit_code, printed, complaint = dart_hf(*command, "--model", name)
        assert (exit_code, printed) == (2, "")
        assert re.fullmatch(f"dart-hf: .*{name}.*{reason}.*\n", complaint)
        assert "huggingface.co" not in complaint  # this Hub has another address
    hub.mend()


@pytest.fixture(scope="module")
def photos(picture) -> dict[str, bytes]:
    """A data set of two splits with two images of each class."""
    names = (f"{split}/{label}/{i}.png" for split in ("train", "test") for label in LABELS for i in range(2))
    return dict.fromkeys(names, picture.read_bytes())


def test_data_set_of_the_hub_is_downloaded_and_streamed(hub, dart_hf, tmp_path, folder, photos):
    hub.add("datasets/user/photos", photos)
    exit_code, printed, complaint = dart_hf("evaluate", "--model", folder, "--data", "user/photos", "--limit", "3")
    assert exit_code == 0, complaint
    assert "3 images of user/photos (test)" in printed
    stream = ["--streaming", "--max-steps", "1", "--per-device-train-batch-size", "2", "--output", tmp_path / "trained"]
    exit_code, printed, complaint = dart_hf("train", "--model", folder, "--data", "user/photos", *stream)
    assert exit_code == 0, complaint
    facts = json.loads((tmp_path / "trained" / "training.json").read_text())
    assert (facts["steps"], facts["data"]["source"]) == (1, "user/photos")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (None, "doesn't exist on the Hub or cannot be accessed; 'hf auth login'"),
        ({"where": "info", "how": 403, "code": "GatedRepo"}, "gated"),
        ({"where": "info", "how": 500}, "500"),
        ({"where": "info", "how": "drop answer"}, "connection broke.*run this again"),
    ],
)
def test_data_set_that_cannot_be_downloaded_is_explained(
    hub, dart_hf, tmp_path, folder, photos, fault, reason, streaming
):
    name = f"user/{tmp_path.name.replace('_', '-')}"
    if fault is not None:
        hub.add(f"datasets/{name}", photos)
        hub.fail(**fault, path=name, times=100)
    options = ["--streaming", "--max-steps", "1", "--output", tmp_path / "o"] if streaming else []
    command = "train" if streaming else "evaluate"
    exit_code, printed, complaint = dart_hf(command, "--model", folder, "--data", name, *options)
    hub.mend()
    assert (exit_code, printed) == (2, "")
    assert re.fullmatch(f"dart-hf: data: there is no folder '{name}', and .*{reason}.*\n", complaint)
    assert "http" not in complaint


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_vit_of_the_hub_is_converted(hub, dart_hf, tmp_path, library):
    vit = tmp_path / "vit"
    if library == "transformers":
        size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        ViTModel(ViTConfig(**size)).save_pretrained(vit)
        ViTImageProcessor().save_pretrained(vit)
    else:
        size = {"embed_dim": 32, "depth": 1, "num_heads": 2}
        save_for_hf(timm.create_model("vit_tiny_patch16_224", num_classes=0, **size), vit, model_args=size)

    def convert(name: str) -> list:
        return dart_hf("convert", "--from", "vit", f"user/{name}", "--output", tmp_path / "output")

    def check_refused(name: str, reason: str, **fault: object) -> None:
        hub.add(f"user/{name}", vit, private=name.startswith("private"))
        if fault:
            hub.fail(**fault, times=100)
        exit_code, printed, complaint = convert(name)
        hub.mend()
        assert (exit_code, printed) == (2, "")
        assert re.fullmatch(f"dart-hf: .*user/{name}.*{reason}.*\n", complaint)
        assert "damaged" not in complaint and "http" not in complaint
        assert not (tmp_path / "output").exists()

    check_refused(f"private-{library}", "no such repository, or it is private.*hf auth login")
    check_refused(f"gated-{library}", "gated.*hf auth login", where="resolve_head", how=403, code="GatedRepo")
    check_refused(library, "500", where="lfs_download", how=500)
    fault = {"where": "lfs_download", "how": "drop answer", "after_bytes": 1000}
    check_refused(library, "connection broke.*run this again", **fault)
    exit_code, _, complaint = convert(library)
    assert exit_code == 0, complaint
    assert DartModel.from_pretrained(tmp_path / "output").config.hidden_size == 32
