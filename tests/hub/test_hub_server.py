"""The Hub of the tests behaves for the real client as the tests of publishing and loading assume."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.hub_server import WRITE_TOKEN, HubServer

# Answers lines of Python, which may use `api` and `outcome`, with lines of JSON.
CLIENT = """
import json, sys, time
from huggingface_hub import CommitOperationAdd, HfApi
time.sleep = lambda seconds: None  # between the client's tries
api = HfApi()

def outcome(call, *arguments, **settings):
    try:
        call(*arguments, **settings)
    except Exception as error:
        response = getattr(error, "response", None)
        return type(error).__name__ + (f" {response.status_code}" if response is not None else "")
    return "done"

def add(content, path="a.txt", name="user/model", **where):
    return api.create_commit(name, [CommitOperationAdd(path, content)], commit_message="a", **where)

def read(revision):
    return open(api.hf_hub_download("user/model", "a.txt", revision=revision)).read()

for line in sys.stdin:
    print(json.dumps(eval(line)), flush=True)
"""


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Iterator[tuple[HubServer, Callable[[str], object]]]:
    home = tmp_path_factory.mktemp("client")
    with HubServer() as hub, hub.conversation(CLIENT, home, WRITE_TOKEN) as ask:
        yield hub, lambda code: json.loads(ask(code))


def test_folder_is_uploaded_and_downloaded(client, tmp_path):
    hub, ask = client
    files = {
        "README.md": b"---\nlicense: mit\n---\n",
        "code/a b.py": b"x = 1\n",
        "model.safetensors": bytes(range(256)) * 8000,
    }
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


def test_unknown_fault_is_refused(hub):
    with pytest.raises(ValueError, match="no fault 'drop' for 'commit'"):
        hub.fail("commit", "drop")
    with pytest.raises(ValueError, match="no fault 500 for 'comit'"):
        hub.fail("comit", 500)
