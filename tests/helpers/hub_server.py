"""A Hub for tests: it answers the real huggingface_hub client over HTTP, on this computer, from memory.

    with HubServer() as hub:  # or the fixture `hub`
        hub.add("user/model", {"config.json": b"{}"})  # or a folder, as a Path
        hub.run([sys.executable, "script.py"], home=tmp_path, token=WRITE_TOKEN)  # or Popen with hub.environment(...)
        hub.repository("user/model").files("main")  # what is there now: path -> bytes; each revision is one snapshot

huggingface_hub reads its endpoint when it is imported, so its calls belong in a subprocess of their own.
Uploads go through git LFS, not Xet. Data sets are named as in their address, "datasets/user/name".

Who asks is told by the token. `user` owns "user/…", with WRITE_TOKEN or, only to read, READ_TOKEN. STRANGER_TOKEN is of
somebody else, who sees no private repository and may only open pull requests. Without a token, public ones can be read.

Things go wrong on demand, by the name that a request has in `ROUTES`:

    hub.fail("commit", 500)  # the next commit is answered so, and not done
    hub.fail("resolve", 404, code="EntryNotFound", path="config.json")  # only for that file
    hub.fail("lfs_upload", "drop request", after_bytes=1000)  # the connection breaks when so much has arrived
    hub.fail("commit", "drop answer")  # done, but nobody hears of it; after_bytes=N: breaks in the answer's body
    hub.fail("preupload", "stall", times=3)  # no answer; hub.stalled is set when a request has come to that
    hub.mend()  # all is well again

The client repeats some requests by itself, up to five times: preupload, lfs_batch, lfs_upload, lfs_verify, resolve_head
and lists a second later after a status of 5xx, and 1, 2, 4, 8, 8 seconds later after a broken connection (which ends
resolve_head at once). A broken download goes on after what is stored already, 10 MB at a time.
"""

import base64
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import ModelCard
from yaml import YAMLError

WRITE_TOKEN, READ_TOKEN, STRANGER_TOKEN = "hf_write", "hf_read", "hf_stranger"
LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.onnx", "*.parquet", "*.tar.gz", "*.zip")
LFS_SIZE = 10 * 2**20  # bytes from which on any file is an LFS file
MAIN = "refs/heads/main"


class Refusal(Exception):
    """What the Hub says no with: an HTTP status, a sentence, and a code that the client knows."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


# What is stored.


@dataclass(frozen=True)
class Blob:
    """A file's content."""

    content: bytes
    is_lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        """What git keeps in place of an LFS file."""
        size = len(self.content)
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {size}\n".encode()

    @cached_property
    def git_id(self) -> str:
        data = self.pointer if self.is_lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def etag(self) -> str:
        """By which the client knows the content again."""
        return self.sha256 if self.is_lfs else self.git_id


@dataclass(frozen=True)
class Commit:
    """A snapshot of all files; its id follows from them, its message and the commit before."""

    files: Mapping[str, Blob]
    title: str
    message: str = ""
    parent: str | None = None
    date: datetime = field(default_factory=lambda: datetime.now(UTC))

    @cached_property
    def id(self) -> str:
        files = sorted((path, blob.git_id) for path, blob in self.files.items())
        return hashlib.sha1(json.dumps([self.parent, self.title, self.message, files]).encode()).hexdigest()


