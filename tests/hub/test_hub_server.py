"""The Hub of the tests, as the real client sees it: transfers, revisions, who may do what, and every injected fault."""

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.hub_server import READ_TOKEN, STRANGER_TOKEN, WRITE_TOKEN, HubServer

WEIGHTS = bytes(range(256)) * 48000  # 12 MB; the client stores 10 MB at a time

CLIENT = """
import hashlib, json, sys
from huggingface_hub import CommitOperationAdd, HfApi

api = HfApi()

def outcome(call, *arguments, **settings):
    try:
        call(*arguments, **settings)
    except Exception as error:
        if "TransportError" in [kind.__name__ for kind in type(error).__mro__]:
            return "TransportError"
        response = getattr(error, "response", None)
        return type(error).__name__ + (f" {response.status_code}" if response is not None else "")
    return "done"

def say(value):
    print(json.dumps(value))
"""


def ask(hub: HubServer, home: Path, code: str, *arguments: object, token: str | None = WRITE_TOKEN) -> object:
    """What the code, run after CLIENT, says."""
    done = hub.run([sys.executable, "-c", CLIENT + code, *map(str, arguments)], home, token)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_folder_goes_up_and_comes_down(hub, tmp_path):
    files = {
        "README.md": b"---\nlicense: mit\npipeline_tag: image-classification\n---\nA model.\n",
        "config.json": b"{}",
        "code/a b.py": b"x = 1\n",
        "model.safetensors": WEIGHTS,
    }
    for name, content in files.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    said = ask(
        hub,
        tmp_path,
        """
from pathlib import Path
created = api.create_repo("model", private=True)
again = api.create_repo("user/model", exist_ok=True)
commit = api.upload_folder(repo_id="user/model", folder_path=sys.argv[1])
same = api.upload_folder(repo_id="user/model", folder_path=sys.argv[1])
snapshot = Path(api.snapshot_download("user/model"))
info = api.model_info("user/model")
tree = api.list_repo_tree("user/model", recursive=True)
weights, = api.get_paths_info("user/model", ["model.safetensors", "absent"])
say({
    "user": api.whoami()["name"],
    "created": [created.repo_id, again.repo_id],
    "commits": [commit.oid, same.oid, info.sha, snapshot.name],
    "info": [info.private, info.pipeline_tag, info.card_data.license, sorted(each.rfilename for each in info.siblings)],
    "top": [each.path for each in api.list_repo_tree("user/model")],
    "sizes": {each.path: each.size for each in tree if hasattr(each, "size")},
    "code": [each.path for each in api.list_repo_tree("user/model", "code")],
    "lfs": [weights.lfs.sha256, weights.lfs.size],
    "came": {
        path.relative_to(snapshot).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in snapshot.rglob("*.*")
    },
})
""",
        tmp_path / "folder",
    )
    repository = hub.repository("user/model")
    there = repository.files()
    assert {**there, **files} == there
    assert set(there) == {".gitattributes", *files}
    assert repository.private
    assert len(repository.commits) == 2  # the Hub's own and the upload; the same again is none
    assert said["user"] == "user"
    assert said["created"] == ["user/model"] * 2
    assert said["commits"] == [repository.refs["refs/heads/main"]] * 4
    assert said["info"] == [True, "image-classification", "mit", sorted(there)]
    assert sorted(said["top"]) == [".gitattributes", "README.md", "code", "config.json", "model.safetensors"]
    assert said["sizes"] == {name: len(content) for name, content in there.items()}
    assert said["code"] == ["code/a b.py"]
    assert said["lfs"] == [repository.find().files["model.safetensors"].sha256, len(WEIGHTS)]
    assert said["came"] == {name: blob.sha256 for name, blob in repository.find().files.items()}
    assert len(hub.seen("lfs_upload")) == len(hub.seen("lfs_download")) == 1
    assert {each.token for each in hub.seen("lfs_upload") + hub.seen("lfs_download")} == {None}


