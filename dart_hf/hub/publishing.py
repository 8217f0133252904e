"""Publish a model on the Hugging Face Hub: one commit, made from a folder, loaded back and compared.

What is uploaded is a copy of the model made from what `from_pretrained` reads in the folder, so it is complete, has the
code that was checked with it, and nothing else. The folder itself is only read.

`push_to_hub` of transformers works as well, and is less: a commit for the model and another for the image processor, a
card whose text is still to be written, and no comparison. Publishing over it later gives it a card of facts.
"""

import filecmp
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
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
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedModel
from yaml import YAMLError

from dart_hf.files import weights_sha256
from dart_hf.hub.loading import load_model, without_warnings
from dart_hf.hub.model_card import (
    EVALUATION,
    TRAINING,
    Records,
    finished_card,
    is_replaceable,
    make_model_card,
    read_record,
)
from dart_hf.hub_errors import http_cause, hub_reason
from dart_hf.modeling.image_processing_dart import read_image
from dart_hf.version import __version__

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
EXAMPLE_FORMATS = (".png", ".jpg", ".jpeg", ".webp")
# Files that belong to one set of weights: of another set they would make a mixture.
BELONGS_TO_WEIGHTS = re.compile(
    r"(model|pytorch_model)(\.\w+)?(-\d+-of-\d+)?\.(safetensors|bin)(\.index(\.\w+)?\.json)?|"
    r"(pre)?processor_config\.json|(training|evaluation)\.json"
)
COMMIT_ID = re.compile("[0-9a-f]{40}")
# Largest difference of the logits, as a share of the largest, between the local model and what comes back from the Hub.
TOLERANCE = 1e-6

RECORD_SHAPES = {"training": TRAINING, "evaluation": EVALUATION}

NOTHING = "Nothing was published."
ONLY_IF_MISSING = "running this again makes it only if it is missing."


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
        keeps_card_text: Whether the model card's text is somebody's own, and only its metadata is of this model.
        omits_evaluation: Whether the folder's `evaluation.json` is not of its weights, and was left out.
    """

    repo_id: str
    url: str
    commit: str
    pull_request: str | None
    is_new: bool
    license: str | None
    keeps_card_text: bool
    omits_evaluation: bool


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
) -> Publication:
    """Publish the model in a folder: weights, configuration, image processor, code and model card, in one commit.

    The repository is made if there is none. Weights, records and an image processor that it has of another DART model
    are deleted in the same commit. A model card that somebody wrote, in the folder or else on the Hub, keeps its text
    and gets the facts of this model as metadata, see [`finished_card`]. Sources on this computer are named by the last
    part of their path, and those that are private on the Hub are not named.

    Args:
        folder: What `save_pretrained`, `dart-hf convert` or `dart-hf train` wrote. Of a training only the final model
            is published, no checkpoints. Taken along if there: `README.md`, `example.png` (or .jpg, .jpeg, .webp), and
            what [`read_record`] takes of `training.json` and, if it is of these weights, of `evaluation.json`.
        repo_id: "user/model" or "organisation/model", or "model" for the token's own account.
        private: Whether a new repository is private; the account's default without it. An existing one stays as it
            is; True refuses one that is public.
        revision: Branch to publish to, made from the main branch if there is none; "main" without it. Or a pull request
            that is open, such as "refs/pr/1".
        create_pr: Whether to open a pull request to that branch instead. The repository and the branch must be there.
        commit_message: Title of the commit.
        token: Access token with write access; without it that of HF_TOKEN or `hf auth login`.
        license: The weights' licence, by the Hub's name for it; without it what the model card says already.
        example: Image for the Hub's widget. Its metadata (place, camera) is not published.

    Returns:
        What is on the Hub now, once it was loaded from there and gave the same logits. It was loaded with this package,
        not with the model code in the repository, whose files are compared only.

    Raises:
        ValueError: An argument is wrong, the folder has no complete and usable DART model, or a record or card that
            cannot be read, or the repository has a model of another kind.
        OSError: A file cannot be read; or, as a [`PublishingError`], the Hub refuses, cannot be reached, or gives back
            something else. The commit is there as a whole or not at all, and the message says how to go on.
    """
    token = _check_arguments(repo_id, revision, create_pr, token)
    folder = Path(folder)
    model, processor = _load_complete(folder)
    expected = _answers(model, processor)
    training, evaluation = (read_record(folder / f"{name}.json", shape) for name, shape in RECORD_SHAPES.items())
    omits_evaluation = bool(evaluation) and evaluation.get("weights_sha256") != weights_sha256(folder)
    if omits_evaluation:
        evaluation = {}
    written = _read_card(folder / "README.md", "in the folder")
    with TemporaryDirectory(prefix="dart-hf-") as temporary:
        staged, fetched, downloaded = (Path(temporary) / name for name in ("staged", "fetched", "downloaded"))
        model.save_pretrained(staged)
        processor.save_pretrained(staged)
        example_name = _stage_example(folder, example, staged)

        repository = _Repository(repo_id, revision, create_pr, token)
        repository.look(private)
        repository.refuse_other_models(model.config.model_type, downloaded)
        records = Records(
            training,
            evaluation,
            license,
            base_model=repository.name_source(training, "started_from", "model"),
            dataset=repository.name_source(training.get("data", {}), "source", "dataset"),
            evaluation_dataset=repository.name_source(evaluation.get("data", {}), "source", "dataset"),
            example=example_name,
        )
        _stage_records(records, staged)
        on_hub = _read_card(repository.fetch("README.md", downloaded), "on the Hub")
        earlier = [card for card in (written, on_hub) if card is not None]
        card = finished_card(make_model_card(model, repository.repo_id, records), earlier)
        card.save(staged / "README.md")

        repository.create(private)
        commit = repository.commit(staged, commit_message or f"Publish with dart-hf {__version__}")
        repository.check(commit, staged, fetched, expected)
    return Publication(
        repo_id=repository.repo_id,
        url=repository.url,
        commit=commit.oid,
        pull_request=commit.pr_url,
        is_new=commit.oid != repository.parent,
        license=card.data.license,
        keeps_card_text=not is_replaceable(card),
        omits_evaluation=omits_evaluation,
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


def _stage_example(folder: Path, example: str | os.PathLike | None, staged: Path) -> str | None:
    """Copy the pixels of the example image that is asked for, or that the folder has; returns the copy's name."""
    own = (folder / f"example{suffix}" for suffix in EXAMPLE_FORMATS)
    path = Path(example) if example else next((path for path in own if path.is_file()), None)
    if path is None:
        return None
    suffix = path.suffix.lower()
    name = f"example{suffix if suffix in EXAMPLE_FORMATS else '.png'}"
    # As an array it has no place, camera or comment any more.
    Image.fromarray(np.asarray(read_image(path).convert("RGB"))).save(staged / name, quality=95)
    return name


