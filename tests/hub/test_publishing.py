"""Publishing, against a Hub on this computer.

huggingface_hub reads the Hub's address when it is imported, so publishing runs in a process of its own, a `Client`.
"""

import io
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import hub_server
from helpers.hub_server import READ_TOKEN, STRANGER_TOKEN, WRITE_TOKEN, Blob, Commit, HubServer
from helpers.tiny_models import tiny_classifier
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage import data
from typer.testing import CliRunner

from dart_hf import DartForImageClassification, DartImageProcessor
from dart_hf.cli.main import app
from dart_hf.files import weights_sha256
from dart_hf.hub import publishing, repository, staging
from dart_hf.hub.model_card import GENERATED

LABELS = ("cup", "cat", "rocket")
MODELING = Path(publishing.__file__).parents[2] / "modeling"
NOTHING = "Nothing was published."

# Requests arrive as lines of JSON: a function's name, the token to use, and its arguments.
CLIENT = """
import json, os, signal, sys, time

# A shell starts background jobs with Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
answers = sys.stdout
sys.stdout = sys.stderr
# The client waits before it tries again.
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
        """Publish, and return what `dart-hf publish` prints."""
        exit_code, stdout, stderr = self.call("run", "publish", *arguments, "--model", folder, token=token)
        assert exit_code == 0, stderr
        return stdout

    def fail(self, folder: Path, *arguments: Any, token: str | None = WRITE_TOKEN) -> str:
        """Publish, which fails, and return the one line of the error."""
        return only_error(*self.call("run", "publish", *arguments, "--model", folder, token=token))


def only_error(exit_code: int, stdout: str, stderr: str) -> str:
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


def make_model(**settings: Any) -> DartForImageClassification:
    return tiny_classifier(LABELS, **{"score_normalization": "running", **settings})


def save(folder: Path, model: torch.nn.Module, **settings: Any) -> Path:
    model.save_pretrained(folder, **settings)
    DartImageProcessor(size=32, crop_size=32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder as `dart-hf train` and `dart-hf evaluate` leave it."""
    folder = save(tmp_path_factory.mktemp("training") / "output", make_model())
    (save(folder / "checkpoint-7", make_model(num_patches=4)) / "optimizer.pt").touch()
    (folder / "training_args.bin").write_bytes(b"settings")
    (folder / "notes.txt").write_text("mine")
    training = {
        "data": {"source": str(folder / "flowers"), "train_split": "train", "num_train_images": 900},
        "started_from": "user/pretrained",
        "settings": {"learning_rate": 0.001, "data": "flowers", "hub_token": "hf_secret", "teacher": "../me/teacher"},
        "steps": 7,
    }
    evaluation = {
        "data": {"source": "user/photos", "split": "test"},
        "num_images": 90,
        "score_normalization": "running",
        "budgets": [{"num_patches": 9, "top1": 0.9, "top5": None, "images_per_second": 8.0}],
        "command": "dart-hf evaluate --model /home/me/model",
        "weights_sha256": weights_sha256(folder),
    }
    similarity = {f"{kind}_{when}": 0.75 for kind in ("pooled", "patches") for when in ("before", "after")}
    distillation = {
        "started_from": str(folder / "original"),
        "data": {"source": "/home/me/roses", "num_held_out_images": 5},
        "similarity": [{"num_patches": 9, **similarity}],
    }
    (folder / "training.json").write_text(json.dumps(training))
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "distillation.json").write_text(json.dumps(distillation))
    return folder


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("plain"), make_model())