def test_a_revision_is_one_snapshot(hub, tmp_path):
    first = hub.add("user/model", {"a.txt": b"first", "old/b.txt": b"b", "old/c.txt": b"c"})
    said = ask(
        hub,
        tmp_path,
        """
def add(content, **where):
    return api.create_commit("user/model", [CommitOperationAdd("a.txt", content)], commit_message="a", **where)
def read(revision):
    return open(api.hf_hub_download("user/model", "a.txt", revision=revision)).read()
first = sys.argv[1]
api.create_tag("user/model", tag="v1")
api.create_branch("user/model", branch="side")
api.delete_folder("old", "user/model", revision="side")
side = add(b"side", revision="side")
main = add(b"main", parent_commit=first)
request = add(b"request", create_pr=True)
more = add(b"more", revision=request.pr_revision)
say({
    "commits": [side.oid, main.oid, request.oid, more.oid],
    "request": request.pr_revision,
    "read": {each: read(each) for each in ["main", "v1", "side", "refs/pr/1", first, request.oid]},
    "titles": [each.title for each in api.list_repo_commits("user/model", revision="refs/pr/1")],
    "requests": [each.ref for each in api.list_repo_refs("user/model", include_pull_requests=True).pull_requests],
    "late": outcome(add, b"late", parent_commit=first),
    "nowhere": outcome(add, b"nowhere", revision="nowhere"),
    "unknown": outcome(read, "unknown"),
    "absent": outcome(api.hf_hub_download, "user/model", "absent.txt"),
    "missing": outcome(api.delete_file, "none.txt", "user/model"),
    "again": outcome(api.create_branch, "user/model", branch="side"),
    "exists": outcome(api.create_branch, "user/model", branch="side", exist_ok=True),
})
""",
        first.id,
    )
    repository = hub.repository("user/model")
    side, main, request, more = said["commits"]
    assert repository.refs == {
        "refs/heads/main": main,
        "refs/tags/v1": first.id,
        "refs/heads/side": side,
        "refs/pr/1": more,
    }
    assert [commit.id for commit in repository.history("refs/pr/1")][:4] == [more, request, main, first.id]
    assert set(repository.files("side")) == {".gitattributes", "a.txt"}
    assert set(repository.files("main")) == {".gitattributes", "a.txt", "old/b.txt", "old/c.txt"}
    assert said["request"] == "refs/pr/1"
    assert list(said["read"].values()) == ["main", "first", "side", "more", "first", "request"]
    assert said["titles"] == ["a", "a", "a", "Add files", "initial commit"]
    assert said["requests"] == ["refs/pr/1"]
    assert said["late"] == "HfHubHTTPError 412"
    assert said["nowhere"] == "RevisionNotFoundError 404"
    assert said["unknown"] == "RevisionNotFoundError 404"
    assert said["absent"] == "RemoteEntryNotFoundError 404"
    assert said["missing"] == "RemoteEntryNotFoundError 404"
    assert said["again"] == "HfHubHTTPError 409"
    assert said["exists"] == "done"