class Repository:
    """Commits, and the references to them: branches (refs/heads/…), tags (refs/tags/…), pull requests (refs/pr/…)."""

    def __init__(self, name: str, private: bool = False) -> None:
        self.name = name
        self.private = private
        self.commits: list[Commit] = []
        self.refs: dict[str, str] = {}
        rules = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)
        self.commit(MAIN, Commit({".gitattributes": Blob(rules.encode())}, "initial commit"))

    @property
    def owner(self) -> str:
        return owner(self.name)

    def find(self, revision: str = "main") -> Commit:
        """The commit that a branch, tag, full reference or id means."""
        names = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
        wanted = next((self.refs[name] for name in names if name in self.refs), revision)
        for commit in self.commits:
            if commit.id == wanted:
                return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: blob.content for path, blob in self.find(revision).files.items()}

    def history(self, revision: str = "main") -> list[Commit]:
        """From the newest to the first."""
        commits = [self.find(revision)]
        while commits[-1].parent is not None:
            commits.append(self.find(commits[-1].parent))
        return commits

    def commit_target(self, revision: str) -> str:
        """The reference that a commit to `revision` moves: a branch or a pull request."""
        for ref in (f"refs/heads/{revision}", revision):
            if ref in self.refs and not ref.startswith("refs/tags/"):
                return ref
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def new_pull_request(self) -> str:
        return f"refs/pr/{1 + sum(ref.startswith('refs/pr/') for ref in self.refs)}"

    def commit(self, ref: str, commit: Commit) -> None:
        self.commits.append(commit)
        self.refs[ref] = commit.id

    def name_commit(self, ref: str, revision: str) -> None:
        """Make a branch or tag."""
        if ref in self.refs:
            raise Refusal(409, f"Reference already exists: {ref}")
        self.refs[ref] = self.find(revision).id


class Storage:
    """All repositories by name, and the content of LFS files by their SHA-256, committed or not."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}

    def create(self, name: str, private: bool = False) -> Repository:
        return self.repositories.setdefault(name, Repository(name, private))

    def blob(self, path: str, content: bytes) -> Blob:
        blob = Blob(content, is_lfs(path, len(content)))
        if blob.is_lfs:
            self.lfs[blob.sha256] = content
        return blob

    def lfs_blob(self, sha256: str) -> Blob:
        if sha256 not in self.lfs:
            raise Refusal(400, f"LFS object {sha256} was never uploaded.")
        return Blob(self.lfs[sha256], is_lfs=True)

    def edited(self, files: Mapping[str, Blob], operations: Iterable[Mapping[str, Any]]) -> dict[str, Blob]:
        """The files after the operations of a commit request."""
        edited = dict(files)
        for operation in operations:
            value = operation["value"]
            path = value["path"]
            match operation["key"]:
                case "file":
                    edited[path] = Blob(base64.b64decode(value["content"]))
                case "lfsFile":
                    edited[path] = self.lfs_blob(value["oid"])
                case "deletedFile" | "deletedFolder" as key:
                    gone = [name for name in edited if name == path or name.startswith(path.rstrip("/") + "/")]
                    if not gone or (key == "deletedFile" and path not in gone):
                        raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
                    for name in gone:
                        del edited[name]
                case key:
                    raise Refusal(400, f"Unknown operation {key!r}.")
        return edited


def owner(name: str) -> str:
    """Of a repository: the user before the last slash."""
    return name.split("/")[-2] if "/" in name else ""


def is_lfs(path: str, size: int) -> bool:
    return size >= LFS_SIZE or any(fnmatch(Path(path).name, pattern) for pattern in LFS_PATTERNS)


def card_metadata(readme: str) -> dict[str, Any]:
    """What stands between the dashes at the top of a README.md. ValueError or YAMLError: it is no valid metadata."""
    return ModelCard(readme).data.to_dict()


# What is asked, and what is answered.


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes

    @property
    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")


@dataclass(frozen=True)
class Answer:
    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Exchange:
    """A line of the log. The status is None where the connection was dropped."""

    where: str
    method: str
    path: str
    token: str | None
    status: int | None


def as_json(value: object, status: int = 200) -> Answer:
    return Answer(json.dumps(value).encode(), status, {"Content-Type": "application/json"})


def as_refusal(refusal: Refusal, headers: Mapping[str, str] | None = None) -> Answer:
    answer = as_json({"error": str(refusal)}, refusal.status)
    headers = {**answer.headers, **(headers or {}), "X-Error-Message": str(refusal)}
    if refusal.code:
        headers["X-Error-Code"] = refusal.code
    if refusal.status >= 500:
        headers["Retry-After"] = "0"  # the client waits a second instead of longer and longer
    return Answer(answer.body, refusal.status, headers)


def as_content(request: Request, blob: Blob, headers: Mapping[str, str]) -> Answer:
    """The file, or the part of it that the request's Range names."""
    headers = {**headers, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if not asked:
        return Answer(blob.content, headers=headers)
    size = len(blob.content)
    start, end = int(asked[1]), min(int(asked[2] or size - 1), size - 1)
    if start > end:
        return Answer(b"", 416, {"Content-Range": f"bytes */{size}"})
    return Answer(blob.content[start : end + 1], 206, {**headers, "Content-Range": f"bytes {start}-{end}/{size}"})


def as_entry(path: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "oid": blob.git_id, "size": len(blob.content)}
    if blob.is_lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": len(blob.pointer)}
    return entry


def as_time(date: datetime) -> str:
    return date.strftime("%Y-%m-%dT%H:%M:%S.000Z")


# The API: a name for each request, and a method of that name.

NAME = r"(?P<name>(?:(?:datasets|spaces)/)?[^/]+(?:/[^/]+)?)"
API = rf"/api/(?:models/|(?=datasets/|spaces/)){NAME}"
REVISION = r"(?P<revision>[^/]+)"

ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("DELETE", r"/api/repos/delete", "delete"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", rf"{API}/preupload/{REVISION}", "preupload"),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<sha256>\w+)", "lfs_upload"),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/verify", "lfs_verify"),
    ("POST", rf"{API}/commit/{REVISION}", "commit"),
    ("POST", rf"{API}/branch/(?P<branch>[^/]+)", "branch"),
    ("POST", rf"{API}/tag/{REVISION}", "tag"),
    ("GET", rf"{API}/refs", "refs"),
    ("GET", rf"{API}/commits/{REVISION}", "commits"),
    ("GET", rf"{API}/tree/{REVISION}(?:/(?P<path>.*))?", "tree"),
    ("POST", rf"{API}/paths-info/{REVISION}", "paths_info"),
    ("GET", rf"{API}(?:/revision/{REVISION})?", "info"),
    ("HEAD", rf"/{NAME}/resolve/{REVISION}/(?P<path>.+)", "resolve_head"),
    ("GET", rf"/{NAME}/resolve/{REVISION}/(?P<path>.+)", "resolve"),
    ("GET", r"/lfs/(?P<sha256>\w+)", "lfs_download"),
]
ENDPOINTS = {where for _, _, where in ROUTES}


