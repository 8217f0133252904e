"""A model's repository on the Hugging Face Hub."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RevisionNotFoundError

from dart_hf.hub_errors import http_cause, hub_reason

# Files that belong to one set of weights. Those of other weights are deleted in the commit of a model.
WEIGHTS_FILES = re.compile(
    r"(model|pytorch_model)(\.\w+)?(-\d+-of-\d+)?\.(safetensors|bin)(\.index(\.\w+)?\.json)?|"
    r"(pre)?processor_config\.json|(training|evaluation|distillation)\.json"
)
NOTHING = "Nothing was published."
REPEATABLE = "running this again makes it only if it is missing."


class PublishingError(OSError):
    """The Hub did not accept a model, or did not give back what was published."""


class Repository:
    """A repository on the Hub, and the branch or pull request to publish to.

    After `open`, `parent` is the commit that the publication replaces, and `files` has the names of its files.
    """

    def __init__(self, repo_id: str, revision: str | None, create_pr: bool, token: str) -> None:
        self.repo_id = repo_id
        self.revision = revision or "main"
        self.create_pr = create_pr
        self.api = HfApi(token=token)
        self.is_private = False
        self.needs_branch = False
        self.parent: str | None = None
        self.files: set[str] = set()
        # What an error message says about the state of the repository before the commit.
        self.state = NOTHING

    @property
    def url(self) -> str:
        page = f"{self.api.endpoint}/{self.repo_id}"
        return page if self.revision == "main" else f"{page}/tree/{self.revision}"

    def open(self, private: bool | None) -> None:
        """Find out what the repository holds; create it if it is missing and no pull request is meant.

        Raises:
            ValueError: The repository is public, but `private` is True.
            PublishingError: The Hub refuses, or there is no such repository, branch or pull request.
        """
        is_pull_request = self.create_pr or self.revision.startswith("refs/")
        with self.explain_errors():
            if "/" not in self.repo_id:
                self.repo_id = f"{self.api.whoami()['name']}/{self.repo_id}"
            if not is_pull_request:
                self.api.create_repo(self.repo_id, private=private, exist_ok=True)
            try:
                head = self.api.model_info(self.repo_id, revision=self.revision)
            except RevisionNotFoundError:
                if is_pull_request:
                    raise
                # A new branch starts with the files of the main branch.
                head, self.needs_branch = self.api.model_info(self.repo_id), True
        if private and not head.private:
            raise ValueError(
                f"{self.repo_id!r} is a public repository, and private makes only new repositories private; make it "
                f"private in its settings, or give another name. {NOTHING}"
            )
        self.is_private, self.parent = bool(head.private), head.sha
        self.files = {file.rfilename for file in head.siblings or []}
        if self.files <= {".gitattributes"}:
            self.state = f"{NOTHING} The repository is empty."

    def refuse_other_models(self, model_type: str, folder: Path) -> None:
        """Raise a ValueError if the repository holds a model of another type: its files would stay beside the new ones.

        Args:
            model_type: The type that may be replaced.
            folder: Folder to download to.
        """
        path = self.download("config.json", folder)
        if path is None:
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8")).get("model_type")
        except (ValueError, AttributeError):
            found = None
        if found != model_type:
            raise ValueError(
                f"{self.repo_id!r} holds another kind of model: its config.json is of type {found!r}, not "
                f"{model_type!r}; publish to another repository, or remove that model's files. {self.state}"
            )

    def may_name(self, repo_id: str, repo_type: str) -> bool:
        """Return True if every reader of this repository can also see the repository `repo_id`."""
        try:
            found = self.api.repo_info(repo_id, repo_type=repo_type)
        except (HTTPError, OSError, ValueError):
            return False
        return repo_id != self.repo_id and (self.is_private or not found.private)

    def download(self, name: str, folder: Path) -> Path | None:
        """Download a file of the commit that is replaced; return None if it has no such file."""
        if name not in self.files:
            return None
        with self.explain_errors():
            return Path(self.api.hf_hub_download(self.repo_id, name, revision=self.parent, local_dir=folder))

    def commit(self, folder: Path, message: str) -> CommitInfo:
        """Commit the files of a folder, and delete all other files that belong to a set of weights.

        This is `create_commit` because `upload_folder` may split an upload into several commits.
        """
        new = {path.name: path for path in sorted(folder.iterdir())}
        old = sorted(name for name in self.files - set(new) if WEIGHTS_FILES.fullmatch(name))
        operations = [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in new.items()),
            *(CommitOperationDelete(path_in_repo=name) for name in old),
        ]
        with self.explain_errors():
            if self.needs_branch:
                self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
        with self.explain_errors(is_commit=True):
            return self.api.create_commit(
                self.repo_id,
                operations,
                commit_message=message,
                revision=self.revision,
                create_pr=self.create_pr,
                parent_commit=self.parent,
            )

    @contextmanager
    def explain_errors(self, task: str = "", state: str = "", is_commit: bool = False) -> Iterator[None]:
        """Turn the client's errors into a PublishingError that says what is wrong, what to do, and what was done.

        Args:
            task: What failed, as the subject of the message.
            state: What was done so far. The default is the state before the commit.
            is_commit: An error may leave it open whether the commit was made.
        """
        try:
            yield
        except PublishingError:
            raise
        except KeyboardInterrupt as stop:
            stop.add_note(self._unknown_state() if is_commit else state or self.state)
            raise
        except (HTTPError, OSError, RuntimeError, ValueError) as error:
            # A refused commit was not made. After other errors it may have been made, and only the answer is lost.
            if is_commit and not _is_refusal(http_cause(error)):
                state = self._state_after_commit()
            task = task or f"Publishing to {self.repo_id!r}"
            raise PublishingError(f"{task} failed: {hub_reason(error)}. {state or self.state}") from error

    def _state_after_commit(self) -> str:
        if self.create_pr:
            return self._unknown_state()
        try:
            head = self.api.model_info(self.repo_id, revision=self.revision).sha
        except (HTTPError, OSError):
            return self._unknown_state()
        return self.state if head == self.parent else f"There is a new commit, {head}, perhaps this one; {REPEATABLE}"

    def _unknown_state(self) -> str:
        if self.create_pr:
            discussions = f"{self.api.endpoint}/{self.repo_id}/discussions"
            return (
                f"It is unknown whether the pull request was opened; before running this again, look at {discussions}"
            )
        return f"It is unknown whether the commit was made; {REPEATABLE}"


def _is_refusal(error: BaseException) -> bool:
    return isinstance(error, HfHubHTTPError) and error.response.status_code < 500
