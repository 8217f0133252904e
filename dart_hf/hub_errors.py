"""Explain errors of the Hugging Face Hub to its user."""

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# HTTP status -> what is wrong, and what to do.
ADVICE = {
    400: "the Hub refuses what was sent",
    401: "the Hub does not accept the token; log in with 'hf auth login', or set HF_TOKEN to a valid one",
    402: "the account has no storage left or must pay for it; see its settings on the Hub",
    403: "the token has no access to that; to write there use one with write access, of an account that may, or open a "
    "pull request (--create-pr)",
    404: "the Hub has no such thing, or the token may not see it; check the names",
    409: "it is being changed by somebody else; run this again",
    412: "it was changed by somebody else meanwhile; run this again",
    413: "the upload is larger than the Hub takes",
    429: "the Hub had too many requests; run this again in some minutes",
}


def http_cause(error: BaseException) -> BaseException:
    """Return the HTTP error that caused `error`, else `error` itself: libraries wrap the Hub's errors in their own."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HTTPError):
        cause = cause.__cause__ or cause.__context__
    return cause or error


def hub_reason(error: BaseException) -> str:
    """Say what is wrong and what to do, as the end of a sentence without its full stop."""
    match http_cause(error):
        case GatedRepoError():
            return "it is gated: ask for access on its page on the Hub, and log in with 'hf auth login'"
        case RepositoryNotFoundError():
            return "there is no such repository, or it is private; check the name, or log in with 'hf auth login'"
        case RevisionNotFoundError():
            return "the repository has no such branch, tag or commit"
        case EntryNotFoundError() as missing if not isinstance(missing, LocalEntryNotFoundError):
            return "the repository has no such file"
        case HfHubHTTPError() as refusal:
            status = refusal.response.status_code
            default = "the Hub has a problem; run this again later" if status >= 500 else "the Hub refuses this"
            said = " ".join((refusal.server_message or refusal.response.reason_phrase).split())
            return f"{ADVICE.get(status, default)} ({status}: {said.rstrip('.')})"
        case HTTPError() as broken:
            return f"the connection broke; run this again ({str(broken) or type(broken).__name__})"
        case other:
            return str(other).strip().partition("\n")[0].removesuffix(".") or type(other).__name__
