"""A Hub for tests: it answers the real huggingface_hub client over HTTP, on this computer, from memory.

    with HubServer() as hub:  # or the fixture `hub`
        hub.add("user/model", {"config.json": b"{}"})  # or a folder, as a Path; "datasets/user/name" for a data set
        hub.run([sys.executable, "script.py"], home=tmp_path, token=WRITE_TOKEN)
        hub.repository("user/model").files("main")  # path -> bytes

huggingface_hub reads the Hub's address when it is imported, so calls belong into a subprocess. Uploads use git LFS.

WRITE_TOKEN and READ_TOKEN belong to `user`, who owns "user/…". STRANGER_TOKEN belongs to somebody else, who sees no
private repository and may only open pull requests. Without a token, public repositories can be read.

Requests fail on demand, by their names in `ROUTES`:

    hub.fail("commit", 500)  # the next commit is refused
    hub.fail("resolve", 404, code="EntryNotFound", path="config.json")  # only for that file
    hub.fail("lfs_upload", "drop request", after_bytes=1000)  # the connection breaks after 1000 bytes of the request
    hub.fail("commit", "drop answer")  # the commit is made, but the answer is lost, or breaks after `after_bytes`
    hub.fail("preupload", "stall", times=3)  # no answer; `hub.stalled` is set when such a request arrives
    hub.mend()  # removes all faults

The client repeats some requests up to five times after a status of 5xx or a broken connection.
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
# Token -> its user, and whether it may write.
ACCOUNTS = {WRITE_TOKEN: ("user", True), READ_TOKEN: ("user", False), STRANGER_TOKEN: ("stranger", True)}
LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pth")
MAIN = "refs/heads/main"
DATE = "2026-01-01T00:00:00.000Z"


class Refusal(Exception):
    """An HTTP status, a sentence, and a code that the client knows."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


# --- what is stored ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blob:
    """A file's content."""

    content: bytes
    is_lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def oid(self) -> str:
        """The id by which the client recognises the content."""
        if self.is_lfs:
            return self.sha256
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass(frozen=True)
class Commit:
    """A snapshot of all files."""

    files: Mapping[str, Blob]
    title: str
    parent: str | None = None

    @cached_property
    def id(self) -> str:
        files = sorted((path, blob.oid) for path, blob in self.files.items())
        return hashlib.sha1(json.dumps([self.parent, self.title, files]).encode()).hexdigest()


class Repository:
    """Commits, and references to them: branches (refs/heads/…), tags (refs/tags/…) and pull requests (refs/pr/…)."""

    def __init__(self, name: str, private: bool = False) -> None:
        self.owner = name.split("/")[-2] if "/" in name else ""
        self.private = private
        self.commits: list[Commit] = []
        self.refs: dict[str, str] = {}
        self.commit(MAIN, Commit({".gitattributes": Blob(" filter=lfs\n".join(LFS_PATTERNS).encode())}, "initial"))

    def find(self, revision: str = "main") -> Commit:
        """Return the commit that a branch, tag, full reference or id names."""
        names = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
        wanted = next((self.refs[name] for name in names if name in self.refs), revision)
        for commit in self.commits:
            if commit.id == wanted:
                return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: blob.content for path, blob in self.find(revision).files.items()}

    def history(self, revision: str = "main") -> list[Commit]:
        """Return the commits from the newest to the first."""
        commits = [self.find(revision)]
        while commits[-1].parent is not None:
            commits.append(self.find(commits[-1].parent))
        return commits

    def commit_target(self, revision: str) -> str:
        """Return the branch or pull request that a commit to `revision` moves."""
        for ref in (f"refs/heads/{revision}", revision):
            if ref in self.refs and not ref.startswith("refs/tags/"):
                return ref
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit(self, ref: str, commit: Commit) -> None:
        self.commits.append(commit)
        self.refs[ref] = commit.id

    def add_ref(self, ref: str, revision: str) -> None:
        """Add a branch or tag."""
        if ref in self.refs:
            raise Refusal(409, f"Reference already exists: {ref}")
        self.refs[ref] = self.find(revision).id


def is_lfs(path: str) -> bool:
    return any(fnmatch(Path(path).name, pattern) for pattern in LFS_PATTERNS)


# --- requests and answers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    method: str
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


def as_json(value: object, status: int = 200) -> Answer:
    return Answer(json.dumps(value).encode(), status, {"Content-Type": "application/json"})


def as_refusal(refusal: Refusal, headers: Mapping[str, str] | None = None) -> Answer:
    answer = as_json({"error": str(refusal)}, refusal.status)
    headers = {**answer.headers, **(headers or {}), "X-Error-Message": str(refusal)}
    if refusal.code:
        headers["X-Error-Code"] = refusal.code
    if refusal.status >= 500:
        headers["Retry-After"] = "0"  # else the client waits longer each time
    return Answer(answer.body, refusal.status, headers)