@pytest.fixture(scope="module")
def old_model(tmp_path_factory) -> Path:
    """The former contents of a repository: a model in several files, and a file that belongs to no model."""
    folder = save(tmp_path_factory.mktemp("old"), make_model(intermediate_size=48), max_shard_size="10KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    (folder / "evaluation.json").write_text(json.dumps({"num_images": 90, "weights_sha256": weights_sha256(folder)}))
    (folder / "handler.py").write_text("mine = True")
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("images") / "cup.png"
    Image.fromarray(data.coffee()).resize((60, 40)).save(path)
    return path


def answers_of(model: torch.nn.Module, image: Path) -> dict[str, float]:
    """The probabilities that the model gives an image file, to compare with."""
    processor = DartImageProcessor(size=32, crop_size=32)
    with torch.no_grad():
        probabilities = model(**processor(str(image), return_tensors="pt")).logits[0].softmax(dim=0)
    return pytest.approx(dict(zip(LABELS, probabilities.tolist(), strict=True)), abs=1e-4)


@pytest.fixture(scope="module")
def expected(folder, image) -> dict[str, float]:
    """The answers of the model in `folder` for `image`."""
    return answers_of(DartForImageClassification.from_pretrained(folder), image)


@pytest.fixture(scope="module")
def published(hub, client, folder) -> dict[str, bytes]:
    """The files of user/tulips, published from `folder`."""
    hub.add("user/pretrained", {"config.json": b"{}"})
    hub.add("datasets/user/photos", {})
    client.publish(folder, "user/tulips")
    return hub.repository("user/tulips").files()


def contents(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def renamed(published: dict[str, bytes], name: str) -> dict[str, bytes]:
    """Return what the files are in another repository of `user`."""
    return {**published, "README.md": published["README.md"].replace(b"tulips", name.encode())}


def card_of(hub: HubServer, name: str) -> ModelCard:
    return ModelCard(hub.repository(name).files()["README.md"].decode())


# --- what is published ------------------------------------------------------------------------------------------------


def test_one_commit_holds_the_model_and_nothing_else(hub, published, folder):
    code = {name for name in published if name.endswith(".py")}
    assert {"modeling_dart.py", "region_scorer.py"} <= code
    records = {"evaluation.json", "training.json", "distillation.json"}
    model = {".gitattributes", "README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    assert set(published) == model | records | code
    assert len(hub.repository("user/tulips").commits) == 2 and not hub.repository("user/tulips").private
    assert published["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert {name: published[name] for name in code} == {name: (MODELING / name).read_bytes() for name in code}
    card = ModelCard(published["README.md"].decode())
    assert (card.data.pipeline_tag, card.data.base_model) == ("image-classification", "user/pretrained")
    assert (card.data.datasets, card.data.license) == (None, None)
    assert [(result.dataset_type, result.metric_value) for result in card.data.eval_results] == [("user/photos", 0.9)]


def test_nothing_private_is_published(published, folder):
    for name in ("README.md", "training.json", "evaluation.json", "distillation.json", "config.json"):
        assert not [word for word in (str(folder.parent), "/me", "hf_secret") if word in published[name].decode()]
    training = json.loads(published["training.json"])
    assert json.loads(published["distillation.json"])["data"]["source"] == "roses"
    assert "| 9 | 0.750 → 0.750 | 0.750 → 0.750 |" in published["README.md"].decode()
    assert training["data"]["source"] == "flowers" and training["settings"] == {"learning_rate": 0.001}


@pytest.mark.parametrize(("options", "is_named"), [([], False), (["--private"], True)])
def test_private_sources_are_named_only_in_private_repositories(hub, client, tmp_path, options, is_named):
    hub.add("user/patients", {}, private=True)
    hub.add("datasets/user/xrays", {}, private=True)
    folder, name = save(tmp_path / "model", make_model()), f"user/discreet{len(options)}"
    training = {"started_from": "user/patients", "data": {"source": "user/xrays"}, "metrics": {"eval_accuracy": 0.5}}
    (folder / "training.json").write_text(json.dumps(training))
    client.publish(folder, name, *options)
    files = hub.repository(name).files()
    assert hub.repository(name).private is is_named
    for secret in (b"patients", b"xrays"):
        assert (secret in files["README.md"], secret in files["training.json"]) == (is_named, is_named)


@pytest.mark.parametrize("model_type", ["dart_vim", "dart_rmt", "dartified"])
def test_every_architecture_is_published_with_its_code(hub, client, image, tmp_path, model_type):
    model = make_model(model_type=model_type, score_normalization="image")
    folder, name = save(tmp_path / "saved", model), f"user/{model_type}"
    client.publish(folder, name)
    assert f"modeling_{model_type}.py" in hub.repository(name).files()
    assert client.call("classify", name, image) == answers_of(model, image)


def test_encoder_is_published(hub, client, tmp_path):
    client.publish(save(tmp_path / "encoder", make_model().dart), "user/encoder")
    assert card_of(hub, "user/encoder").data.pipeline_tag == "image-feature-extraction"


def test_publishing_completes_what_push_to_hub_began(hub, client, published, folder, image, expected):
    client.call("push", folder, "user/pushed")
    files = hub.repository("user/pushed").files()
    assert set(files) == set(published) - {"training.json", "evaluation.json", "distillation.json"}
    assert all(files[name] == published[name] for name in set(files) - {"README.md"})
    assert client.call("classify", "user/pushed", image) == expected
    assert GENERATED not in card_of(hub, "user/pushed").text
    client.publish(folder, "user/pushed")
    assert hub.repository("user/pushed").files() == renamed(published, "pushed")


# --- where it is published --------------------------------------------------------------------------------------------


def test_public_repository_stays_public_and_a_name_without_owner_belongs_to_the_token(hub, client, plain_folder):
    assert "/user/alone" in client.publish(plain_folder, "alone")
    assert b'"user/alone"' in hub.repository("user/alone").files()["README.md"]
    assert "'user/alone' is a public repository" in client.fail(plain_folder, "user/alone", "--private")


def test_branch_is_made_from_main_and_continued(hub, client, folder, old_model, published, image, expected):
    old = hub.add("user/branch", old_model)
    for title in ("First", "Second"):
        options = ["--revision", "next/small", "--message", title, "--license", title]
        assert "/user/branch/tree/next/small" in client.publish(folder, "user/branch", *options)
    repository = hub.repository("user/branch")
    assert repository.find("main") is old
    assert [commit.title for commit in repository.history("next/small")][:3] == ["Second", "First", "Add files"]
    assert set(repository.files("next/small")) == set(published) | {"handler.py"}
    assert client.call("classify", "user/branch", image, "next/small") == expected


@pytest.mark.parametrize("token", [WRITE_TOKEN, STRANGER_TOKEN])
def test_pull_request_holds_the_model(hub, client, folder, published, old_model, image, expected, token):
    name = f"user/pull-{token}".replace("_", "-")
    old = hub.add(name, old_model)
    message = client.publish(folder, name, "--create-pr", token=token)
    assert f"Published {hub.address}/{name}/discussions/1" in message
    assert hub.repository(name).find("main") is old
    assert set(hub.repository(name).files("refs/pr/1")) == set(published) | {"handler.py"}
    assert client.call("classify", name, image, "refs/pr/1") == expected


def test_several_weight_files_become_one(hub, client, old_model, tmp_path):
    client.publish(old_model, "user/sharded")
    files = hub.repository("user/sharded").files()
    assert not [name for name in files if "-of-" in name or "index" in name]
    (tmp_path / "model.safetensors").write_bytes(files["model.safetensors"])
    assert json.loads(files["evaluation.json"]) == {"num_images": 90, "weights_sha256": weights_sha256(tmp_path)}


@pytest.mark.parametrize("digest", [{}, {"weights_sha256": "0" * 64}])
def test_evaluation_of_other_weights_is_left_out(hub, client, tmp_path, digest):
    folder, name = save(tmp_path / "model", make_model()), f"user/stale{len(digest)}"
    hub.add(name, {"evaluation.json": b"{}"})
    budgets = [{"num_patches": 9, "top1": 0.875}]
    (folder / "evaluation.json").write_text(json.dumps({"num_images": 90, "budgets": budgets, **digest}))
    assert f"Left out {folder / 'evaluation.json'}" in client.publish(folder, name)
    files = hub.repository(name).files()
    assert "evaluation.json" not in files and b"87.5%" not in files["README.md"]


def test_model_of_another_kind_is_refused(hub, client, plain_folder):
    old = hub.add("user/bert", {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"bert"})
    assert "config.json is of type 'bert', not 'dart'" in client.fail(plain_folder, "user/bert")
    assert hub.repository("user/bert").find() is old


def test_weights_files_are_recognised():
    names = ["model.fp16.safetensors", "model.fp16-00001-of-00002.safetensors", "model.safetensors.index.fp16.json"]
    names += ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "processor_config.json"]
    assert all(repository.WEIGHTS_FILES.fullmatch(name) for name in names)
    assert not any(repository.WEIGHTS_FILES.fullmatch(name) for name in ("training_args.bin", "handler.py"))


def test_same_model_again_makes_no_commit(hub, client, published, folder):
    head = hub.repository("user/tulips").find().id
    message = client.publish(folder, "user/tulips")
    assert message.startswith("The Hub has this model already") and head in message
    assert hub.repository("user/tulips").find().id == head
    assert "already" in client.publish(folder, "user/tulips", "--create-pr")
    # The spelling of version 0.1.
    exit_code, stdout, stderr = client.call("run", "publish", folder, "user/tulips")
    assert exit_code == 0 and stdout == message and f"dart-hf publish user/tulips --model {folder}\n" in stderr


def test_model_of_the_hub_is_copied(hub, client, published):
    client.publish("user/tulips", "user/copy")
    assert hub.repository("user/copy").files()["model.safetensors"] == published["model.safetensors"]


# --- the model card ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["folder", "hub"])
@pytest.mark.parametrize("kind", ["generated", "written"])
def test_earlier_card(hub, client, published, where, kind, tmp_path):
    if kind == "generated":
        earlier = published["README.md"].replace(b"library_name", b"license: mit\nlibrary_name")
    else:
        earlier = b"---\nlicense: mit\ntags: [flowers]\nmetrics: [f1]\nbase_model: user/old\n---\n# Mine\n"
    name, folder = f"user/{kind}-{where}", save(tmp_path / "model", make_model(num_hidden_layers=2))
    hub.add(name, {"README.md": earlier if where == "hub" else b"# Older\n" if kind == "written" else b""})
    if where == "folder":
        (folder / "README.md").write_bytes(earlier)
    printed = client.publish(folder, name)
    assert "licence" not in printed and ("keeps its text" in printed) == (kind == "written")
    card = card_of(hub, name)
    assert (card.data.license, card.data.pipeline_tag) == ("mit", "image-classification")
    assert (card.data.base_model, card.data.metrics, card.data.eval_results) == (None, None, None)
    if kind == "written":
        assert card.text == "# Mine\n" and card.data.tags[:2] == ["flowers", "dart"]
    else:
        assert "## Evaluation" not in card.text


def test_example_image_has_no_metadata(hub, client, image, tmp_path):
    folder = save(tmp_path / "model", make_model())
    secret = Image.Exif()
    secret[0x010E] = "at home"
    photo = tmp_path / "photo[1].jpg"
    Image.open(image).save(photo, exif=secret, comment="at home")
    assert b"at home" in photo.read_bytes()
    client.publish(folder, "user/example", "--example", photo)
    content = hub.repository("user/example").files()["example.jpg"]
    assert b"at home" not in content and Image.open(io.BytesIO(content)).size == (60, 40)
    assert card_of(hub, "user/example").data.widget == [{"src": "example.jpg", "example_title": "Example"}]
    (folder / "example.png").write_bytes(image.read_bytes())
    client.publish(folder, "user/example")
    pixels = Image.open(io.BytesIO(hub.repository("user/example").files()["example.png"]))
    assert pixels.tobytes() == Image.open(image).tobytes()


# --- faults -----------------------------------------------------------------------------------------------------------


COMPARE = "run this again to do so."
MAYBE = "perhaps this one; running this again"


@pytest.mark.parametrize(
    ("where", "how", "after_bytes", "words", "is_made"),
    [
        ("info", 401, 0, "hf auth login", False),
        ("info", "drop answer", 20, "run this again", False),
        ("preupload", 429, 0, "in some minutes", False),
        ("lfs_upload", 403, 0, "use one with write access", False),
        ("lfs_upload", "drop request", 1000, "run this again", False),
        ("commit", 409, 0, "changed by somebody else; run this again", False),
        ("commit", 500, 0, "run this again later", False),
        ("commit", "drop request", 1000, "run this again", False),
        ("commit", "drop answer", 0, MAYBE, True),
        ("tree", 500, 0, COMPARE, True),
        ("resolve_head", 500, 0, "run this again later", False),
        ("resolve_head", 403, 0, "", False),
        ("lfs_download", 404, 0, COMPARE, True),
    ],
)
def test_fault_leaves_the_old_or_the_new_model(
    hub, client, folder, old_model, published, where, how, after_bytes, words, is_made
):
    name = f"{where}-{how}-{after_bytes}".replace("_", "-").replace(" ", "-")
    before = contents(folder)
    old = hub.add(f"user/{name}", old_model)
    repository = hub.repository(f"user/{name}")
    new = {**renamed(published, name), "handler.py": (old_model / "handler.py").read_bytes()}
    hub.api.lfs.pop(Blob(new["model.safetensors"]).sha256, None)  # so that the weights are uploaded again
    hub.fail(where, how, times=100, after_bytes=after_bytes)
    message = client.fail(folder, f"user/{name}")
    hub.mend()
    assert words in message
    if is_made:
        assert repository.files() == new and repository.find().id in message
    else:
        assert repository.find() is old and message.endswith(NOTHING)
    client.publish(folder, f"user/{name}")
    assert repository.files() == new
    assert [commit.id for commit in repository.history()][1] == old.id
    assert contents(folder) == before


EMPTY = f"{NOTHING} The repository is empty."


@pytest.mark.parametrize(
    ("where", "how", "options", "words", "end"),
    [
        ("create", 401, (), "log in with 'hf auth login'", NOTHING),
        ("create", "drop request", (), "the connection broke; run this again", NOTHING),
        ("validate_yaml", 400, (), "the Hub refuses what was sent", EMPTY),
        ("commit", "drop request", (), "run this again", EMPTY),
        ("branch", 500, ("--revision", "next"), "run this again later", EMPTY),
        ("branch", "drop answer", ("--revision", "next"), "run this again", EMPTY),
    ],
)
def test_fault_in_a_new_repository_leaves_no_file(hub, client, folder, published, where, how, options, words, end):
    name = f"new-{where}-{how}".replace("_", "-").replace(" ", "-")
    hub.api.lfs.pop(Blob(published["model.safetensors"]).sha256, None)
    hub.fail(where, how, times=100)
    message = client.fail(folder, f"user/{name}", *options)
    hub.mend()
    assert words in message and message.endswith(end)
    if f"user/{name}" in hub.api.repositories:
        assert set(hub.repository(f"user/{name}").files()) == {".gitattributes"}
    client.publish(folder, f"user/{name}", *options)
    assert hub.repository(f"user/{name}").files(options[-1] if options else "main") == renamed(published, name)


def test_uncertain_pull_request_is_explained(hub, client, folder, old_model):
    hub.add("user/unsure", old_model)
    hub.fail("tree", 500, times=100)
    message = client.fail(folder, "user/unsure", "--create-pr")
    hub.mend()
    assert f"{hub.address}/user/unsure/discussions/1" in message
    assert message.endswith("run this again with --revision refs/pr/1 to do so.")
    assert "already" in client.publish(folder, "user/unsure", "--revision", "refs/pr/1")
    assert "refs/pr/2" not in hub.repository("user/unsure").refs

    old = hub.add("user/lost", old_model)
    hub.fail("commit", "drop answer")
    assert f"look at {hub.address}/user/lost/discussions" in client.fail(folder, "user/lost", "--create-pr")
    assert hub.repository("user/lost").find() is old


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("typo", ["--create-pr"], "there is no such repository"),
        ("tulips", ["--create-pr", "--revision", "none"], "the repository has no such branch"),
        ("tulips", ["--revision", "refs/pr/99"], "the repository has no such branch"),
        ("tulips", ["--revision", "v1"], "the repository has no such branch"),
    ],
)
def test_missing_branch_or_repository_is_refused(hub, client, plain_folder, published, name, options, words):
    repository = hub.repository("user/tulips")
    if "refs/tags/v1" not in repository.refs:
        repository.add_ref("refs/tags/v1", "main")
    refs = dict(repository.refs)
    message = client.fail(plain_folder, f"user/{name}", *options)
    assert words in message and message.endswith(NOTHING)
    assert "user/typo" not in hub.api.repositories and repository.refs == refs


@pytest.mark.parametrize("where", ["lfs_upload", "commit", "tree"])
def test_interrupted_publishing_can_be_repeated(hub, client, folder, published, where):
    """Ctrl-C while the Hub does not answer."""
    name = f"interrupted-{where}".replace("_", "-")
    old = hub.add(f"user/{name}", {})
    hub.api.lfs.pop(Blob(published["model.safetensors"]).sha256, None)
    hub.stalled.clear()
    hub.fail(where, "stall")
    process, over = client.call("process"), threading.Event()

    def interrupt() -> None:
        hub.stalled.wait()
        # A signal that arrives just before the client starts to wait does not wake it.
        while not over.is_set():
            os.kill(process, signal.SIGINT)
            over.wait(5)

    threading.Thread(target=interrupt, daemon=True).start()
    exit_code, stdout, stderr = client.call("run", "publish", f"user/{name}", "--model", folder)
    over.set()
    assert (exit_code, stdout) == (130, "") and "Traceback" not in stderr
    repository = hub.repository(f"user/{name}")
    if where == "tree":
        assert f"uploaded to 'user/{name}' as commit {repository.find().id}, but not compared with" in stderr
    else:
        assert "unknown whether the commit was made; running this again makes it only if it is missing." in stderr
        assert repository.find() is old
        client.publish(folder, f"user/{name}")
    assert repository.files() == renamed(published, name)


def test_commit_of_somebody_else_is_not_mixed_with(hub, client, folder, published, monkeypatch):
    hub.add("user/shared", {})
    repository = hub.repository("user/shared")
    preupload = hub_server.Api.preupload

    def commit_meanwhile(*arguments: Any, **parts: str) -> hub_server.Answer:
        head = repository.find()
        repository.commit(hub_server.MAIN, Commit({**head.files, "theirs": Blob(b"")}, "Theirs", parent=head.id))
        return preupload(*arguments, **parts)

    with monkeypatch.context() as patch:
        patch.setattr(hub_server.Api, "preupload", commit_meanwhile)
        message = client.fail(folder, "user/shared")
    assert "changed by somebody else meanwhile; run this again" in message and NOTHING in message
    assert repository.find().title == "Theirs"
    client.publish(folder, "user/shared")
    assert repository.files() == {**renamed(published, "shared"), "theirs": b""}


@pytest.mark.parametrize(
    ("name", "token", "words"),
    [
        ("user/new", None, "log in with 'hf auth login' or set HF_TOKEN"),
        ("user/new", "hf_wrong", "does not accept the token; log in"),
        ("user/new", READ_TOKEN, "use one with write access"),
        ("organisation/new", WRITE_TOKEN, "no access to that; to write there use one"),
        ("user/tulips", STRANGER_TOKEN, "or open a pull request (--create-pr)"),
    ],
)
def test_token_without_the_right_is_refused(hub, client, plain_folder, published, name, token, words):
    before = list(hub.repository("user/tulips").commits)
    message = client.fail(plain_folder, name, token=token)
    assert words in message and message.endswith(NOTHING)
    assert hub.repository("user/tulips").commits == before and "user/new" not in hub.api.repositories


def test_changed_file_is_an_error(hub, client, plain_folder, monkeypatch):
    resolve = hub_server.Api.resolve

    def change(api: hub_server.Api, request: hub_server.Request, name: str, revision: str, path: str) -> Any:
        answer = resolve(api, request, name, revision, path)
        if path != "config.json" or request.method == "HEAD":
            return answer
        return hub_server.Answer(answer.body.replace(b"flow", b"grid"), answer.status, answer.headers)

    monkeypatch.setattr(hub_server.Api, "resolve", change)
    message = client.fail(plain_folder, "user/changed")
    assert "config.json came back changed" in message and "do not use that commit" in message


# --- without a Hub ----------------------------------------------------------------------------------------------------


def fail_offline(folder: Path, name: str, *options: str) -> str:
    arguments = ["publish", name, "--model", str(folder), *options]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    return only_error(result.exit_code, result.stdout, result.stderr)


@pytest.fixture
def online(monkeypatch):
    """Pretend to be online, without a client that could reach the Hub."""
    monkeypatch.setattr(publishing, "is_offline_mode", lambda: False)
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    monkeypatch.setattr(repository, "HfApi", None)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("a/b/c", [], "repo_id must be like 'user/model', got 'a/b/c'"),
        ("user/a b", [], "repo_id must be like"),
        ("datasets/user/model", [], "repo_id must be like"),
        ("user/--", [], "repo_id must be like"),
        ("user/model", ["--revision", "a" * 40], "revision must be a branch, got the commit"),
        ("user/model", ["--revision", "refs/pr/1", "--create-pr"], "create_pr needs a branch to merge into"),
    ],
)
def test_wrong_name_or_revision_is_refused(online, plain_folder, name, options, words):
    assert words in fail_offline(plain_folder, name, *options)