HIDDEN, ANONYMOUS = "RepositoryNotFoundError 404", "RepositoryNotFoundError 401"
ACCESS = ["read public", "read private", "create", "write public", "write private", "request public", "delete"]


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (WRITE_TOKEN, ["done"] * 7),
        (READ_TOKEN, ["done", "done", *["HfHubHTTPError 403"] * 5]),
        (
            STRANGER_TOKEN,
            ["done", HIDDEN, "HfHubHTTPError 403", "HfHubHTTPError 403", HIDDEN, "done", "HfHubHTTPError 403"],
        ),
        (None, ["done", ANONYMOUS, "HfHubHTTPError 401", ANONYMOUS, ANONYMOUS, ANONYMOUS, ANONYMOUS]),
        ("hf_wrong", ["HfHubHTTPError 401"] * 7),
    ],
)
def test_the_token_decides(hub, tmp_path, token, expected):
    hub.add("user/public", {"a.txt": b"a"})
    hub.add("user/private", {"a.txt": b"a"}, private=True)
    said = ask(
        hub,
        tmp_path,
        """
def write(name, **how):
    api.upload_file(path_or_fileobj=b"b", path_in_repo="b.txt", repo_id=name, **how)
say([
    outcome(api.model_info, "user/public"),
    outcome(api.hf_hub_download, "user/private", "a.txt"),
    outcome(api.create_repo, "user/new"),
    outcome(write, "user/public"),
    outcome(write, "user/private"),
    outcome(write, "user/public", create_pr=True),
    outcome(api.delete_repo, "user/public"),
])
""",
        token=token,
    )
    assert dict(zip(ACCESS, said, strict=True)) == dict(zip(ACCESS, expected, strict=True))
    assert ("user/new" in hub.storage.repositories) == (expected[2] == "done")
    assert ("b.txt" in hub.repository("user/private").files()) == (expected[4] == "done")
    assert ("user/public" in hub.storage.repositories) == (expected[6] != "done")


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Iterator[tuple[HubServer, Callable[[str], str]]]:
    """A Hub with user/model, and a client that says what comes of an upload, a download or a creation of a name."""
    loop = """
def upload(name):
    api.upload_file(path_or_fileobj=name.encode() * 1000, path_in_repo=name, repo_id="user/model")
def download(name):
    api.hf_hub_download("user/model", "model.safetensors", cache_dir=name)
def create(name):
    api.create_repo(name)
for line in sys.stdin:
    call, name = line.split()
    print(outcome(globals()[call], name), flush=True)
"""
    with HubServer() as hub, hub.conversation(CLIENT + loop, tmp_path_factory.mktemp("client"), WRITE_TOKEN) as say:
        hub.add("user/model", {"model.safetensors": WEIGHTS})
        yield hub, say


@pytest.mark.parametrize(
    ("where", "how", "settings", "expected"),
    [
        ("preupload", 403, {}, "HfHubHTTPError 403"),
        ("preupload", 404, {}, "RepositoryNotFoundError 404"),
        ("preupload", 503, {}, "done"),
        ("preupload", "drop answer", {}, "done"),
        ("lfs_batch", 401, {}, "HfHubHTTPError 401"),
        ("lfs_upload", 403, {}, "RuntimeError"),
        ("lfs_upload", "drop request", {"after_bytes": 1000}, "done"),
        ("lfs_verify", 404, {"code": "EntryNotFound"}, "RuntimeError"),
        ("commit", 401, {}, "HfHubHTTPError 401"),
        ("commit", 403, {}, "HfHubHTTPError 403"),
        ("commit", 404, {}, "RepositoryNotFoundError 404"),
        ("commit", 409, {}, "HfHubHTTPError 409"),
        ("commit", 412, {}, "HfHubHTTPError 412"),
        ("commit", 500, {}, "HfHubHTTPError 500"),
        ("commit", "drop request", {"after_bytes": 10}, "TransportError"),
        ("commit", "drop answer", {}, "TransportError"),
    ],
)
def test_a_fault_in_an_upload(client, where, how, settings, expected):
    hub, say = client
    name = f"{where}-{how}.safetensors".replace(" ", "-")
    hub.fail(where, how, **settings)
    before = len(hub.repository("user/model").commits)
    assert say(f"upload {name}") == expected
    if expected == "done" or (where, how) == ("commit", "drop answer"):
        assert hub.repository("user/model").files()[name] == name.encode() * 1000
    else:
        assert len(hub.repository("user/model").commits) == before
    assert say(f"upload {name}") == "done"
    assert hub.repository("user/model").files()[name] == name.encode() * 1000