def as_content(request: Request, blob: Blob, headers: Mapping[str, str]) -> Answer:
    """Answer with the file, or with the part that the request's Range names."""
    headers = {**headers, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if not asked:
        return Answer(blob.content, headers=headers)
    size = len(blob.content)
    start, end = int(asked[1]), min(int(asked[2] or size - 1), size - 1)
    return Answer(blob.content[start : end + 1], 206, {**headers, "Content-Range": f"bytes {start}-{end}/{size}"})


# --- the API: a name for each request, and a method of that name ------------------------------------------------------

NAME = r"(?P<name>(?:datasets/)?[^/]+(?:/[^/]+)?)"
API = rf"/api/(?:models/|(?=datasets/)){NAME}"
REVISION = r"(?P<revision>[^/]+)"

ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", rf"{API}/preupload/{REVISION}", "preupload"),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<sha256>\w+)", "lfs_upload"),
    ("POST", rf"{API}/commit/{REVISION}", "commit"),
    ("POST", rf"{API}/branch/(?P<branch>[^/]+)", "branch"),
    ("GET", rf"{API}/tree/{REVISION}(?:/(?P<path>.*))?", "tree"),
    ("GET", rf"{API}(?:/revision/{REVISION})?", "info"),
    ("HEAD", rf"/{NAME}/resolve/{REVISION}/(?P<path>.+)", "resolve_head"),
    ("GET", rf"/{NAME}/resolve/{REVISION}/(?P<path>.+)", "resolve"),
    ("GET", r"/lfs/(?P<sha256>\w+)", "lfs_download"),
]


