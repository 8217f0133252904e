"""Publishing, against a Hub on this computer.

huggingface_hub reads the Hub's address at import, so it runs in a process of its own, a `Client` that serves all tests.
"""

import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import hub_server
from helpers.hub_server import READ_TOKEN, STRANGER_TOKEN, WRITE_TOKEN, Blob, Commit, HubServer
from helpers.tiny_models import tiny_classifier
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage import data
from typer.testing import CliRunner

from dart_hf import DartConfig, DartForImageClassification, DartImageProcessor
from dart_hf.cli.main import app
from dart_hf.files import weights_sha256
from dart_hf.hub import publishing
from dart_hf.hub.model_card import MADE

CODE = [
    "configuration_dart.py",
    "configuration_region.py",
    "image_processing_dart.py",
    "modeling_dart.py",
    "modeling_dart_base.py",
    "region_partition.py",
    "region_sampling.py",
    "region_scorer.py",
    "region_tokenizer.py",
    "score_statistics.py",
    "scorer_trunk.py",
    "scorer_weights.py",
]
FILES = {
    ".gitattributes",
    "README.md",
    "config.json",
    "evaluation.json",
    "model.safetensors",
    "preprocessor_config.json",
    "training.json",
    *CODE,
}
CLEAN_SCRIPT = Path(__file__).parents[1] / "helpers" / "without_dart_hf.py"

# Requests come in as lines of JSON: a function's name, the token to use, and its arguments.
CLIENT = """
import json, os, signal, sys, time

# A shell's background jobs begin with Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
answers = sys.stdout
sys.stdout = sys.stderr
# What the client does before it tries again.
time.sleep = lambda seconds: None

from typer.testing import CliRunner

from dart_hf import DartForImageClassification, DartImageProcessor
from dart_hf.cli.main import app


def run(*arguments):
    result = CliRunner().invoke(app, arguments, prog_name="dart-hf", catch_exceptions=False)
    return [result.exit_code, result.stdout, result.stderr]


def classify(source, image, revision="main"):
    from transformers import pipeline

    answers = pipeline("image-classification", source, revision=revision)(image)
    return {answer["label"]: answer["score"] for answer in answers}


def process():
    return os.getpid()


def push(folder, repo_id):
    DartForImageClassification.from_pretrained(folder).push_to_hub(repo_id)
    DartImageProcessor.from_pretrained(folder).push_to_hub(repo_id)


for line in sys.stdin:
    name, token, arguments = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    try:
        answer = {"returned": globals()[name](*arguments)}
    except BaseException as error:
        answer = {"raised": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), file=answers, flush=True)
"""


class Client:
    """A process with the real huggingface_hub and `dart_hf`, which knows only the test's Hub."""

    def __init__(self, ask: Callable[[str], str]) -> None:
        self.ask = ask

    def call(self, name: str, *arguments: Any, token: str | None = WRITE_TOKEN) -> Any:
        answer = json.loads(self.ask(json.dumps([name, token, [str(argument) for argument in arguments]])))
        assert "raised" not in answer, answer["raised"]
        return answer["returned"]

    def publish(self, folder: Path, *arguments: Any, token: str | None = WRITE_TOKEN) -> str:
        """What `dart-hf publish` prints if all is well."""
        exit_code, stdout, stderr = self.call("run", "publish", *arguments, "--model", folder, token=token)
        assert exit_code == 0, stderr
        return stdout

    def mistake(self, folder: Path, *arguments: Any, token: str | None = WRITE_TOKEN) -> str:
        """The one line that `dart-hf publish` prints if not."""
        exit_code, stdout, stderr = self.call("run", "publish", *arguments, "--model", folder, token=token)
        assert (exit_code, stdout) == (2, "")
        (line,) = (line for line in stderr.splitlines() if line.startswith("dart-hf: "))
        return line


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as hub:
        yield hub


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory) -> Iterator[Client]:
    with hub.conversation(CLIENT, tmp_path_factory.mktemp("home")) as ask:
        yield Client(ask)


def make_model(seed: int, **settings: Any) -> DartForImageClassification:
    torch.manual_seed(seed)
    labels = ["cup", "cat", "rocket"]
    settings = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 32,
        "patch_size": 4,
        "num_patches": 9,
        "score_grid_size": 4,
        "scorer": "conv",
        "initializer_range": 0.5,
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
        **settings,
    }
    return DartForImageClassification(DartConfig(**settings)).eval()