def test_missing_folder_and_offline_mode_are_refused(online, plain_folder, tmp_path, monkeypatch):
    assert "There is no folder" in fail_offline(tmp_path / "none", "user/model")
    monkeypatch.setattr(publishing, "is_offline_mode", lambda: True)
    message = fail_offline(plain_folder, "user/model")
    assert "HF_HUB_OFFLINE is set; unset it" in message and message.endswith(NOTHING)


def change_bias(folder: Path, bias: torch.Tensor | None) -> None:
    weights = {**load_file(folder / "model.safetensors"), "classifier.bias": bias}
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


DEAD_SCORER = {"scorer": "squeezenet1_1", "image_size": 64}


@pytest.mark.parametrize(
    ("settings", "damage", "words"),
    [
        ({}, lambda folder: (folder / "config.json").unlink(), "holds no model"),
        ({}, lambda folder: (folder / "preprocessor_config.json").unlink(), "save the image processor of the model"),
        (DEAD_SCORER, lambda folder: None, "The scorer is dead"),
        ({}, lambda folder: change_bias(folder, None), "missing classifier.bias"),
        ({}, lambda folder: change_bias(folder, torch.full((3,), torch.nan)), "logits are not finite"),
        ({"num_channels": 1}, lambda folder: None, "channels"),
        ({}, lambda folder: (folder / "training.json").write_text("{"), "training.json' is damaged"),
        ({}, lambda folder: (folder / "evaluation.json").write_text("[]"), "evaluation.json' is damaged"),
        ({}, lambda folder: (folder / "README.md").write_text("---\ntags: [\n---\n"), "README.md in the folder cannot"),
        ({}, lambda folder: (folder / "example.png").write_text("no image"), "Cannot read"),
    ],
)
def test_unusable_folder_is_refused(online, tmp_path, settings, damage, words):
    folder = save(tmp_path / "model", make_model(**settings))
    damage(folder)
    assert words in fail_offline(folder, "user/model")


