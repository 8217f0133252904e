"""The Hub of the tests behaves for the real client as the tests of publishing and loading assume."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.hub_server import READ_TOKEN, STRANGER_TOKEN, WRITE_TOKEN, HubServer

WEIGHTS = bytes(range(256)) * 48000  # 12 MB; the client stores 10 MB at a time

# Answers lines of Python, which may use `api` and `outcome`, with lines of JSON.
CLIENT = """
import hashlib, json, os, sys, time
from huggingface_hub import CommitOperationAdd, HfApi
time.sleep = lambda seconds: None  # between the client's tries
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

def add(content, path="a.txt", name="user/model", **where):
    return api.create_commit(name, [CommitOperationAdd(path, content)], commit_message="a", **where)

def read(revision):
    return open(api.hf_hub_download("user/model", "a.txt", revision=revision)).read()

def download(name):
    api.hf_hub_download("user/weights", "model.safetensors", cache_dir=name)

for line in sys.stdin:
    print(json.dumps(eval(line)), flush=True)
"""


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Iterator[tuple[HubServer, Callable[[str], object]]]:
    home = tmp_path_factory.mktemp("client")
    with HubServer() as hub, hub.conversation(CLIENT, home, WRITE_TOKEN) as ask:
        hub.add("user/weights", {"model.safetensors": WEIGHTS})
        yield hub, lambda code: json.loads(ask(code))


def test_folder_is_uploaded_and_downloaded(client, tmp_path):
    hub, ask = client
    files = {"README.md": b"---\nlicense: mit\n---\n", "code/a b.py": b"x = 1\n", "model.safetensors": WEIGHTS[::-1]}
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    assert ask("api.create_repo('folder', private=True).repo_id") == "user/folder"
    assert ask("api.create_repo('user/folder', exist_ok=True).repo_id") == "user/folder"
    upload = f"api.upload_folder(repo_id='user/folder', folder_path={str(tmp_path)!r}).oid"
    repository = hub.repository("user/folder")
    assert ask(upload) == ask(upload) == ask("api.model_info('user/folder').sha") == repository.find().id
    assert len(repository.commits) == 2  # the Hub's own, and the first upload
    assert repository.private and {**repository.files(), **files} == repository.files()
    snapshot = Path(ask("api.snapshot_download('user/folder')"))
    found = {path.relative_to(snapshot).as_posix(): path.read_bytes() for path in snapshot.rglob("*.*")}
    assert found == repository.files()
    for where in ("lfs_upload", "lfs_download"):
        assert [each.token for each in hub.seen(where)] == [None]


def test_revision_is_a_snapshot(client):
    hub, ask = client
    first = hub.add("user/model", {"a.txt": b"first", "b.txt": b"b"})
    repository = hub.repository("user/model")
    repository.add_ref("refs/tags/v1", "main")
    assert ask("outcome(api.create_branch, 'user/model', branch='side')") == "done"
    side = ask("add(b'side', revision='side').oid")
    main = ask(f"add(b'main', parent_commit={first.id!r}).oid")
    assert ask("add(b'request', create_pr=True).pr_revision") == "refs/pr/1"
    more = ask("add(b'more', revision='refs/pr/1').oid")
    refs = {"refs/heads/main": main, "refs/tags/v1": first.id, "refs/heads/side": side, "refs/pr/1": more}
    assert repository.refs == refs
    revisions = {"main": "main", "v1": "first", "side": "side", "refs/pr/1": "more", first.id: "first"}
    assert {revision: ask(f"read({revision!r})") for revision in revisions} == revisions
    assert ask(f"outcome(add, b'late', parent_commit={first.id!r})") == "HfHubHTTPError 412"
    assert ask("outcome(add, b'nowhere', revision='nowhere')") == "RevisionNotFoundError 404"
    assert ask("outcome(read, 'unknown')") == "RevisionNotFoundError 404"
    assert ask("outcome(api.hf_hub_download, 'user/model', 'absent.txt')") == "RemoteEntryNotFoundError 404"
    assert ask("outcome(api.create_branch, 'user/model', branch='side')") == "HfHubHTTPError 409"


HIDDEN, ANONYMOUS, REFUSED = "RepositoryNotFoundError 404", "RepositoryNotFoundError 401", "HfHubHTTPError 403"


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (WRITE_TOKEN, ["done"] * 6),
        (READ_TOKEN, ["done", "done", REFUSED, REFUSED, REFUSED, REFUSED]),
        (STRANGER_TOKEN, ["done", HIDDEN, REFUSED, REFUSED, HIDDEN, "done"]),
        (False, ["done", *[ANONYMOUS] * 5]),
        ("hf_wrong", ["HfHubHTTPError 401"] * 6),
    ],
)
def test_access_depends_on_the_token(client, token, expected):
    hub, ask = client
    name = f"user/{'none' if token is False else token.replace('_', '-')}"
    hub.add(f"{name}-public", {"a.txt": b"a"})
    hub.add(f"{name}-private", {"a.txt": b"a"}, private=True)
    upload = "api.upload_file, path_or_fileobj=b'b', path_in_repo='b.txt'"
    calls = [
        f"api.model_info, '{name}-public'",
        f"api.model_info, '{name}-private'",
        f"api.create_repo, '{name}-new'",
        f"{upload}, repo_id='{name}-public'",
        f"{upload}, repo_id='{name}-private'",
        f"{upload}, repo_id='{name}-public', create_pr=True",
    ]
    assert [ask(f"outcome({call}, token={token!r})") for call in calls] == expected
    assert (f"{name}-new" in hub.api.repositories) == (expected[2] == "done")
    assert ("b.txt" in hub.repository(f"{name}-private").files()) == (expected[4] == "done")


@pytest.mark.parametrize(
    ("where", "how", "settings", "expected"),
    [
        ("preupload", 404, {}, "RepositoryNotFoundError 404"),
        ("preupload", 503, {}, "done"),
        ("lfs_upload", "drop request", {"after_bytes": 1000}, "done"),
        ("commit", 412, {}, "HfHubHTTPError 412"),
        ("commit", "drop request", {"after_bytes": 10}, "TransportError"),
        ("commit", "drop answer", {}, "TransportError"),
        ("resolve_head", 403, {"code": "GatedRepo"}, "GatedRepoError 403"),
        ("resolve_head", "drop answer", {}, "TransportError"),
        ("lfs_download", "drop answer", {"after_bytes": 11_000_000}, "done"),
    ],
)
def test_faults_reach_the_client(client, where, how, settings, expected):
    hub, ask = client
    name = f"{where}-{how}.safetensors".replace(" ", "-")
    upload = f"api.upload_file, path_or_fileobj={name.encode() * 1000}, path_in_repo={name!r}, repo_id='user/weights'"
    call = upload if where in ("preupload", "lfs_upload", "commit") else f"download, {name!r}"
    before = len(hub.repository("user/weights").commits)
    hub.fail(where, how, **settings)
    assert ask(f"outcome({call})") == expected
    is_made = expected == "done" or (where, how) == ("commit", "drop answer")
    if call is upload:
        assert len(hub.repository("user/weights").commits) == before + is_made
    assert ask(f"outcome({call})") == "done"
    if call is upload:
        assert hub.repository("user/weights").files()[name] == name.encode() * 1000
    if where == "lfs_download":  # continues where it broke
        assert [each.status for each in hub.seen("lfs_download")][-2:] == [None, 206]


def test_killed_client_leaves_no_commit(hub, tmp_path):
    hub.add("user/model", {"a.txt": b"a"})
    before = hub.repository("user/model").refs.copy()
    hub.fail("commit", "stall", after_bytes=10)
    environment = hub.environment(tmp_path, WRITE_TOKEN)
    with subprocess.Popen([sys.executable, "-c", CLIENT], env=environment, stdin=subprocess.PIPE, text=True) as process:
        process.stdin.write("outcome(add, b'b')\n")
        process.stdin.flush()
        assert hub.stalled.wait(60)
        process.kill()
    assert hub.repository("user/model").refs == before


def test_unknown_fault_is_refused(hub):
    with pytest.raises(ValueError, match="no fault 'drop' for 'commit'"):
        hub.fail("commit", "drop")
    with pytest.raises(ValueError, match="no fault 500 for 'comit'"):
        hub.fail("comit", 500)
