"""Errors of the Hub in one line: what was needed, what came, what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


class HubError(OSError):
    """The Hub refused, or could not be reached."""


@contextmanager
def explained(doing: str) -> Iterator[None]:
    """
    Turn whatever the client of the Hub raises while `doing` something into a `HubError`.
    """
    try:
        yield
    except HubError:
        raise
    except Exception as error:  # the errors of the client, its HTTP library and hf_xet have no base in common
        raise HubError(_explain(doing, error)) from error


def _explain(doing: str, error: Exception) -> str:
    response = error.response if isinstance(error, HfHubHTTPError) else None
    said = (error.server_message if isinstance(error, HfHubHTTPError) else None) or str(error)
    said = " ".join(said.split()).rstrip(".")
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        return f"{doing} needs the Hub. Got no connection: {said}. Connect, and unset HF_HUB_OFFLINE."
    if isinstance(error, RepositoryNotFoundError):
        return f"{doing} needs a repository that your token may see. Got none of that name. Check name and token."
    if isinstance(error, RevisionNotFoundError):
        return f"{doing} needs a branch, tag or commit that exists. Got another: {said}."
    if response is not None and response.status_code == 401:
        token = "another" if "authorization" in response.request.headers else "none"
        return (
            f"{doing} needs a token that the Hub knows. Got {token} (401: {said}). Log in with `hf auth login`, or "
            "give one."
        )
    if response is not None and response.status_code == 403:
        return (
            f"{doing} needs a token with the right to. Got one without (403: {said}). Give another, or a repository "
            "of your own."
        )
    if isinstance(error, ValueError):  # such as an invalid card or name
        return f"{doing} needs what the Hub accepts. It refused: {said}."
    return (
        f"{doing} was interrupted: {type(error).__name__}: {said}. A commit comes whole or not at all. Do the same "
        "again: what has arrived is not sent twice."
    )