def test_dead_scorer_is_accepted_if_it_is_not_run(tmp_path):
    folder = save(tmp_path / "model", make_model(**DEAD_SCORER, partition="uniform"))
    assert staging.load_publishable(folder)[0].scorer.is_dead


@pytest.mark.parametrize(
    ("source", "shown"),
    [("user/photos", "user/photos"), ("user/none", None), ("preset tiny", "preset tiny"), ("/me/photos", "photos")],
)
def test_local_paths_are_shortened(source, shown):
    record = {"source": source}
    hub_id = staging.publishable_source(record, "source", lambda name: name == "user/photos")
    assert record.get("source") == shown and hub_id == (source if source == "user/photos" else None)


def test_unknown_state_of_a_commit_is_told(monkeypatch):
    def unreachable(*arguments: Any, **settings: Any) -> None:
        raise ConnectionError

    place = repository.Repository("user/model", None, False, WRITE_TOKEN)
    monkeypatch.setattr(place.api, "model_info", unreachable)
    words = "It is unknown whether the commit was made; running this again"
    with pytest.raises(publishing.PublishingError, match=words), place.explain_errors(is_commit=True):
        raise ConnectionResetError


def test_other_logits_are_an_error(plain_folder, tmp_path, monkeypatch):
    model = make_model()
    model.classifier.weight.data *= 1.001
    other = save(tmp_path / "other", model)
    place = repository.Repository("user/model", None, False, WRITE_TOKEN)
    monkeypatch.setattr(place.api, "snapshot_download", lambda *_, **__: None)
    monkeypatch.setattr(publishing.filecmp, "cmpfiles", lambda *_, **__: ([], [], []))
    commit = SimpleNamespace(oid="abc", pr_revision=None, pr_url=None)
    expected = staging.outputs_for_noise(*staging.load_publishable(plain_folder))
    publishing._check_published(place, commit, plain_folder, plain_folder, expected)
    with pytest.raises(publishing.PublishingError, match="its logits differ from the local model's by up to"):
        publishing._check_published(place, commit, plain_folder, other, expected)
