"""Publish a model on the Hugging Face Hub: one commit, made from a folder, loaded back and compared.

What is uploaded is a copy of the model made from what `from_pretrained` reads in the folder, so it is complete, has the
code that was checked with it, and nothing else. The folder itself is only read.
"""

import filecmp
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    get_token,
    is_offline_mode,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, RevisionNotFoundError
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import validate_repo_id
from transformers import BaseImageProcessor, PreTrainedModel
from yaml import YAMLError

from dart_hf.model_card import Records, has_renewable_text, make_model_card, renewed_card
from dart_hf.modeling.image_processing_dart import read_image
from dart_hf.prediction import load_model
from dart_hf.version import __version__

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
RECORDS = ("training.json", "evaluation.json")
EXAMPLES = ("example.png", "example.jpg", "example.jpeg", "example.webp")
# What a record may hold that is nobody else's business: tokens, and a command line with paths in it.
UNPUBLISHED = ("hub_token", "push_to_hub_token", "command")
# Files that belong to one set of weights: of another set they would make a mixture.
BELONGS_TO_WEIGHTS = re.compile(
    r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|(pre)?processor_config\.json|"
    r"(training|evaluation)\.json"
)
# Largest difference of the logits, as a share of the largest, between the local model and what comes back from the Hub.
TOLERANCE = 1e-6

NOTHING = "Nothing was published."
# HTTP status -> what is wrong and what to do.
ADVICE = {
    400: "the Hub refuses what was sent",
    401: "the Hub does not accept the token; log in with 'hf auth login', or set HF_TOKEN to a valid one",
    402: "the account has no storage left or must pay for it; see its settings on the Hub",
    403: "the token has no access to that; use one with write access, of an account that may write there, or open a "
    "pull request (--create-pr)",
    404: "the Hub has no such repository or branch, or the token may not see it; check the names",
    409: "the repository is being changed by somebody else; run this again",
    412: "the repository was changed by somebody else meanwhile; run this again",
    413: "the upload is larger than the Hub takes",
    429: "the Hub had too many requests; run this again in some minutes",
}
LONGEST_REASON = 300


class PublishingError(OSError):
    """The Hub did not take, or did not give back, what was to be published."""