@dataclass(frozen=True)
class Account:
    user: str
    writes: bool


ACCOUNTS = {
    WRITE_TOKEN: Account("user", writes=True),
    READ_TOKEN: Account("user", writes=False),
    STRANGER_TOKEN: Account("stranger", writes=True),
}


class Api:
    """Answers requests from the storage.

    Args:
        storage: What there is, and changes.
        address: The server's own, in answers.
        lfs_address: Where LFS files are sent and fetched; another host, as on the Hub, so that no token goes there.
    """

    def __init__(self, storage: Storage, address: str, lfs_address: str) -> None:
        self.storage = storage
        self.address = address
        self.lfs_address = lfs_address

    def whoami(self, request: Request) -> Answer:
        account = self._account(request)
        if account is None:
            raise Refusal(401, "Invalid username or password.")
        token = {"displayName": "test", "role": "write" if account.writes else "read"}
        auth = {"type": "access_token", "accessToken": token}
        return as_json({"type": "user", "name": account.user, "fullname": account.user, "orgs": [], "auth": auth})

    def create(self, request: Request) -> Answer:
        account = self._account(request)
        if account is None:
            raise Refusal(401, "Invalid username or password.")
        asked = request.json()
        name = self._asked_name(asked, account)
        if not account.writes or owner(name) != account.user:
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{owner(name)}"')
        about = {"url": f"{self.address}/{name}", "name": name}
        if name in self.storage.repositories:
            return as_json({"error": "You already created this model repo", **about}, 409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.storage.create(name, private)
        return as_json(about)

    def delete(self, request: Request) -> Answer:
        asked = request.json()
        account = self._account(request)
        repository = self._writable(request, self._asked_name(asked, account) if account else asked["name"])
        del self.storage.repositories[repository.name]
        return Answer()

    def validate_yaml(self, request: Request) -> Answer:
        try:
            metadata = card_metadata(request.json()["content"])
        except (ValueError, YAMLError) as error:
            return as_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        return as_json({"errors": [], "warnings": warnings})

    def preupload(self, request: Request, name: str, revision: str) -> Answer:
        repository = self._writable(request, name)
        there = repository.find(revision).files
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if is_lfs(file["path"], file["size"]) else "regular",
                "shouldIgnore": False,
                "oid": there[file["path"]].etag if file["path"] in there else None,
            }
            for file in request.json()["files"]
        ]
        return as_json({"files": files})

    def lfs_batch(self, request: Request, name: str) -> Answer:
        self._writable(request, name, as_guest=True)
        verify = {"href": f"{self.address}/{name}.git/info/lfs/objects/verify"}
        objects = []
        for file in request.json()["objects"]:
            missing = file["oid"] not in self.storage.lfs
            actions = {"upload": {"href": f"{self.lfs_address}/lfs/{file['oid']}"}, "verify": verify}
            objects.append({**file, "actions": actions} if missing else file)
        return as_json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, request: Request, sha256: str) -> Answer:
        blob = Blob(request.body, is_lfs=True)
        if blob.sha256 != sha256:
            raise Refusal(400, "The content does not have the announced SHA-256.")
        self.storage.lfs[sha256] = request.body
        return Answer(headers={"ETag": f'"{sha256}"'})

    def lfs_verify(self, request: Request, name: str) -> Answer:
        self._writable(request, name, as_guest=True)
        asked = request.json()
        if len(self.storage.lfs_blob(asked["oid"]).content) != asked["size"]:
            raise Refusal(400, "The object has another size.")
        return as_json({})

    def commit(self, request: Request, name: str, revision: str) -> Answer:
        repository = self._writable(request, name)
        header, *operations = map(json.loads, request.body.splitlines())
        about = header["value"]
        expected = about.get("parentCommit")
        if request.query.get("create_pr"):
            ref, parent = repository.new_pull_request(), repository.find(expected or revision)
        else:
            ref, parent = repository.commit_target(revision), repository.find(revision)
            if expected not in (None, parent.id):
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = self.storage.edited(parent.files, operations)
        commit = Commit(files, about["summary"], about.get("description", ""), parent.id)
        repository.commit(ref, commit)
        answer = {"success": True, "commitOid": commit.id, "commitUrl": f"{self.address}/{name}/commit/{commit.id}"}
        if ref.startswith("refs/pr/"):
            answer["pullRequestUrl"] = f"{self.address}/{name}/discussions/{ref.rpartition('/')[2]}"
        return as_json(answer)

    def branch(self, request: Request, name: str, branch: str) -> Answer:
        start = request.json().get("startingPoint", "main")
        self._writable(request, name).name_commit(f"refs/heads/{branch}", start)
        return as_json({})

    def tag(self, request: Request, name: str, revision: str) -> Answer:
        self._writable(request, name).name_commit(f"refs/tags/{request.json()['tag']}", revision)
        return as_json({})

    def refs(self, request: Request, name: str) -> Answer:
        repository = self._readable(request, name)

        def below(start: str) -> list[dict[str, str]]:
            refs = [(ref, commit) for ref, commit in repository.refs.items() if ref.startswith(start)]
            return [{"name": ref.removeprefix(start), "ref": ref, "targetCommit": commit} for ref, commit in refs]

        kinds = {"branches": "heads", "tags": "tags", "pullRequests": "pr", "converts": "convert"}
        return as_json({kind: below(f"refs/{part}/") for kind, part in kinds.items()})

    def commits(self, request: Request, name: str, revision: str) -> Answer:
        repository = self._readable(request, name)
        return as_json(
            [
                {
                    "id": commit.id,
                    "title": commit.title,
                    "message": commit.message,
                    "authors": [{"user": repository.owner}],
                    "date": as_time(commit.date),
                }
                for commit in repository.history(revision)
            ]
        )

    def tree(self, request: Request, name: str, revision: str, path: str | None) -> Answer:
        files = self._readable(request, name).find(revision).files
        folder = f"{path.rstrip('/')}/" if path else ""
        inside = {file: blob for file, blob in files.items() if file.startswith(folder)}
        if folder and not inside:
            raise Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound")
        below = [file.removeprefix(folder).split("/")[:-1] for file in inside]
        recursive = request.query.get("recursive", "").lower() == "true"
        deepest = None if recursive else 1
        folders = {folder + "/".join(parts[:depth]) for parts in below for depth in range(1, len(parts[:deepest]) + 1)}
        entries = [{"type": "directory", "path": each, "oid": "0" * 40, "size": 0} for each in sorted(folders)]
        for file, blob in inside.items():
            if recursive or "/" not in file.removeprefix(folder):
                entries.append(as_entry(file, blob))
        return as_json(entries)

    def paths_info(self, request: Request, name: str, revision: str) -> Answer:
        files = self._readable(request, name).find(revision).files
        paths = parse_qs(request.body.decode()).get("paths", [])
        return as_json([as_entry(path, files[path]) for path in paths if path in files])

    def info(self, request: Request, name: str, revision: str | None) -> Answer:
        repository = self._readable(request, name)
        commit = repository.find(revision or "main")
        about: dict[str, Any] = {
            "id": name.removeprefix("datasets/").removeprefix("spaces/"),
            "author": repository.owner,
            "sha": commit.id,
            "private": repository.private,
            "gated": False,
            "disabled": False,
            "createdAt": as_time(repository.commits[0].date),
            "lastModified": as_time(commit.date),
            "siblings": [{"rfilename": path} for path in commit.files],
            "tags": [],
        }
        with suppress(KeyError, ValueError, YAMLError):
            card = card_metadata(commit.files["README.md"].content.decode())
            about["cardData"] = card
            about |= {key: card[key] for key in ("tags", "pipeline_tag", "library_name", "model-index") if key in card}
        return as_json(about)

    def resolve_head(self, request: Request, name: str, revision: str, path: str) -> Answer:
        return self.resolve(request, name, revision, path)

    def resolve(self, request: Request, name: str, revision: str, path: str) -> Answer:
        commit = self._readable(request, name).find(revision)
        headers = {"X-Repo-Commit": commit.id}
        blob = commit.files.get(path)
        if blob is None:
            return as_refusal(Refusal(404, "Entry not found", "EntryNotFound"), headers)
        if not blob.is_lfs:
            return as_content(request, blob, headers)
        headers |= {"X-Linked-Size": str(len(blob.content)), "X-Linked-ETag": f'"{blob.etag}"'}
        return Answer(b"", 302, {**headers, "Location": f"{self.lfs_address}/lfs/{blob.sha256}"})

    def lfs_download(self, request: Request, sha256: str) -> Answer:
        return as_content(request, self.storage.lfs_blob(sha256), {})

    def _account(self, request: Request) -> Account | None:
        if request.token is not None and request.token not in ACCOUNTS:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return ACCOUNTS.get(request.token or "")

    def _asked_name(self, asked: Mapping[str, Any], account: Account) -> str:
        kind = asked.get("type") or "model"
        name = f"{asked.get('organization') or account.user}/{asked['name']}"
        return name if kind == "model" else f"{kind}s/{name}"

    def _readable(self, request: Request, name: str) -> Repository:
        """The Hub does not tell a repository that one may not see from one that does not exist.

        Without a token it is a 401, which the client takes for "not found" anyway over https, over http by its code.
        """
        account = self._account(request)
        repository = self.storage.repositories.get(name)
        if repository and (not repository.private or (account and account.user == repository.owner)):
            return repository
        if account is None:
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        raise Refusal(404, "Repository not found", "RepoNotFound")

    def _writable(self, request: Request, name: str, as_guest: bool = False) -> Repository:
        """Guests, who write to somebody else's public repository, may only do so for a pull request."""
        repository = self._readable(request, name)
        account = self._account(request)
        if account is None:
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        if not account.writes:
            raise Refusal(403, "Forbidden: you must use a write token to upload to a repository.")
        if account.user != repository.owner and not (as_guest or request.query.get("create_pr")):
            raise Refusal(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repository


# The server.

BREAKS = ("drop request", "drop answer", "stall")


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of a kind: see the module's text."""

    where: str
    how: int | str
    times: int
    after_bytes: int
    path: str
    code: str | None

    def refusal(self) -> Refusal:
        messages = {401: "Invalid credentials in Authorization header", 404: "Repository not found"}
        code = self.code or ("RepoNotFound" if self.how == 404 else None)
        return Refusal(int(self.how), messages.get(int(self.how), HTTPStatus(int(self.how)).phrase), code)


class HubServer:
    """A Hub at `hub.address` while the `with` block lasts. How to use it stands at the top of this module.

    Args:
        requests: The log, `Exchange` by `Exchange`, in the order of the answers.
        stalled: Set when a request has come to a "stall".
    """

    def __init__(self) -> None:
        self.storage = Storage()
        self.requests: list[Exchange] = []
        self.stalled = threading.Event()
        self._closing = threading.Event()
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        port = self._server.server_address[1]
        self.address = f"http://127.0.0.1:{port}"
        self._api = Api(self.storage, self.address, f"http://localhost:{port}")

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """For a subprocess that uses this Hub, with its cache in the folder `home`, and nothing of the caller's."""
        foreign = ("HF_", "HUGGING_FACE_", "HUGGINGFACE_", "TRANSFORMERS_")
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(foreign) and not name.lower().endswith("_proxy")
        }
        environment |= {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        return environment | ({"HF_TOKEN": token} if token else {})

    def run(
        self, command: Sequence[str | Path], home: Path, token: str | None = None, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end in that environment, and keep what it prints."""
        environment = self.environment(home, token)
        return subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=timeout)

    @contextmanager
    def conversation(self, code: str, home: Path, token: str | None = None) -> Iterator[Callable[[str], str]]:
        """Run Python code that answers lines with lines, and ask it; so that several tests share one slow start."""
        with subprocess.Popen(
            [sys.executable, "-c", code],
            env=self.environment(home, token),
            cwd=home,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        ) as process:

            def ask(line: str) -> str:
                process.stdin.write(f"{line}\n")
                return process.stdout.readline().strip()

            yield ask

    def repository(self, name: str) -> Repository:
        """KeyError: there is none of this name."""
        return self.storage.repositories[name]

    def add(self, name: str, files: Mapping[str, bytes] | Path, private: bool = False) -> Commit:
        """Commit files, or those in a folder, to the main branch of a repository, which is made if missing."""
        if isinstance(files, Path):
            paths = sorted(path for path in files.rglob("*") if path.is_file())
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in paths}
        with self._lock:
            repository = self.storage.create(name, private)
            parent = repository.find()
            blobs = {path: self.storage.blob(path, content) for path, content in files.items()}
            commit = Commit({**parent.files, **blobs}, "Add files", parent=parent.id)
            repository.commit(MAIN, commit)
        return commit

    def fail(
        self,
        where: str,
        how: int | str,
        times: int = 1,
        after_bytes: int = 0,
        path: str = "",
        code: str | None = None,
    ) -> None:
        """Let the next requests of a kind go wrong.

        Args:
            where: Which, by the name in `ROUTES`.
            how: An HTTP status, "drop request", "drop answer" or "stall".
            times: How many.
            after_bytes: Of the request's or the answer's body, when the connection is to break within it.
            path: Only requests whose address contains this.
            code: The Hub's error code for a status, such as "EntryNotFound" or "GatedRepo".
        """
        if where not in ENDPOINTS or not (isinstance(how, int) or how in BREAKS):
            raise ValueError(f"There is no fault {how!r} for {where!r}.")
        with self._lock:
            self._faults.append(Fault(where, how, times, after_bytes, path, code))

    def mend(self) -> None:
        """Let nothing go wrong any more."""
        with self._lock:
            self._faults.clear()

    def seen(self, where: str) -> list[Exchange]:
        """The requests of a kind."""
        return [exchange for exchange in self.requests if exchange.where == where]

    def _take_fault(self, where: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.times > 0 and fault.where == where and fault.path in path:
                    fault.times -= 1
                    return fault
        return None

    def _answer(self, where: str, request: Request, parts: Mapping[str, str | None]) -> Answer:
        """One request at a time: each sees and leaves whole commits."""
        with self._lock:
            try:
                return getattr(self._api, where)(request, **parts)
            except Refusal as refusal:
                return as_refusal(refusal)


class _Handler(BaseHTTPRequestHandler):
    """Reads requests, lets the hub answer or fail, and writes the answers."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        with suppress(ConnectionError):  # the client has gone, or is to think that the Hub has
            self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _serve(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        where, parts = self._route(url.path)
        fault = self.hub._take_fault(where, url.path)

        def log(status: int | None) -> None:
            request = Request(self.command, url.path, query, self.headers, b"")
            self.hub.requests.append(Exchange(where, self.command, url.path, request.token, status))

        if fault and fault.how in ("drop request", "stall"):
            self.rfile.read(fault.after_bytes)
            log(None)
            if fault.how == "stall":
                self.hub.stalled.set()
                self.hub._closing.wait()
            self._drop()

        request = Request(self.command, url.path, query, self.headers, self._body())
        if where == "unknown":
            answer = as_refusal(Refusal(404, f"This Hub knows no {self.command} {url.path}."))
        elif fault and fault.how != "drop answer":
            answer = as_refusal(fault.refusal())
        else:
            answer = self.hub._answer(where, request, parts)
        if fault and fault.how == "drop answer":
            log(None)
            if fault.after_bytes:
                self._send(answer, fault.after_bytes)
            self._drop()
        log(answer.status)
        self._send(answer)

    def _route(self, path: str) -> tuple[str, dict[str, str | None]]:
        for method, pattern, where in ROUTES:
            found = re.fullmatch(pattern, path) if method == self.command else None
            if found:
                return where, {name: value and unquote(value) for name, value in found.groupdict().items()}
        return "unknown", {}

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self._line(), 16):
                chunks.append(self._read(size))
                self._line()
            self._line()
            return b"".join(chunks)
        return self._read(int(self.headers.get("Content-Length", 0)))

    def _line(self) -> bytes:
        line = self.rfile.readline()
        if not line.endswith(b"\n"):
            raise ConnectionAbortedError("The client has gone in the middle of a request.")
        return line.strip()

    def _read(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) < size:
            raise ConnectionAbortedError("The client has gone in the middle of a request.")
        return data

    def _send(self, answer: Answer, size: int | None = None) -> None:
        """Write the answer, or only the first `size` bytes of its body."""
        head = [f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}"]
        headers = {**answer.headers, "Content-Length": str(len(answer.body))}
        head += [f"{name}: {value}" for name, value in headers.items()]
        body = b"" if self.command == "HEAD" else answer.body[:size]
        self.wfile.write("\r\n".join([*head, "", ""]).encode() + body)

    def _drop(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        raise ConnectionAbortedError("The connection is dropped as asked for.")

    def log_message(self, format: str, *values: object) -> None:
        """The log is `hub.requests`."""
