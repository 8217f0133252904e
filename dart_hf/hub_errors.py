"""Why something could not be had from the Hugging Face Hub, in words for its user."""

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
)


def hub_reason(error: BaseException) -> str:
    """What is wrong and what to do: half a sentence, without its full stop.

    Libraries wrap the Hub's errors in sentences of their own, so what the Hub said is looked for among the causes.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HTTPError):
        cause = cause.__cause__ or cause.__context__
    match cause:
        case None:
            return str(error).strip().partition("\n")[0].removesuffix(".")
        case GatedRepoError():
            return "it is gated: ask for access on its page on the Hub, and log in with `hf auth login`"
        case RepositoryNotFoundError():
            return "there is no such repository, or it is private; `hf auth login` opens those that you may read"
        case EntryNotFoundError():
            return "the repository has no such file"
        case HfHubHTTPError():
            said = cause.server_message or cause.response.reason_phrase
            return f"the Hub answered {cause.response.status_code}, {' '.join(said.split())}"
        case _:
            return f"the connection broke ({cause}); run this again"