def save(folder: Path, model: DartForImageClassification, **settings: Any) -> Path:
    model.save_pretrained(folder, **settings)
    DartImageProcessor(size=32, crop_size=32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """As `dart-hf train` and `dart-hf evaluate` leave it."""
    folder = save(tmp_path_factory.mktemp("training") / "output", make_model(0))
    checkpoint = save(folder / "checkpoint-7", make_model(1))
    torch.save({}, checkpoint / "optimizer.pt")
    (folder / "training_args.bin").write_bytes(b"settings")
    (folder / "notes.txt").write_text("mine")
    training = {
        "data": {"source": str(folder / "flowers"), "train_split": "train", "num_train_images": 900},
        "started_from": "user/pretrained",
        "settings": {
            "learning_rate": 0.001,
            "data": "flowers",
            "hub_token": "hf_secret",
            "model_settings": '{"scorer_weights": "/home/me/trunk.pth"}',
            "teacher": "../me/teacher",
        },
        "steps": 7,
        "epochs": 1.5,
    }
    evaluation = {
        "data": {"source": "user/photos", "split": "test"},
        "num_images": 90,
        "score_normalization": "running",
        "budgets": [{"num_patches": 9, "top1": 0.9, "top5": None, "images_per_second": 8.0}],
        "command": "dart-hf evaluate --model /home/me/model",
        "weights_sha256": weights_sha256(folder),
    }
    (folder / "training.json").write_text(json.dumps(training))
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


@pytest.fixture(scope="module")
def old_model(tmp_path_factory) -> Path:
    """What a repository had before: another model, in several files, and a file that is no model's."""
    folder = save(tmp_path_factory.mktemp("old"), make_model(2), max_shard_size="10KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    (folder / "evaluation.json").write_text("{}")
    (folder / "handler.py").write_text("mine = True")
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("images") / "cup.png"
    Image.fromarray(data.coffee()).resize((60, 40)).save(path)
    return path


@pytest.fixture(scope="module")
def published(hub, client, folder) -> dict[str, bytes]:
    """The files of user/tulips, published from `folder`."""
    hub.add("user/pretrained", {"config.json": b"{}"})
    hub.add("datasets/user/photos", {})
    client.publish(folder, "user/tulips")
    return hub.repository("user/tulips").files()


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def renamed(published: dict[str, bytes], name: str) -> dict[str, bytes]:
    """What the files would be in another repository of `user`."""
    return {**published, "README.md": published["README.md"].replace(b"tulips", name.encode())}


def card_of(hub: HubServer, name: str) -> ModelCard:
    return ModelCard(hub.repository(name).files()["README.md"].decode())


# --- what is published ------------------------------------------------------------------------------------------------


def test_one_commit_has_the_model_and_nothing_else(hub, published, folder):
    repository = hub.repository("user/tulips")
    assert set(published) == FILES
    assert len(repository.commits) == 2
    assert not repository.private
    assert published["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    for name in CODE:
        assert published[name] == (Path(publishing.__file__).parents[2] / "modeling" / name).read_bytes()


def test_nothing_private_is_published(published, folder):
    for name in ("README.md", "training.json", "evaluation.json", "config.json"):
        text = published[name].decode()
        assert not [word for word in (str(folder.parent), "/me", "hf_secret") if word in text]
    training = json.loads(published["training.json"])
    assert training["data"]["source"] == "flowers"
    assert training["settings"] == {"learning_rate": 0.001}


@pytest.mark.parametrize(("options", "is_named"), [([], False), (["--private"], True)])
def test_only_readers_of_what_is_private_learn_of_it(hub, client, tmp_path, options, is_named):
    hub.add("user/patients", {}, private=True)
    hub.add("datasets/user/xrays", {}, private=True)
    folder, name = save(tmp_path / "model", make_model(0)), f"user/discreet{len(options)}"
    training = {"started_from": "user/patients", "data": {"source": "user/xrays"}, "metrics": {"eval_accuracy": 0.5}}
    (folder / "training.json").write_text(json.dumps(training))
    client.publish(folder, name, *options)
    files = hub.repository(name).files()
    for secret in (b"patients", b"xrays"):
        assert (secret in files["README.md"], secret in files["training.json"]) == (is_named, is_named)


def test_the_card_tells_what_is_on_record(published):
    card = ModelCard(published["README.md"].decode())
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.library_name == "transformers"
    assert card.data.base_model == "user/pretrained"
    # The data are a folder here, and no data set of the Hub.
    assert card.data.datasets is None
    assert card.data.license is None
    assert [(result.dataset_type, result.metric_value) for result in card.data.eval_results] == [("user/photos", 0.9)]
    assert "user/tulips" in card.text


def test_publish_copies_a_model_of_the_hub(hub, client, published):
    client.publish("user/tulips", "user/copy")
    files = hub.repository("user/copy").files()
    assert set(files) == set(published) and files["model.safetensors"] == published["model.safetensors"]


def test_publish_takes_the_old_spelling_and_warns(client, folder, published):
    exit_code, stdout, stderr = client.call("run", "publish", folder, "user/tulips")
    assert (exit_code, stdout.startswith("The Hub has this model already: ")) == (0, True)
    assert f"write: dart-hf publish user/tulips --model {folder}\n" in stderr


def test_loads_as_it_was(client, published, folder, image):
    expected = client.call("classify", folder, image)
    assert client.call("classify", "user/tulips", image, token=None) == pytest.approx(expected, abs=1e-6)
    assert len(expected) == 3 and max(expected.values()) > 0.4


def test_loads_without_dart_hf(hub, published, folder, tmp_path):
    done = hub.run([sys.executable, "-P", CLEAN_SCRIPT, "user/tulips", tmp_path / "resaved"], tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    pixels = torch.linspace(-1, 1, 3 * 32 * 32).sin().view(1, 3, 32, 32)
    with torch.no_grad():
        logits = DartForImageClassification.from_pretrained(folder)(pixels).logits[0]
    assert found["classes"] == ["transformers_modules"] * 3 and not found["dart_hf"]
    torch.testing.assert_close(torch.tensor(found["logits"]), logits)


@pytest.mark.parametrize("model_type", ["dart_vim", "dart_rmt"])
def test_every_architecture_is_published_with_its_code(hub, client, image, tmp_path, model_type):
    model = tiny_classifier(("cup", "cat", "rocket"), model_type, score_normalization="image")
    client.publish(save(tmp_path / "saved", model), f"user/{model_type}")
    files = hub.repository(f"user/{model_type}").files()
    own = {"dart_vim": {"modeling_dart_vim.py", "selective_scan.py"}, "dart_rmt": {"modeling_dart_rmt.py"}}[model_type]
    assert {name for name in files if name.endswith(".py")} == {*CODE, *own} - {"modeling_dart.py"}
    found = client.call("classify", f"user/{model_type}", image)
    processor = DartImageProcessor(size=32, crop_size=32)
    with torch.no_grad():
        expected = model(**processor(str(image), return_tensors="pt")).logits[0].softmax(dim=0)
    assert found == pytest.approx(dict(zip(("cup", "cat", "rocket"), expected.tolist(), strict=True)), abs=1e-4)


def test_push_to_hub(hub, client, published, folder, image):
    """transformers' own way: without checks, with a commit for each part, and a card that publishing fills in later."""
    client.call("push", folder, "user/pushed")
    files = hub.repository("user/pushed").files()
    assert set(files) == FILES - {"training.json", "evaluation.json"}
    for name in set(files) - {"README.md"}:
        assert files[name] == published[name], name
    expected = client.call("classify", folder, image)
    assert client.call("classify", "user/pushed", image) == pytest.approx(expected, abs=1e-6)
    assert MADE not in card_of(hub, "user/pushed").text
    client.publish(folder, "user/pushed")
    assert MADE in card_of(hub, "user/pushed").text


def test_the_code_is_there_whatever_the_folder_has(hub, client, folder, tmp_path):
    bare = save(tmp_path / "bare", make_model(0))
    for path in bare.glob("*.py"):
        path.unlink()
    for name in ("config.json", "preprocessor_config.json"):
        settings = json.loads((bare / name).read_text())
        del settings["auto_map"]
        (bare / name).write_text(json.dumps(settings))
    client.publish(bare, "user/bare")
    files = hub.repository("user/bare").files()
    assert set(files) == FILES - {"training.json", "evaluation.json"}
    auto_map = json.loads(files["config.json"])["auto_map"]
    assert auto_map["AutoModelForImageClassification"] == "modeling_dart.DartForImageClassification"


def test_an_encoder_is_published(hub, client, folder, tmp_path):
    client.publish(save(tmp_path / "encoder", make_model(0).dart), "user/encoder")
    card = ModelCard(hub.repository("user/encoder").files()["README.md"].decode())
    assert card.data.pipeline_tag == "image-feature-extraction"


# --- where it is published --------------------------------------------------------------------------------------------


def test_private(hub, client, folder, image):
    assert "user/private" in client.publish(folder, "user/private", "--private")
    assert hub.repository("user/private").private
    client.publish(folder, "user/private", "--private", "--license", "mit")
    assert "'user/tulips' is public already" in client.mistake(folder, "user/tulips", "--private")


def test_a_name_without_owner_is_ones_own(hub, client, folder):
    assert "/user/alone" in client.publish(folder, "alone")
    assert b'"user/alone"' in hub.repository("user/alone").files()["README.md"]


def test_branch(hub, client, folder, old_model, published, image):
    old = hub.add("user/branch", old_model)
    for title in ("First", "Second"):
        message = client.publish(
            folder, "user/branch", "--revision", "next/small", "--message", title, "--license", title
        )
        assert "/user/branch/tree/next/small" in message
    repository = hub.repository("user/branch")
    assert repository.find("main") is old
    assert [commit.title for commit in repository.history("next/small")][:3] == ["Second", "First", "Add files"]
    assert set(repository.files("next/small")) == FILES | {"handler.py"}
    assert client.call("classify", "user/branch", image, "next/small") == pytest.approx(
        client.call("classify", folder, image), abs=1e-6
    )


@pytest.mark.parametrize("token", [WRITE_TOKEN, STRANGER_TOKEN])
def test_pull_request(hub, client, folder, old_model, image, token):
    name = f"user/pull-{token}".replace("_", "-")
    old = hub.add(name, old_model)
    message = client.publish(folder, name, "--create-pr", token=token)
    assert f"Published {hub.address}/{name}/discussions/1" in message
    repository = hub.repository(name)
    assert repository.find("main") is old
    assert set(repository.files("refs/pr/1")) == FILES | {"handler.py"}
    expected = client.call("classify", folder, image)
    assert client.call("classify", name, image, "refs/pr/1") == pytest.approx(expected, abs=1e-6)


def test_a_new_model_takes_the_place_of_the_old_one(hub, client, folder, old_model, published):
    old = hub.add("user/replaced", old_model)
    client.publish(folder, "user/replaced")
    repository = hub.repository("user/replaced")
    assert [commit.id for commit in repository.history()][1] == old.id
    handler = (old_model / "handler.py").read_bytes()
    assert repository.files() == {**renamed(published, "replaced"), "handler.py": handler}


def test_a_folder_of_several_weight_files(hub, client, old_model, tmp_path):
    """Of which the records are published with the digest of the one file that is made of them."""
    evaluation = {"num_images": 90, "weights_sha256": weights_sha256(old_model)}
    (old_model / "evaluation.json").write_text(json.dumps(evaluation))
    client.publish(old_model, "user/sharded")
    files = hub.repository("user/sharded").files()
    assert not [name for name in files if "-of-" in name or "index" in name]
    (tmp_path / "model.safetensors").write_bytes(files["model.safetensors"])
    assert json.loads(files["evaluation.json"]) == {"num_images": 90, "weights_sha256": weights_sha256(tmp_path)}


@pytest.mark.parametrize("digest", [{}, {"weights_sha256": "0" * 64}])
def test_what_is_measured_of_other_weights_is_left_out(hub, client, tmp_path, digest):
    folder, name = save(tmp_path / "model", make_model(0)), f"user/stale{len(digest)}"
    hub.add(name, {"evaluation.json": b"{}"})
    budgets = [{"num_patches": 9, "top1": 0.875}]
    (folder / "evaluation.json").write_text(json.dumps({"num_images": 90, "budgets": budgets, **digest}))
    assert f"{folder / 'evaluation.json'}: it belongs to other weights" in client.publish(folder, name)
    files = hub.repository(name).files()
    assert "evaluation.json" not in files and b"87.5%" not in files["README.md"]


def test_another_kind_of_model_is_not_mixed_with(hub, client, folder):
    old = hub.add("user/bert", {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"bert"})
    assert "config.json is of type 'bert', not 'dart'" in client.mistake(folder, "user/bert")
    assert hub.repository("user/bert").find() is old


@pytest.mark.parametrize(
    ("name", "belongs"),
    [
        ("model.fp16.safetensors", True),
        ("model.fp16-00001-of-00002.safetensors", True),
        ("model.safetensors.index.fp16.json", True),
        ("pytorch_model.bin", True),
        ("pytorch_model-00001-of-00002.bin", True),
        ("processor_config.json", True),
        ("training_args.bin", False),
        ("handler.py", False),
    ],
)
def test_which_files_belong_to_weights(name, belongs):
    assert bool(publishing.BELONGS_TO_WEIGHTS.fullmatch(name)) is belongs


def test_the_same_again_commits_nothing(hub, client, published, folder):
    head = hub.repository("user/tulips").find().id
    message = client.publish(folder, "user/tulips")
    assert message.startswith("The Hub has this model already") and head in message
    assert hub.repository("user/tulips").find().id == head
    assert "already" in client.publish(folder, "user/tulips", "--create-pr")


# --- the model card ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_a_card_made_of_another_model_is_made_anew(hub, client, published, where, tmp_path):
    made = published["README.md"].replace(b"library_name", b"license: cc-by-4.0\nlibrary_name")
    assert MADE.encode() in made
    name, folder = f"user/anew-{where}", save(tmp_path / "model", make_model(3))
    hub.add(name, {"README.md": made} if where == "hub" else {})
    if where == "folder":
        (folder / "README.md").write_bytes(made)
    printed = client.publish(folder, name)
    assert "licence" not in printed and "somebody wrote" not in printed
    card = card_of(hub, name)
    assert (card.data.license, card.data.base_model, card.data.eval_results) == ("cc-by-4.0", None, None)
    assert "## Accuracy" not in card.text


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_a_card_of_ones_own_keeps_its_text(hub, client, where, tmp_path):
    own = b"---\nlicense: mit\ntags: [flowers]\nmetrics: [f1]\nbase_model: user/old\n---\n# Mine\n"
    name, folder = f"user/own-{where}", save(tmp_path / "model", make_model(0))
    hub.add(name, {"README.md": own if where == "hub" else b"# Older\n"})
    if where == "folder":
        (folder / "README.md").write_bytes(own)
    assert "keeps its text, because somebody wrote it" in client.publish(folder, name)
    card = card_of(hub, name)
    assert card.text == "# Mine\n"
    assert (card.data.license, card.data.pipeline_tag) == ("mit", "image-classification")
    assert card.data.tags[:2] == ["flowers", "dart"]
    assert (card.data.metrics, card.data.base_model) == (None, None)


def test_example_image(hub, client, image, tmp_path):
    """Only its pixels, whatever its name has for the Hub's patterns."""
    folder = save(tmp_path / "model", make_model(0))
    secret = Image.Exif()
    secret[0x010E] = "at home"
    photo = tmp_path / "photo[1].jpg"
    Image.open(image).save(photo, exif=secret, comment="at home")
    assert b"at home" in photo.read_bytes()
    client.publish(folder, "user/example", "--example", photo)
    files = hub.repository("user/example").files()
    assert b"at home" not in files["example.jpg"]
    assert Image.open(io.BytesIO(files["example.jpg"])).size == (60, 40)
    assert card_of(hub, "user/example").data.widget == [{"src": "example.jpg", "example_title": "Example"}]
    (folder / "example.png").write_bytes(image.read_bytes())
    client.publish(folder, "user/example")
    pixels = Image.open(io.BytesIO(hub.repository("user/example").files()["example.png"]))
    assert pixels.tobytes() == Image.open(image).tobytes()
    assert card_of(hub, "user/example").data.widget == [{"src": "example.png", "example_title": "Example"}]


# --- what goes wrong --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A fault, what the message says of it, and which revision there is afterwards."""

    where: str
    how: int | str
    words: str
    after_bytes: int = 0
    leaves: str = "old"


NOTHING = "Nothing was published."
COMPARE = "run this again to do so."
CASES = [
    Case("refs", 404, "already created"),
    Case("refs", 429, "in some minutes"),
    Case("refs", "drop request", "the connection broke; run this again"),
    Case("info", 401, "hf auth login"),
    Case("info", 404, "check the name"),
    Case("info", 503, "the Hub has a problem; run this again later (503"),
    Case("info", "drop answer", "run this again", after_bytes=20),
    Case("validate_yaml", 500, "run this again later"),
    Case("validate_yaml", "drop answer", "run this again"),
    Case("preupload", 402, "no storage left"),
    Case("preupload", 409, "changed by somebody else; run this again"),
    Case("preupload", 429, "in some minutes"),
    Case("preupload", 500, "run this again later"),
    Case("preupload", "drop request", "run this again"),
    Case("lfs_batch", 500, "run this again later"),
    Case("lfs_batch", 413, "larger than the Hub takes"),
    Case("lfs_batch", "drop answer", "run this again"),
    Case("lfs_upload", 403, "use one with write access"),
    Case("lfs_upload", 500, "run this again later"),
    Case("lfs_upload", "drop request", "run this again", after_bytes=1000),
    Case("lfs_verify", 400, "the Hub refuses what was sent"),
    Case("commit", 401, "log in with 'hf auth login'"),
    Case("commit", 403, "use one with write access"),
    Case("commit", 404, "check the name"),
    Case("commit", 409, "changed by somebody else; run this again"),
    Case("commit", 500, "run this again later"),
    Case("commit", 503, "run this again later"),
    Case("commit", "drop request", "run this again", after_bytes=1000),
    Case("commit", "drop answer", "perhaps this one; running this again", leaves="new"),
    Case("commit", "drop answer", "perhaps this one; running this again", after_bytes=20, leaves="new"),
    Case("tree", 500, COMPARE, leaves="new"),
    Case("resolve_head", 500, "run this again later"),
    Case("lfs_download", 404, COMPARE, leaves="new"),
]


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case.where}-{case.how}-{case.after_bytes}".replace(" ", "-")
)
def test_a_fault_leaves_the_old_or_the_new_model(hub, client, folder, old_model, published, case, request):
    short = request.node.callspec.id.replace("_", "-")
    before = contents(folder)
    old = hub.add(f"user/{short}", old_model)
    repository = hub.repository(f"user/{short}")
    new = {**renamed(published, short), "handler.py": (old_model / "handler.py").read_bytes()}
    # The weights must be uploaded anew.
    hub.storage.lfs.pop(Blob(new["model.safetensors"]).sha256, None)
    # As often as the client tries.
    hub.fail(case.where, case.how, times=100, after_bytes=case.after_bytes)

    message = client.mistake(folder, f"user/{short}")
    hub.mend()
    assert case.words in message
    if case.leaves == "old":
        assert repository.find() is old
        assert message.endswith(NOTHING)
    else:
        assert repository.files() == new
        assert repository.find().id in message
    assert contents(folder) == before

    client.publish(folder, f"user/{short}")
    assert repository.files() == new
    assert [commit.id for commit in repository.history()][1] == old.id
    assert contents(folder) == before


@dataclass(frozen=True)
class NewCase:
    """A fault while something new is made, and what the message says at its end."""

    where: str
    how: int | str
    words: str
    options: tuple[str, ...] = ()
    end: str = NOTHING


EMPTY = f"{NOTHING} The repository was made, and is empty."
NEW_CASES = [
    NewCase("create", 401, "log in with 'hf auth login'"),
    NewCase("create", 404, "check the name"),
    NewCase("create", 409, "changed by somebody else; run this again"),
    NewCase("create", 429, "in some minutes"),
    NewCase("create", 500, "run this again later (500"),
    NewCase("create", "drop request", "the connection broke; run this again"),
    NewCase("validate_yaml", 400, "the Hub refuses what was sent", end=EMPTY),
    NewCase("lfs_batch", 500, "run this again later", end=EMPTY),
    NewCase("commit", "drop request", "run this again", end=EMPTY),
    NewCase("branch", 409, "changed by somebody else", ("--revision", "next"), EMPTY),
    NewCase("branch", "drop answer", "run this again", ("--revision", "next"), EMPTY),
]


@pytest.mark.parametrize("case", NEW_CASES, ids=lambda case: f"{case.where}-{case.how}".replace(" ", "-"))
def test_a_fault_while_a_repository_is_made(hub, client, folder, published, case, request):
    name = f"new-{request.node.callspec.id.replace('_', '-')}"
    hub.storage.lfs.pop(Blob(published["model.safetensors"]).sha256, None)
    hub.fail(case.where, case.how, times=100)
    message = client.mistake(folder, f"user/{name}", *case.options)
    hub.mend()
    assert case.words in message and message.endswith(case.end)
    assert (f"user/{name}" in hub.storage.repositories) is (case.end == EMPTY)
    client.publish(folder, f"user/{name}", *case.options)
    revision = case.options[-1] if case.options else "main"
    assert hub.repository(f"user/{name}").files(revision) == renamed(published, name)


@pytest.mark.parametrize("how", [403, 500, "drop answer"])
def test_a_fault_while_a_branch_is_made(hub, client, folder, old_model, published, how):
    name = f"branching-{how}".replace(" ", "-")
    old = hub.add(f"user/{name}", old_model)
    hub.fail("branch", how, times=100)
    assert client.mistake(folder, f"user/{name}", "--revision", "next").endswith(NOTHING)
    hub.mend()
    client.publish(folder, f"user/{name}", "--revision", "next")
    repository = hub.repository(f"user/{name}")
    assert repository.find() is old and b"dart-hf" in repository.files("next")["README.md"]


@pytest.mark.parametrize("where", ["refs", "info", "preupload", "lfs_upload", "commit"])
def test_a_fault_leaves_no_pull_request(hub, client, folder, old_model, published, where):
    name = f"user/faulty-pull-{where}".replace("_", "-")
    hub.add(name, old_model)
    hub.storage.lfs.pop(Blob(published["model.safetensors"]).sha256, None)
    hub.fail(where, 403, times=100)
    message = client.mistake(folder, name, "--create-pr")
    hub.mend()
    assert message.endswith(NOTHING) and list(hub.repository(name).refs) == [hub_server.MAIN]


def test_a_pull_request_that_could_not_be_compared_is_gone_on_with(hub, client, folder, old_model):
    hub.add("user/unsure", old_model)
    hub.fail("tree", 500, times=100)
    message = client.mistake(folder, "user/unsure", "--create-pr")
    hub.mend()
    assert f"{hub.address}/user/unsure/discussions/1" in message
    assert message.endswith("run this again with --revision refs/pr/1 to do so.")
    assert "already" in client.publish(folder, "user/unsure", "--revision", "refs/pr/1")
    assert "refs/pr/2" not in hub.repository("user/unsure").refs


def test_a_pull_request_makes_no_repository(hub, client, folder):
    message = client.mistake(folder, "user/typo", "--create-pr")
    assert "there is no such repository" in message and message.endswith(NOTHING)
    assert "user/typo" not in hub.storage.repositories


def test_a_source_that_cannot_be_looked_up_is_not_named(hub, client, folder, published):
    name = "user/unnamed"
    hub.fail("info", 403, path="datasets/user/photos", times=100)
    client.publish(folder, name)
    hub.mend()
    assert "user/photos" not in hub.repository(name).files()["README.md"].decode()
    assert card_of(hub, name).data.eval_results[0].dataset_type == "private"


def test_a_card_that_cannot_be_fetched_is_not_overwritten(hub, client, folder):
    old = hub.add("user/unread", {"README.md": b"# Mine"})
    hub.fail("resolve_head", 403)
    assert client.mistake(folder, "user/unread").endswith(NOTHING)
    assert hub.repository("user/unread").find() is old


def interrupt_publishing(hub: HubServer, client: Client, folder: Path, name: str, where: str) -> str:
    """Press Ctrl-C when a request is not answered; returns what is printed then."""
    hub.stalled.clear()
    hub.fail(where, "stall")
    process, over = client.call("process"), threading.Event()

    def interrupt() -> None:
        hub.stalled.wait()
        # Once more if the signal came just before the client began to wait, which does not wake it.
        while not over.is_set():
            os.kill(process, signal.SIGINT)
            over.wait(5)

    threading.Thread(target=interrupt, daemon=True).start()
    exit_code, stdout, stderr = client.call("run", "publish", name, "--model", folder)
    over.set()
    assert (exit_code, stdout) == (130, "") and "Traceback" not in stderr
    return stderr


@pytest.mark.parametrize("where", ["lfs_upload", "commit"])
def test_an_interrupted_upload_can_be_run_again(hub, client, folder, published, where):
    name = f"interrupted-{where}".replace("_", "-")
    old = hub.add(f"user/{name}", {})
    before = contents(folder)
    hub.storage.lfs.pop(Blob(published["model.safetensors"]).sha256, None)
    printed = interrupt_publishing(hub, client, folder, f"user/{name}", where)
    assert "Whether the commit was made is not known; running this again makes it only if it is missing." in printed
    repository = hub.repository(f"user/{name}")
    assert repository.find() is old
    assert contents(folder) == before
    client.publish(folder, f"user/{name}")
    assert repository.files() == renamed(published, name)


def test_an_interrupted_comparison_is_of_a_known_commit(hub, client, folder, published):
    hub.add("user/late", {})
    printed = interrupt_publishing(hub, client, folder, "user/late", "tree")
    commit = hub.repository("user/late").find().id
    assert f"uploaded to 'user/late' as commit {commit}, but not compared with the local one" in printed
    assert hub.repository("user/late").files() == renamed(published, "late")


def test_somebody_elses_commit_is_not_mixed_with(hub, client, folder, published, monkeypatch):
    hub.add("user/shared", {})
    repository = hub.repository("user/shared")
    answer = hub_server.Api.preupload

    def meanwhile(api: hub_server.Api, request: hub_server.Request, **parts: str) -> hub_server.Answer:
        head = repository.find()
        repository.commit(hub_server.MAIN, Commit({**head.files, "theirs": Blob(b"")}, "Theirs", parent=head.id))
        return answer(api, request, **parts)

    with monkeypatch.context() as patch:
        patch.setattr(hub_server.Api, "preupload", meanwhile)
        message = client.mistake(folder, "user/shared")
    assert "changed by somebody else meanwhile; run this again" in message and message.endswith(NOTHING)
    assert repository.find().title == "Theirs"
    client.publish(folder, "user/shared")
    assert repository.files() == {**renamed(published, "shared"), "theirs": b""}


def test_a_pull_request_whose_answer_is_lost(hub, client, folder, old_model):
    old = hub.add("user/lost", old_model)
    hub.fail("commit", "drop answer")
    message = client.mistake(folder, "user/lost", "--create-pr")
    assert f"look at {hub.address}/user/lost/discussions" in message
    assert hub.repository("user/lost").find() is old


@pytest.mark.parametrize(
    ("name", "token", "words"),
    [
        ("user/new", None, "log in with 'hf auth login' or set HF_TOKEN"),
        ("user/new", "hf_wrong", "does not accept the token; log in"),
        ("user/new", READ_TOKEN, "use one with write access"),
        ("organisation/new", WRITE_TOKEN, "no access to that; to write there use one"),
        ("user/tulips", READ_TOKEN, "use one with write access"),
        ("user/tulips", STRANGER_TOKEN, "or open a pull request (--create-pr)"),
    ],
)
def test_without_the_right_token(hub, client, folder, published, name, token, words):
    before = list(hub.repository("user/tulips").commits)
    message = client.mistake(folder, name, token=token)
    assert words in message and message.endswith(NOTHING)
    assert hub.repository("user/tulips").commits == before
    assert "user/new" not in hub.storage.repositories


@pytest.mark.parametrize("options", [["--create-pr", "--revision", "none"], ["--revision", "refs/pr/99"]])
def test_a_branch_that_cannot_be(hub, client, folder, published, options):
    message = client.mistake(folder, "user/tulips", *options)
    assert f"has no branch or pull request '{options[-1]}'" in message and message.endswith(NOTHING)


def test_what_is_no_branch(hub, client, folder, published):
    repository = hub.repository("user/tulips")
    repository.name_commit("refs/tags/v1", "main")
    for revision in ("v1", repository.find().id):
        message = client.mistake(folder, "user/tulips", "--revision", revision)
        assert f"revision must be a branch, got the tag or commit '{revision}'" in message


def test_what_comes_back_changed_is_an_error(hub, client, folder, monkeypatch):
    answer = hub_server.Api.resolve

    def changed(api: hub_server.Api, request: hub_server.Request, name: str, revision: str, path: str) -> Any:
        given = answer(api, request, name, revision, path)
        if path != "config.json" or request.method == "HEAD":
            return given
        return hub_server.Answer(given.body.replace(b"flow", b"grid"), given.status, given.headers)

    monkeypatch.setattr(hub_server.Api, "resolve", changed)
    message = client.mistake(folder, "user/changed")
    assert "config.json came back changed" in message and "do not use that commit" in message


# Of the rest no Hub hears, so it needs no other process.


def run(*arguments: Any) -> tuple[int, str]:
    folder, *others = map(str, arguments)
    result = CliRunner().invoke(
        app, ["publish", *others, "--model", folder], prog_name="dart-hf", catch_exceptions=False
    )
    assert result.stdout == ""
    return result.exit_code, result.stderr.splitlines()[-1]


@pytest.fixture
def online(monkeypatch):
    """No Hub can be reached: nobody can get so far as to ask one."""
    monkeypatch.setattr(publishing, "is_offline_mode", lambda: False)
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    monkeypatch.setattr(publishing, "HfApi", None)


@pytest.mark.parametrize("name", ["a/b/c", "user/a b", "datasets/user/model", "user/--"])
def test_a_malformed_name(online, folder, name):
    exit_code, message = run(folder, name)
    assert exit_code == 2 and f"repo_id must be like 'user/model', got {name!r}" in message


def test_offline(online, folder, monkeypatch):
    monkeypatch.setattr(publishing, "is_offline_mode", lambda: True)
    exit_code, message = run(folder, "user/model")
    assert exit_code == 2 and "HF_HUB_OFFLINE is set; unset it" in message and message.endswith(NOTHING)


def without_processor(folder: Path) -> None:
    save(folder, make_model(0))
    (folder / "preprocessor_config.json").unlink()


def with_a_dead_scorer(folder: Path) -> None:
    save(folder, make_model(0, scorer="squeezenet1_1", image_size=64))


def without_a_weight(folder: Path) -> None:
    save(folder, make_model(0))
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def diverged(folder: Path) -> None:
    model = make_model(0)
    model.classifier.bias.data.fill_(torch.nan)
    save(folder, model)


def with_another_models_processor(folder: Path) -> None:
    save(folder, make_model(0, num_channels=1))


def with_a_damaged_record(folder: Path) -> None:
    save(folder, make_model(0))
    (folder / "training.json").write_text("{")


def with_a_record_of_another_kind(folder: Path) -> None:
    save(folder, make_model(0))
    (folder / "evaluation.json").write_text("[]")


def with_a_broken_card(folder: Path) -> None:
    save(folder, make_model(0))
    (folder / "README.md").write_text("---\ntags: [a\n---\n")


def with_a_broken_example(folder: Path) -> None:
    save(folder, make_model(0))
    (folder / "example.png").write_text("no image")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, "There is no folder"),
        (Path.mkdir, "holds no model"),
        (without_processor, "has no image processor (preprocessor_config.json); write the one"),
        (with_a_dead_scorer, "The scorer is dead"),
        (without_a_weight, "missing classifier.bias"),
        (diverged, "logits are not finite"),
        (with_another_models_processor, "channels"),
        (with_a_damaged_record, "training.json' is damaged"),
        (with_a_record_of_another_kind, "evaluation.json' is damaged"),
        (with_a_broken_card, "README.md in the folder cannot be read"),
        (with_a_broken_example, "Cannot read"),
    ],
)
def test_what_should_not_be_published(online, tmp_path, make: Callable[[Path], None], words):
    make(tmp_path / "model")
    exit_code, message = run(tmp_path / "model", "user/model")
    assert exit_code == 2 and words in message