class Api:
    """Answers requests.

    Args:
        address: The server's address.
        lfs_address: Where LFS files are sent and fetched. Another host, as on the Hub, so that it gets no token.
    """

    def __init__(self, address: str, lfs_address: str) -> None:
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}  # by their SHA-256, committed or not
        self.address = address
        self.lfs_address = lfs_address

    def blob(self, path: str, content: bytes) -> Blob:
        blob = Blob(content, is_lfs(path))
        if blob.is_lfs:
            self.lfs[blob.sha256] = content
        return blob

    def lfs_blob(self, sha256: str) -> Blob:
        if sha256 not in self.lfs:
            raise Refusal(400, f"LFS object {sha256} was never uploaded.")
        return Blob(self.lfs[sha256], is_lfs=True)

    def edit(self, files: Mapping[str, Blob], operations: Iterable[Mapping[str, Any]]) -> dict[str, Blob]:
        """Return the files after the operations of a commit request."""
        edited = dict(files)
        for operation in operations:
            value, path = operation["value"], operation["value"]["path"]
            match operation["key"]:
                case "file":
                    edited[path] = Blob(base64.b64decode(value["content"]))
                case "lfsFile":
                    edited[path] = self.lfs_blob(value["oid"])
                case "deletedFile":
                    if edited.pop(path, None) is None:
                        raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
                case key:
                    raise Refusal(400, f"Unknown operation {key!r}.")
        return edited

    def whoami(self, request: Request) -> Answer:
        user, _ = self._account(request)
        return as_json({"type": "user", "name": user, "fullname": user, "orgs": [], "auth": {"type": "access_token"}})

    def create(self, request: Request) -> Answer:
        user, writes = self._account(request)
        asked = request.json()
        owner = asked.get("organization") or user
        name = f"{owner}/{asked['name']}"
        if not writes or owner != user:
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        about = {"url": f"{self.address}/{name}", "name": name}
        if name in self.repositories:
            return as_json({"error": "You already created this model repo", **about}, 409)
        self.repositories[name] = Repository(name, asked.get("visibility") == "private")
        return as_json(about)

    def validate_yaml(self, request: Request) -> Answer:
        try:
            ModelCard(request.json()["content"])
        except (ValueError, YAMLError) as error:
            return as_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        return as_json({"errors": [], "warnings": []})

    def preupload(self, request: Request, name: str, revision: str) -> Answer:
        there = self._writable(request, name).find(revision).files
        files = []
        for path in (file["path"] for file in request.json()["files"]):
            oid = there[path].oid if path in there else None
            mode = "lfs" if is_lfs(path) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return as_json({"files": files})

    def lfs_batch(self, request: Request, name: str) -> Answer:
        self._writable(request, name, as_guest=True)
        objects = []
        for file in request.json()["objects"]:
            actions = {"upload": {"href": f"{self.lfs_address}/lfs/{file['oid']}"}}
            objects.append(file if file["oid"] in self.lfs else {**file, "actions": actions})
        return as_json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, request: Request, sha256: str) -> Answer:
        if Blob(request.body).sha256 != sha256:
            raise Refusal(400, "The content does not have the announced SHA-256.")
        self.lfs[sha256] = request.body
        return Answer(headers={"ETag": f'"{sha256}"'})

    def commit(self, request: Request, name: str, revision: str) -> Answer:
        repository = self._writable(request, name)
        header, *operations = map(json.loads, request.body.splitlines())
        about = header["value"]
        expected = about.get("parentCommit")
        if request.query.get("create_pr"):
            number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
            ref, parent = f"refs/pr/{number}", repository.find(expected or revision)
        else:
            ref, parent = repository.commit_target(revision), repository.find(revision)
            if expected not in (None, parent.id):
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        commit = Commit(self.edit(parent.files, operations), about["summary"], parent.id)
        repository.commit(ref, commit)
        answer = {"success": True, "commitOid": commit.id, "commitUrl": f"{self.address}/{name}/commit/{commit.id}"}
        if ref.startswith("refs/pr/"):
            answer["pullRequestUrl"] = f"{self.address}/{name}/discussions/{ref.rpartition('/')[2]}"
        return as_json(answer)

    def branch(self, request: Request, name: str, branch: str) -> Answer:
        start = request.json().get("startingPoint", "main")
        self._writable(request, name).add_ref(f"refs/heads/{branch}", start)
        return as_json({})

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
                entries.append({"type": "file", "path": file, "oid": blob.oid, "size": len(blob.content)})
                if blob.is_lfs:
                    entries[-1]["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 100}
        return as_json(entries)

    def info(self, request: Request, name: str, revision: str | None) -> Answer:
        repository = self._readable(request, name)
        commit = repository.find(revision or "main")
        about = {"id": name.removeprefix("datasets/"), "author": repository.owner, "sha": commit.id}
        about |= {"private": repository.private, "gated": False, "disabled": False, "tags": []}
        about |= {"createdAt": DATE, "lastModified": DATE}
        return as_json({**about, "siblings": [{"rfilename": path} for path in commit.files]})

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
        headers |= {"X-Linked-Size": str(len(blob.content)), "X-Linked-ETag": f'"{blob.oid}"'}
        return Answer(b"", 302, {**headers, "Location": f"{self.lfs_address}/lfs/{blob.sha256}"})

    def lfs_download(self, request: Request, sha256: str) -> Answer:
        return as_content(request, self.lfs_blob(sha256), {})

    def _account(self, request: Request) -> tuple[str, bool]:
        if request.token not in ACCOUNTS:
            raise Refusal(401, "Invalid username or password.", None if request.token else "RepoNotFound")
        return ACCOUNTS[request.token]

    def _readable(self, request: Request, name: str) -> Repository:
        """The Hub answers alike for repositories that one may not see and those that do not exist."""
        user = self._account(request)[0] if request.token else None
        repository = self.repositories.get(name)
        if repository and (not repository.private or user == repository.owner):
            return repository
        raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")

    def _writable(self, request: Request, name: str, as_guest: bool = False) -> Repository:
        """Guests, who write to somebody else's public repository, may only do so for a pull request."""
        repository = self._readable(request, name)
        user, writes = self._account(request)
        if not writes:
            raise Refusal(403, "Forbidden: you must use a write token to upload to a repository.")
        if user != repository.owner and not (as_guest or request.query.get("create_pr")):
            raise Refusal(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repository


# --- the server -------------------------------------------------------------------------------------------------------


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of a kind, see the module's docstring."""

    where: str
    how: int | str
    times: int = 1
    after_bytes: int = 0
    path: str = ""
    code: str | None = None

    def refusal(self) -> Refusal:
        messages = {401: "Invalid credentials in Authorization header", 404: "Repository not found"}
        code = self.code or ("RepoNotFound" if self.how == 404 else None)
        return Refusal(int(self.how), messages.get(int(self.how), HTTPStatus(int(self.how)).phrase), code)


class HubServer:
    """A Hub at `hub.address` inside the `with` block; the module's docstring shows its use."""

    def __init__(self) -> None:
        self.stalled = threading.Event()
        self.closing = threading.Event()
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        port = self._server.server_address[1]
        self.address = f"http://127.0.0.1:{port}"
        self.api = Api(self.address, f"http://localhost:{port}")

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Return the environment of a subprocess that uses this Hub, with its cache in the folder `home`."""
        foreign = ("HF_", "HUGGING_FACE_", "HUGGINGFACE_", "TRANSFORMERS_")
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(foreign) and not name.lower().endswith("_proxy")
        }
        environment |= {"HF_ENDPOINT": self.address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
        environment |= {f"HF_HUB_DISABLE_{name}": "1" for name in ("XET", "TELEMETRY", "PROGRESS_BARS")}
        environment["NO_PROXY"] = "127.0.0.1,localhost"
        return environment | ({"HF_TOKEN": token} if token else {})

    def run(
        self, command: Sequence[str | Path], home: Path, token: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in that environment, and keep what it prints."""
        environment = self.environment(home, token)
        return subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=300)

    @contextmanager
    def conversation(self, code: str, home: Path, token: str | None = None) -> Iterator[Callable[[str], str]]:
        """Run Python code that answers lines with lines, so that several tests share one slow start."""
        command, pipe = [sys.executable, "-c", code], subprocess.PIPE
        environment = self.environment(home, token)
        with subprocess.Popen(command, env=environment, cwd=home, stdin=pipe, stdout=pipe, text=True) as process:

            def ask(line: str) -> str:
                process.stdin.write(f"{line}\n")
                process.stdin.flush()
                return process.stdout.readline().strip()

            yield ask

    def repository(self, name: str) -> Repository:
        return self.api.repositories[name]

    def add(self, name: str, files: Mapping[str, bytes] | Path, private: bool = False) -> Commit:
        """Commit files, or those in a folder, to the main branch of a new or existing repository."""
        if isinstance(files, Path):
            paths = sorted(path for path in files.rglob("*") if path.is_file())
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in paths}
        with self._lock:
            repository = self.api.repositories.setdefault(name, Repository(name, private))
            parent = repository.find()
            blobs = {path: self.api.blob(path, content) for path, content in files.items()}
            commit = Commit({**parent.files, **blobs}, "Add files", parent.id)
            repository.commit(MAIN, commit)
        return commit

    def fail(self, where: str, how: int | str, **settings: Any) -> None:
        """Let the next requests fail; `settings` are those of [`Fault`]."""
        known = isinstance(how, int) or how in ("drop request", "drop answer", "stall")
        if not known or where not in {name for _, _, name in ROUTES}:
            raise ValueError(f"There is no fault {how!r} for {where!r}.")
        with self._lock:
            self._faults.append(Fault(where, how, **settings))

    def mend(self) -> None:
        """Remove all faults."""
        with self._lock:
            self._faults.clear()

    def take_fault(self, where: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.times > 0 and fault.where == where and fault.path in path:
                    fault.times -= 1
                    return fault
        return None

    def answer(self, where: str, request: Request, parts: Mapping[str, str | None]) -> Answer:
        """Answer one request at a time, so that each sees whole commits."""
        with self._lock:
            try:
                return getattr(self.api, where)(request, **parts)
            except Refusal as refusal:
                return as_refusal(refusal)


class _Handler(BaseHTTPRequestHandler):
    """Reads requests, lets the hub answer or fail, and writes the answers."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        with suppress(ConnectionError):  # the client has gone, or is to believe that the Hub has
            self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        where, parts = self._route(url.path)
        fault = self.hub.take_fault(where, url.path)
        if fault and fault.how in ("drop request", "stall"):
            self.rfile.read(fault.after_bytes)
            if fault.how == "stall":
                self.hub.stalled.set()
                self.hub.closing.wait()
            self._drop()
        request = Request(self.command, query, self.headers, self._body())
        if where == "unknown":
            answer = as_refusal(Refusal(404, f"This Hub knows no {self.command} {url.path}."))
        elif fault and fault.how != "drop answer":
            answer = as_refusal(fault.refusal())
        else:
            answer = self.hub.answer(where, request, parts)
        if fault and fault.how == "drop answer":
            if fault.after_bytes:
                self._send(answer, fault.after_bytes)
            self._drop()
        self._send(answer)

    def _route(self, path: str) -> tuple[str, dict[str, str | None]]:
        for method, pattern, where in ROUTES:
            found = re.fullmatch(pattern, path) if method == self.command else None
            if found:
                return where, {name: value and unquote(value) for name, value in found.groupdict().items()}
        return "unknown", {}

    def _body(self) -> bytes:
        size = int(self.headers.get("Content-Length", 0))
        data = self.rfile.read(size)
        if len(data) < size or "Transfer-Encoding" in self.headers:
            raise ConnectionAbortedError("The client has gone in the middle of a request.")
        return data

    def _send(self, answer: Answer, size: int | None = None) -> None:
        """Write the answer, or only the first `size` bytes of its body."""
        headers = {**answer.headers, "Content-Length": str(len(answer.body))}
        head = [f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}", *map(": ".join, headers.items())]
        body = b"" if self.command == "HEAD" else answer.body[:size]
        self.wfile.write("\r\n".join([*head, "", ""]).encode() + body)

    def _drop(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        raise ConnectionAbortedError("The connection is dropped on purpose.")

    def log_message(self, format: str, *values: object) -> None:
        """Print nothing."""