@dataclass(frozen=True)
class Publication:
    """A model on the Hub.

    Args:
        repo_id: The repository.
        url: Its page, of the branch that was published to.
        commit: The commit that holds the model.
        pull_request: Page of the pull request, if one was opened.
        is_new: False if the Hub had exactly this already, so that there was nothing to commit.
        license: The licence that the model card states.
        keeps_card_text: Whether the model card's text is somebody's own, and only its metadata was renewed.
    """

    repo_id: str
    url: str
    commit: str
    pull_request: str | None
    is_new: bool
    license: str | None
    keeps_card_text: bool


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    license: str | None = None,
    example: str | os.PathLike | None = None,
    replace_card: bool = False,
) -> Publication:
    """Publish the model in a folder: weights, configuration, image processor, code and model card, in one commit.

    The repository is made if there is none. Weights, records and an image processor that it has of another model are
    deleted in the same commit. A model card that somebody wrote, in the folder or else on the Hub, is kept and gets the
    facts of this model, see [`renewed_card`]. Of local paths in the records only the last part is published.

    Args:
        folder: What `save_pretrained`, `dart-hf convert` or `dart-hf train` wrote. Of a training only the final model
            is published, no checkpoints. Taken along if there: `training.json`, `evaluation.json`, `README.md`,
            `example.png` (or .jpg, .jpeg, .webp).
        repo_id: "user/model" or "organisation/model", or "model" for the token's own account.
        private: Whether a new repository is private; the account's default without it. An existing one stays as it
            is; True refuses one that is public.
        revision: Branch to publish to, made from the main branch if there is none; "main" without it.
        create_pr: Whether to open a pull request to that branch instead.
        commit_message: Title of the commit.
        token: Access token with write access; without it that of HF_TOKEN or `hf auth login`.
        license: The weights' licence, by the Hub's name for it; without it what the model card says already.
        example: Image for the Hub's widget.
        replace_card: Whether to write a new model card in place of one that somebody wrote.

    Returns:
        What is on the Hub now, once it was loaded from there and gave the same logits.

    Raises:
        ValueError: An argument is wrong, or the folder has no complete and usable DART model.
        OSError: A file cannot be read; or, as a [`PublishingError`], the Hub refuses, cannot be reached, or gives back
            something else. Running it again is always safe: the commit is there as a whole or not at all.
    """
    token = _check_arguments(repo_id, revision, create_pr, token)
    folder = Path(folder)
    model, processor = _load_complete(folder)
    expected = _answers(model, processor)
    training, evaluation = (_read_record(folder / name) for name in RECORDS)
    example = _find_example(folder, example)
    records = Records(_publishable(training), _publishable(evaluation), license, example=example and example.name)
    written = None if replace_card else _read_card(folder / "README.md")
    with TemporaryDirectory(prefix="dart-hf-") as temporary:
        staged, fetched = Path(temporary) / "staged", Path(temporary) / "fetched"
        _stage(model, processor, records, example, staged)
        repository = _Repository(repo_id, revision, create_pr, token)
        repository.prepare(private)
        records = replace(
            records,
            base_model=repository.known_id(training.get("started_from"), "model"),
            dataset=repository.known_id((training.get("data") or {}).get("source"), "dataset"),
        )
        if written is None and not replace_card:
            written = repository.card(Path(temporary))
        card = make_model_card(model, repository.repo_id, records)
        if written is not None:
            card = renewed_card(written, card)
        card.save(staged / "README.md")

        commit = repository.commit(staged, commit_message or f"Publish with dart-hf {__version__}")
        repository.check(commit, staged, fetched, expected)
    return Publication(
        repo_id=repository.repo_id,
        url=repository.url,
        commit=commit.oid,
        pull_request=commit.pr_url,
        is_new=commit.oid != repository.parent,
        license=card.data.license,
        keeps_card_text=written is not None and not has_renewable_text(written),
    )