def test_a_dead_scorer_that_is_not_run(online, tmp_path):
    folder = save(tmp_path / "model", make_model(0, scorer="squeezenet1_1", image_size=64, partition="uniform"))
    with pytest.raises(TypeError, match="NoneType"):  # it got as far as the Hub
        run(folder, "user/model")


@pytest.mark.parametrize(
    ("source", "shown", "known"),
    [
        ("user/photos", "user/photos", "user/photos"),
        ("user/private", None, None),
        ("user/none", None, None),
        ("user/model", None, None),
        ("preset tiny", "preset tiny", None),
        ("/home/me/photos", "photos", None),
        ("../photos", None, None),
        ("", None, None),
    ],
)
def test_how_sources_are_named(monkeypatch, source, shown, known):
    repository = publishing._Repository("user/model", None, False, WRITE_TOKEN)

    def repo_info(name: str, repo_type: str) -> SimpleNamespace:
        validate_repo_id(name)
        if name == "user/none":
            raise OSError
        return SimpleNamespace(private=name == "user/private")

    monkeypatch.setattr(repository.api, "repo_info", repo_info)
    record = {"source": source}
    assert repository.name_source(record, "source", "dataset") == known
    assert record.get("source") == shown


def test_it_is_said_if_nothing_is_known_of_a_commit(monkeypatch):
    def unreachable(*arguments: Any, **settings: Any) -> None:
        raise ConnectionError

    repository = publishing._Repository("user/model", None, False, WRITE_TOKEN)
    monkeypatch.setattr(repository.api, "model_info", unreachable)
    words = "Whether the commit was made is not known; running this again"
    with pytest.raises(publishing.PublishingError, match=words), repository._errors(is_commit=True):
        raise ConnectionResetError


def test_other_logits_are_an_error(folder, tmp_path, monkeypatch):
    """The files are the same, and still the model computes something else."""
    other = save(tmp_path / "other", make_model(1))
    repository = publishing._Repository("user/model", None, False, WRITE_TOKEN)
    monkeypatch.setattr(repository.api, "snapshot_download", lambda *_, **__: None)
    monkeypatch.setattr(publishing.filecmp, "cmpfiles", lambda *_, **__: ([], [], []))
    commit = SimpleNamespace(oid="abc", pr_revision=None, pr_url=None)
    expected = publishing._answers(*publishing._load_complete(folder))
    repository.check(commit, folder, folder, expected)
    with pytest.raises(publishing.PublishingError, match="its logits differ from the local model's by up to"):
        repository.check(commit, folder, other, expected)