@pytest.mark.parametrize(
    ("where", "how", "settings", "expected"),
    [
        ("resolve_head", 401, {}, "HfHubHTTPError 401"),
        ("resolve_head", 403, {"code": "GatedRepo"}, "GatedRepoError 403"),
        ("resolve_head", 404, {"code": "EntryNotFound"}, "RemoteEntryNotFoundError 404"),
        ("resolve_head", 404, {"code": "RevisionNotFound"}, "RevisionNotFoundError 404"),
        ("resolve_head", 503, {}, "done"),
        ("resolve_head", "drop answer", {}, "TransportError"),
        ("lfs_download", 500, {}, "HfHubHTTPError 500"),
        ("lfs_download", "drop answer", {"after_bytes": 11_000_000}, "done"),
    ],
)
def test_a_fault_in_a_download(client, where, how, settings, expected):
    hub, say = client
    name = f"{where}-{how}-{settings.get('code')}".replace(" ", "-")
    hub.fail(where, how, path="" if where == "lfs_download" else "model.safetensors", **settings)
    assert say(f"download {name}") == expected
    assert say(f"download {name}") == "done"
    if (where, how) == ("lfs_download", "drop answer"):  # it goes on where it broke
        assert [each.status for each in hub.seen("lfs_download")][-2:] == [None, 206]


@pytest.mark.parametrize(
    ("how", "expected"),
    [(401, "HfHubHTTPError 401"), (409, "HfHubHTTPError 409"), ("drop answer", "TransportError")],
)
def test_a_fault_in_a_creation(client, how, expected):
    hub, say = client
    name = f"user/{how}".replace(" ", "-")
    hub.fail("create", how)
    assert say(f"create {name}") == expected
    assert (name in hub.storage.repositories) == (how == "drop answer")


def test_a_client_that_is_killed_leaves_nothing_behind(hub, tmp_path):
    hub.add("user/model", {"a.txt": b"a"})
    before = hub.repository("user/model").refs.copy()
    hub.fail("commit", "stall", after_bytes=10)
    upload = 'api.upload_file(path_or_fileobj=b"b", path_in_repo="a.txt", repo_id="user/model")'
    command, environment = [sys.executable, "-c", CLIENT + upload], hub.environment(tmp_path, WRITE_TOKEN)
    with subprocess.Popen(command, env=environment) as process:
        assert hub.stalled.wait(60)
        process.kill()
    assert hub.repository("user/model").refs == before
    assert ask(hub, tmp_path, f"say(outcome(lambda: {upload}))") == "done"
    assert hub.repository("user/model").files()["a.txt"] == b"b"


@pytest.mark.parametrize("chunked", [False, True])
def test_half_a_request_changes_nothing(hub, chunked):
    hub.add("user/model", {"a.txt": b"a"})
    before = hub.repository("user/model").refs.copy()
    lines = [{"key": "header", "value": {"summary": "a"}}, {"key": "deletedFile", "value": {"path": "a.txt"}}]
    half = "".join(json.dumps(line) + "\n" for line in lines).encode()
    length = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % (len(half) + 1000)
    head = [
        b"POST /api/models/user/model/commit/main HTTP/1.1",
        b"Authorization: Bearer " + WRITE_TOKEN.encode(),
        length,
    ]
    with socket.create_connection(("127.0.0.1", int(hub.address.rpartition(":")[2]))) as connection:
        connection.sendall(b"\r\n".join([*head, b"", b"%x\r\n%s\r\n" % (len(half), half) if chunked else half]))
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
    assert hub.repository("user/model").refs == before


def test_invalid_card_metadata_is_refused(hub, tmp_path):
    hub.add("user/model", {"a.txt": b"a"})
    upload = 'api.upload_file(path_or_fileobj=b"---\\nx: [\\n---\\n", path_in_repo="README.md", repo_id="user/model")'
    assert ask(hub, tmp_path, f"say(outcome(lambda: {upload}))") == "ValueError"
    assert "README.md" not in hub.repository("user/model").files()


def test_a_fault_that_does_not_exist_is_refused(hub):
    with pytest.raises(ValueError, match="no fault 'drop' for 'commit'"):
        hub.fail("commit", "drop")
    with pytest.raises(ValueError, match="no fault 500 for 'comit'"):
        hub.fail("comit", 500)
