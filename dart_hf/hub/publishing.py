"""Publish a model on the Hugging Face Hub in one commit, then load it back and compare.

transformers' `push_to_hub` also works, and does less: it makes one commit for the model and one for the image
processor, writes a card to be filled in, and compares nothing. Publishing later replaces that card.
"""

import filecmp
import os
import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import CommitInfo, get_token, is_offline_mode
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from dart_hf.files import weights_sha256
from dart_hf.hub.loading import load_model, without_warnings
from dart_hf.hub.model_card import is_replaceable, make_model_card, merge_cards
from dart_hf.hub.records import DISTILLATION, EVALUATION, TRAINING, Records, read_record
from dart_hf.hub.repository import NOTHING, PublishingError, Repository
from dart_hf.hub.staging import (
    load_publishable,
    outputs_for_noise,
    publishable_source,
    read_card,
    stage_example,
    stage_records,
)
from dart_hf.version import __version__

# Largest accepted difference between the logits of the local and the published model, as a share of the largest logit.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Publication:
    """A model on the Hub.

    Args:
        repo_id: The repository.
        url: The page of the branch that was published to.
        commit: The commit that holds the model.
        pull_request: The page of the pull request, if one was opened.
        is_new: False if the Hub had exactly this model already and no commit was made.
        license: The licence that the model card states.
        keeps_card_text: Somebody wrote the model card, so only its metadata was updated.
        omits_evaluation: The folder's `evaluation.json` belongs to other weights and was left out.
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

    The repository is created if it is missing. The same commit deletes weights, records and image processor of another
    DART model. A model card that somebody wrote, in the folder or else on the Hub, keeps its text and gets the new
    metadata (see [`merge_cards`]). Local sources of data and weights are named by the last part of their path, private
    ones on the Hub are not named.

    Args:
        folder: What `save_pretrained`, `dart-hf convert` or `dart-hf train` wrote; it is only read. Published with the
            model, but not its checkpoints: `README.md`, `example.png` (or .jpg, .jpeg, .webp), the entries of
            `training.json` and `distillation.json` that [`read_record`] selects, and those of `evaluation.json` if it
            is of these weights.
        repo_id: "user/model" or "organisation/model", or "model" for the token's own account.
        private: Make a new repository private. The default is the account's setting. An existing repository stays as
            it is; True refuses a public one.
        revision: Branch to publish to, created from the main branch if it is missing; the default is "main". Or an open
            pull request such as "refs/pr/1".
        create_pr: Open a pull request to that branch instead. Repository and branch must exist.
        commit_message: Title of the commit.
        token: Access token with write access. The default is HF_TOKEN or the token of `hf auth login`.
        license: The weights' licence, by the Hub's name for it. The default is what the model card says already.
        example: Image for the Hub's widget. Its metadata (place, camera) is not published.

    Returns:
        What the Hub holds, after it was loaded back and gave the same logits. It is loaded with this package; of the
        model code in the repository only the files are compared.

    Raises:
        ValueError: An argument is wrong, the folder has no complete and usable DART model, a record or card cannot be
            read, or the repository holds a model of another kind.
        OSError: A file cannot be read; or, as a [`PublishingError`], the Hub refuses, cannot be reached, or gives back
            something else. The commit exists as a whole or not at all, and the message says how to continue.
    """
    token = _check_arguments(repo_id, revision, create_pr, token)
    folder = Path(folder)
    model, processor = load_publishable(folder)
    expected = outputs_for_noise(model, processor)
    training, evaluation, distillation = (
        read_record(folder / f"{name}.json", shape)
        for name, shape in (("training", TRAINING), ("evaluation", EVALUATION), ("distillation", DISTILLATION))
    )
    omits_evaluation = bool(evaluation) and evaluation.get("weights_sha256") != weights_sha256(folder)
    if omits_evaluation:
        evaluation = {}
    local_card = read_card(folder / "README.md", "in the folder")
    with TemporaryDirectory(prefix="dart-hf-") as temporary:
        staged, downloaded, loaded_back = (Path(temporary) / name for name in ("staged", "downloaded", "loaded_back"))
        model.save_pretrained(staged)
        processor.save_pretrained(staged)
        example_name = stage_example(folder, example, staged)

        repository = Repository(repo_id, revision, create_pr, token)
        repository.open(private)
        repository.refuse_other_models(model.config.model_type, downloaded)

        def hub_id(record: dict, key: str, repo_type: str) -> str | None:
            return publishable_source(record, key, lambda name: repository.may_name(name, repo_type))

        base_models = [hub_id(record, "started_from", "model") for record in (training, distillation)]
        datasets = [hub_id(record.get("data", {}), "source", "dataset") for record in (training, distillation)]
        records = Records(
            training,
            evaluation,
            distillation,
            license,
            base_model=base_models[0] or base_models[1],
            dataset=datasets[0] or datasets[1],
            evaluation_dataset=hub_id(evaluation.get("data", {}), "source", "dataset"),
            example=example_name,
        )
        stage_records(records, staged)
        hub_card = read_card(repository.download("README.md", downloaded), "on the Hub")
        earlier = [card for card in (local_card, hub_card) if card is not None]
        card = merge_cards(make_model_card(model, repository.repo_id, records), earlier)
        card.save(staged / "README.md")

        commit = repository.commit(staged, commit_message or f"Publish with dart-hf {__version__}")
        _check_published(repository, commit, staged, loaded_back, expected)
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
    """Check the arguments before a model is loaded; return the token."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id must be like 'user/model', got {repo_id!r}: {error}") from error
    if create_pr and (revision or "").startswith("refs/"):
        raise ValueError(f"create_pr needs a branch to merge into as revision, got {revision!r}.")
    if re.fullmatch("[0-9a-f]{40}", revision or ""):
        raise ValueError(f"revision must be a branch, got the commit {revision!r}.")
    if is_offline_mode():
        raise PublishingError(f"Publishing needs the Hub, but HF_HUB_OFFLINE is set; unset it. {NOTHING}")
    token = token or get_token()
    if token is None:
        raise PublishingError(f"Publishing needs a token: log in with 'hf auth login' or set HF_TOKEN. {NOTHING}")
    return token


def _check_published(
    repository: Repository, commit: CommitInfo, staged: Path, folder: Path, expected: torch.Tensor
) -> None:
    """Download a commit into a new folder, compare its files with the staged ones, and its logits with `expected`.

    Raises:
        PublishingError: They differ, or the commit cannot be downloaded.
    """
    place, again = repr(repository.repo_id), "run this again"
    if commit.pr_url:
        place, again = commit.pr_url, f"run this again with --revision {commit.pr_revision}"
    uploaded = f"The model was uploaded to {place} as commit {commit.oid}"
    names = sorted(path.name for path in staged.iterdir())
    state = f"{uploaded}, but not compared with the local one; {again} to do so."
    with repository.explain_errors(f"Loading {repository.repo_id!r} back from the Hub", state):
        revision = commit.pr_revision or commit.oid
        repository.api.snapshot_download(repository.repo_id, revision=revision, local_dir=folder, allow_patterns=names)
        _, changed, absent = filecmp.cmpfiles(staged, folder, names, shallow=False)
        if changed or absent:
            raise PublishingError(
                f"{uploaded}, but {', '.join(changed + absent)} came back changed or not at all: do not use that "
                f"commit; {again}."
            )
        model, processor = load_model(folder, needs_classifier=False)
        with without_warnings():
            difference = float((outputs_for_noise(model.cpu(), processor) - expected).abs().max())
    # `not <=` also refuses NaN.
    if not difference <= TOLERANCE * float(expected.abs().max()):
        raise PublishingError(
            f"{uploaded}, but its logits differ from the local model's by up to {difference:.2g}: do not use that "
            f"commit; {again}."
        )