def _check_arguments(repo_id: str, revision: str | None, create_pr: bool, token: str | None) -> str:
    """Find what is wrong before a model is loaded; returns the token."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id must be like 'user/model', got {repo_id!r}: {error}") from error
    if create_pr and (revision or "").startswith("refs/"):
        raise ValueError(f"create_pr needs a branch to merge into as revision, got {revision!r}.")
    if is_offline_mode():
        raise PublishingError(f"Publishing needs the Hub, but HF_HUB_OFFLINE is set; unset it. {NOTHING}")
    token = token or get_token()
    if token is None:
        raise PublishingError(f"Publishing needs a token: log in with 'hf auth login' or set HF_TOKEN. {NOTHING}")
    return token


# --- what is published ------------------------------------------------------------------------------------------------


def _load_complete(folder: Path) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """The model of a folder and its image processor, or why they should not be published."""
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}.")
    if (folder / "config.json").is_file() and not any((folder / name).is_file() for name in PROCESSOR_FILES):
        raise FileNotFoundError(
            f"The folder {str(folder)!r} has no image processor ({PROCESSOR_FILES[0]}); write the one that the model "
            f"was trained with: processor.save_pretrained({str(folder)!r})."
        )
    model, processor = load_model(folder, needs_classifier=False)
    model.require_scorer_weights()
    return model.cpu(), processor


@torch.inference_mode()
def _answers(model: PreTrainedModel, processor: BaseImageProcessor) -> torch.Tensor:
    """Logits of a fixed image (noise), or the features of a model without a classifier: (1, …) in float32.

    Raises:
        ValueError: The image processor does not fit the model, or the logits are not finite.
    """
    config = model.config
    size = (config.num_channels, config.image_size, config.image_size + config.image_size // 4)
    noise = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixel_values = processor(noise, return_tensors="pt", input_data_format="channels_first").pixel_values
    outputs = model(pixel_values)
    answers = (outputs.logits if "logits" in outputs else outputs.pooler_output).float()
    if not answers.isfinite().all():
        raise ValueError("The model's logits are not finite, so its training has diverged: it is not published.")
    return answers


def _find_example(folder: Path, example: str | os.PathLike | None) -> Path | None:
    """The example image that is asked for, or that the folder has."""
    names = (folder / name for name in EXAMPLES)
    path = Path(example) if example else next((path for path in names if path.is_file()), None)
    if path is not None:
        read_image(path)
    return path


def _stage(
    model: PreTrainedModel, processor: BaseImageProcessor, records: Records, example: Path | None, staged: Path
) -> None:
    """Fill the folder that will be uploaded, except for the model card."""
    model.save_pretrained(staged)
    processor.save_pretrained(staged)
    for name, record in zip(RECORDS, (records.training, records.evaluation), strict=True):
        if record:
            text = json.dumps(record, indent=2, ensure_ascii=False)
            (staged / name).write_text(f"{text}\n", encoding="utf-8")
    if example:
        shutil.copyfile(example, staged / example.name)


def _read_record(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}); write it again or remove it.") from error
    if not isinstance(record, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object; write it again or remove it.")
    return record


def _publishable(value: Any) -> Any:
    """A record without `UNPUBLISHED` fields, and with only the last part of paths on this computer."""
    if isinstance(value, Mapping):
        return {key: _publishable(entry) for key, entry in value.items() if key not in UNPUBLISHED}
    if isinstance(value, list):
        return [_publishable(entry) for entry in value]
    if isinstance(value, str) and (value.startswith((".", "~")) or Path(value).is_absolute()):
        return Path(value).name
    return value


def _read_card(path: Path) -> ModelCard | None:
    if not path.is_file():
        return None
    try:
        return ModelCard.load(path)
    except (ValueError, YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"The metadata of the model card {path.name} cannot be read ({reason}); mend it, or have it replaced "
            "(--replace-card)."
        ) from error


# --- the Hub ----------------------------------------------------------------------------------------------------------


class _Repository:
    """A repository on the Hub, and what is done to it, in this order: prepare, known_id, card, commit, check."""

    def __init__(self, repo_id: str, revision: str | None, create_pr: bool, token: str) -> None:
        self.repo_id = repo_id
        self.revision = revision or "main"
        self.create_pr = create_pr
        self.api = HfApi(token=token)
        # The commit that this publication replaces, and the files in it.
        self.parent: str | None = None
        self.files: set[str] = set()

    @property
    def url(self) -> str:
        page = f"{self.api.endpoint}/{self.repo_id}"
        return page if self.revision == "main" else f"{page}/tree/{self.revision}"

    def prepare(self, private: bool | None) -> None:
        """Make the repository and the branch where they are missing, and see what they hold."""
        with self._errors():
            self.repo_id = self.api.create_repo(self.repo_id, private=private, exist_ok=True).repo_id
            head = self._head()
        if private and not head.private:
            raise ValueError(
                f"{self.repo_id!r} is public already, and private makes only new repositories private; make it "
                f"private in its settings, or give another name. {NOTHING}"
            )
        self.parent = head.sha
        self.files = {file.rfilename for file in head.siblings or []}

    def _head(self) -> ModelInfo:
        try:
            return self.api.model_info(self.repo_id, revision=self.revision)
        except RevisionNotFoundError:
            if self.create_pr or self.revision.startswith("refs/"):
                raise
            self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
            return self.api.model_info(self.repo_id, revision=self.revision)

    def known_id(self, name: str | None, repo_type: str) -> str | None:
        """`name` if it is the id of another repository on the Hub, and nothing on this computer."""
        if not name or name == self.repo_id or os.path.exists(name):
            return None
        try:
            validate_repo_id(name)
        except HFValidationError:
            return None
        with self._errors():
            return name if self.api.repo_exists(name, repo_type=repo_type) else None

    def card(self, folder: Path) -> ModelCard | None:
        """The model card that the Hub has, without its metrics, which are of other weights."""
        if "README.md" not in self.files:
            return None
        with self._errors():
            path = self.api.hf_hub_download(self.repo_id, "README.md", revision=self.parent, local_dir=folder)
        card = _read_card(Path(path))
        card.data.eval_results = card.data.model_name = card.data.metrics = None
        return card

    def commit(self, staged: Path, message: str) -> CommitInfo:
        """Make the revision hold the files of a folder, and no others of a model."""
        new = {path.name: path for path in sorted(staged.iterdir())}
        old = sorted(name for name in self.files - set(new) if BELONGS_TO_WEIGHTS.fullmatch(name))
        operations = [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in new.items()),
            *(CommitOperationDelete(path_in_repo=name) for name in old),
        ]
        with self._errors(is_commit=True):
            return self.api.create_commit(
                self.repo_id,
                operations,
                commit_message=message,
                revision=self.revision,
                create_pr=self.create_pr,
                parent_commit=self.parent,
            )

    def check(self, commit: CommitInfo, staged: Path, fetched: Path, expected: torch.Tensor) -> None:
        """Fetch a commit into a new folder; compare its files with the staged ones, and its logits with `expected`."""
        uploaded = f"The model was uploaded to {self.repo_id!r} as commit {commit.oid}"
        names = sorted(path.name for path in staged.iterdir())
        revision = commit.pr_revision or commit.oid
        pending = f"{uploaded}, but not compared with the local one; run this again to do so."
        with self._errors(f"Loading {self.repo_id!r} back from the Hub", pending):
            self.api.snapshot_download(self.repo_id, revision=revision, local_dir=fetched, allow_patterns=names)
        _, changed, absent = filecmp.cmpfiles(staged, fetched, names, shallow=False)
        if changed or absent:
            raise PublishingError(
                f"{uploaded}, but {', '.join(changed + absent)} came back changed or not at all: do not use that "
                "commit; run this again."
            )
        model, processor = load_model(fetched, needs_classifier=False)
        difference = float((_answers(model.cpu(), processor) - expected).abs().max())
        # Written so that NaN is refused.
        if not difference <= TOLERANCE * float(expected.abs().max()):
            raise PublishingError(
                f"{uploaded}, but loaded back its logits differ from the local model's by up to {difference:.2g}: do "
                "not use that commit; run this again."
            )

    @contextmanager
    def _errors(self, task: str = "", consequence: str = NOTHING, is_commit: bool = False) -> Iterator[None]:
        """Turn the client's errors into a sentence on what is wrong and what to do, and one on what has happened."""
        try:
            yield
        except (HTTPError, OSError, RuntimeError, ValueError) as error:
            cause = _cause(error)
            # After a refusal nothing was done. Otherwise the commit may have been made, and only the answer lost.
            if is_commit and not _is_refusal(cause):
                consequence = self._what_became_of_the_commit()
            task = task or f"Publishing to {self.repo_id!r}"
            raise PublishingError(f"{task} failed: {_reason(cause)}. {consequence}") from error

    def _what_became_of_the_commit(self) -> str:
        if self.create_pr:
            return (
                "Whether the pull request was opened is not known: before running this again, look at "
                f"{self.api.endpoint}/{self.repo_id}/discussions"
            )
        try:
            head = self.api.model_info(self.repo_id, revision=self.revision).sha
        except (HTTPError, OSError):
            return "Whether the commit was made is not known; running this again makes it only if it is missing."
        if head == self.parent:
            return NOTHING
        return f"There is a new commit, {head}, perhaps this one; running this again makes it only if it is missing."


def _cause(error: BaseException) -> BaseException:
    """The HTTP error that made the client raise another one, if that was so."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HTTPError):
        cause = cause.__cause__
    return cause or error


def _is_refusal(error: BaseException) -> bool:
    return isinstance(error, HfHubHTTPError) and error.response.status_code < 500


def _reason(error: BaseException) -> str:
    """What is wrong and what to do, as half a sentence."""
    if not isinstance(error, HfHubHTTPError):
        what = "the connection to the Hub broke" if isinstance(error, HTTPError) else "something unexpected happened"
        return f"{what}; run this again ({_short(str(error) or type(error).__name__)})"
    status = error.response.status_code
    default = "the Hub has a problem; run this again later" if status >= 500 else "the Hub refuses this"
    return f"{ADVICE.get(status, default)} ({status}: {_short(error.server_message or error.response.reason_phrase)})"


def _short(text: str) -> str:
    return " ".join(text.split())[:LONGEST_REASON].rstrip(".")