def _stage_records(records: Records, staged: Path) -> None:
    """Write the records beside the model, whose file may be another than the folder's."""
    contents = {"training": records.training, "evaluation": records.evaluation}
    if records.evaluation:
        contents["evaluation"] = {**records.evaluation, "weights_sha256": weights_sha256(staged)}
    for name, content in contents.items():
        if content:
            text = json.dumps(content, indent=2, ensure_ascii=False)
            (staged / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")


def _read_card(path: Path | None, where: str) -> ModelCard | None:
    if path is None or not path.is_file():
        return None
    try:
        return ModelCard.load(path)
    except (ValueError, YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"The metadata of the model card README.md {where} cannot be read ({reason}); mend it or remove the file."
        ) from error


# --- the Hub ----------------------------------------------------------------------------------------------------------


class _Repository:
    """A repository on the Hub. Until `create` it is only looked at; then come `commit` and `check`."""

    def __init__(self, repo_id: str, revision: str | None, create_pr: bool, token: str) -> None:
        self.repo_id = repo_id
        self.revision = revision or "main"
        self.create_pr = create_pr
        self.api = HfApi(token=token)
        self.is_private = False
        # What has to be made before the commit.
        self.needs_repository = self.needs_branch = False
        # The commit that this publication replaces, and the files in it.
        self.parent: str | None = None
        self.files: set[str] = set()
        # What failure leaves behind, until there is a commit.
        self.left = NOTHING

    @property
    def url(self) -> str:
        page = f"{self.api.endpoint}/{self.repo_id}"
        return page if self.revision == "main" else f"{page}/tree/{self.revision}"

    def look(self, private: bool | None) -> None:
        """See what the Hub has of the repository and the branch; changes nothing.

        Raises:
            ValueError: The repository is public and should be private, or the revision is none to commit to.
        """
        with self._errors():
            if "/" not in self.repo_id:
                self.repo_id = f"{self.api.whoami()['name']}/{self.repo_id}"
            try:
                refs = self.api.list_repo_refs(self.repo_id, include_pull_requests=True)
            except RepositoryNotFoundError:
                if self.create_pr or self.revision.startswith("refs/"):
                    raise
                self.is_private, self.needs_repository = bool(private), True
                self.needs_branch = self.revision != "main"
                return
        ref = self.revision if self.revision.startswith("refs/") else f"refs/heads/{self.revision}"
        self.needs_branch = ref not in {known.ref for known in [*refs.branches, *(refs.pull_requests or [])]}
        if self.needs_branch:
            self._check_new_branch({tag.name for tag in refs.tags})
        with self._errors():
            # A new branch begins as the main one is.
            head = self.api.model_info(self.repo_id, revision="main" if self.needs_branch else self.revision)
        if private and not head.private:
            raise ValueError(
                f"{self.repo_id!r} is public already, and private makes only new repositories private; make it "
                f"private in its settings, or give another name. {NOTHING}"
            )
        self.is_private, self.parent = bool(head.private), head.sha
        self.files = {file.rfilename for file in head.siblings or []}

    def _check_new_branch(self, tags: set[str]) -> None:
        if self.revision in tags or COMMIT_ID.fullmatch(self.revision):
            raise ValueError(f"revision must be a branch, got the tag or commit {self.revision!r}. {NOTHING}")
        if self.create_pr or self.revision.startswith("refs/"):
            raise ValueError(f"revision: {self.repo_id!r} has no branch or pull request {self.revision!r}. {NOTHING}")

    def refuse_other_models(self, model_type: str, folder: Path) -> None:
        """Raise a ValueError if the repository holds a model that is no DART: its files would be mixed with these."""
        path = self.fetch("config.json", folder)
        if path is None:
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8")).get("model_type")
        except (ValueError, AttributeError):
            found = None
        if found != model_type:
            raise ValueError(
                f"{self.repo_id!r} holds another kind of model: its config.json is of type {found!r}, not "
                f"{model_type!r}; publish to another repository, or remove that model's files. {NOTHING}"
            )

    def name_source(self, record: dict[str, Any], key: str, repo_type: str) -> str | None:
        """Leave of a record's source what others may read; returns it if it is the id of another repository."""
        source = record.pop(key, None)
        if source is None:
            return None
        known = self._known_id(source, repo_type)
        if known or source.startswith("preset "):
            record[key] = source
        elif Path(source).is_absolute():
            record[key] = Path(source).name
        return known

    def _known_id(self, name: str, repo_type: str) -> str | None:
        """`name` if it is a repository that whoever sees this one may know of."""
        try:
            found = self.api.repo_info(name, repo_type=repo_type)
        except (HTTPError, OSError, ValueError):
            return None
        return name if name != self.repo_id and (self.is_private or not found.private) else None

    def fetch(self, name: str, folder: Path) -> Path | None:
        """A file of the commit that is replaced, if it has it."""
        if name not in self.files:
            return None
        with self._errors():
            return Path(self.api.hf_hub_download(self.repo_id, name, revision=self.parent, local_dir=folder))

    def create(self, private: bool | None) -> None:
        """Make the repository and the branch where they are missing."""
        with self._errors():
            if self.needs_repository:
                self.api.create_repo(self.repo_id, private=private)
                self.left = f"{NOTHING} The repository was made, and is empty."
            if self.needs_branch:
                self.api.create_branch(self.repo_id, branch=self.revision)
            if self.needs_repository:
                self.parent = self.api.model_info(self.repo_id, revision=self.revision).sha

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
        place, again = repr(self.repo_id), "run this again"
        if commit.pr_url:
            place, again = commit.pr_url, f"run this again with --revision {commit.pr_revision}"
        uploaded = f"The model was uploaded to {place} as commit {commit.oid}"
        names = sorted(path.name for path in staged.iterdir())
        pending = f"{uploaded}, but not compared with the local one; {again} to do so."
        with self._errors(f"Loading {self.repo_id!r} back from the Hub", pending):
            revision = commit.pr_revision or commit.oid
            self.api.snapshot_download(self.repo_id, revision=revision, local_dir=fetched, allow_patterns=names)
            _, changed, absent = filecmp.cmpfiles(staged, fetched, names, shallow=False)
            if changed or absent:
                raise PublishingError(
                    f"{uploaded}, but {', '.join(changed + absent)} came back changed or not at all: do not use that "
                    f"commit; {again}."
                )
            model, processor = load_model(fetched, needs_classifier=False)
            with without_warnings():
                difference = float((_answers(model.cpu(), processor) - expected).abs().max())
        # Written so that NaN is refused.
        if not difference <= TOLERANCE * float(expected.abs().max()):
            raise PublishingError(
                f"{uploaded}, but loaded back its logits differ from the local model's by up to {difference:.2g}: do "
                f"not use that commit; {again}."
            )

    @contextmanager
    def _errors(self, task: str = "", left: str = "", is_commit: bool = False) -> Iterator[None]:
        """Turn the client's errors into a sentence on what is wrong and what to do, and one on what is left behind."""
        try:
            yield
        except PublishingError:
            raise
        except KeyboardInterrupt as stop:
            stop.add_note(self._unknown() if is_commit else left or self.left)
            raise
        except (HTTPError, OSError, RuntimeError, ValueError) as error:
            # After a refusal nothing was done. Otherwise the commit may have been made, and only the answer lost.
            if is_commit and not _is_refusal(http_cause(error)):
                left = self._what_became_of_the_commit()
            task = task or f"Publishing to {self.repo_id!r}"
            raise PublishingError(f"{task} failed: {hub_reason(error)}. {left or self.left}") from error

    def _what_became_of_the_commit(self) -> str:
        if self.create_pr:
            return self._unknown()
        try:
            head = self.api.model_info(self.repo_id, revision=self.revision).sha
        except (HTTPError, OSError):
            return self._unknown()
        if head == self.parent:
            return self.left
        return f"There is a new commit, {head}, perhaps this one; {ONLY_IF_MISSING}"

    def _unknown(self) -> str:
        if self.create_pr:
            discussions = f"{self.api.endpoint}/{self.repo_id}/discussions"
            return f"Whether the pull request was opened is not known: before running this again, look at {discussions}"
        return f"Whether the commit was made is not known; {ONLY_IF_MISSING}"


def _is_refusal(error: BaseException) -> bool:
    return isinstance(error, HfHubHTTPError) and error.response.status_code < 500
