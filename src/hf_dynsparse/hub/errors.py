"""Errors of the Hub in one line: what was needed, what came, what to do."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]  # public, but not for mypy


logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

# What the Hub answers when it has too much to do and has not begun: too many requests, and not available.
BUSY = (429, 503)
# Seconds to wait before asking again, if the Hub does not say how long; and at most. Its windows are five minutes.
WAITS = (1, 4, 16)
LONGEST_WAIT = 301


class HubError(OSError):
    """The Hub refused, or could not be reached."""


def ask(doing: str, request: Callable[[], Answer]) -> Answer:
    """
    The answer to `request`, which is sent up to three times more, when the Hub wishes, if it is only busy. Sending it
    again must do no harm.

    Raises:
        HubError: for whatever the client of the Hub raises else while `doing` something.
    """
    waits = iter(WAITS)
    while True:
        try:
            return request()
        except HubError:
            raise
        except Exception as error:  # the errors of the client, its HTTP library and hf_xet have no base in common
            response, wait = error.response if isinstance(error, HfHubHTTPError) else None, next(waits, None)
            if wait is None or response is None or response.status_code not in BUSY:
                raise HubError(_explain(doing, error)) from error
            limit, after = parse_ratelimit_headers(response.headers), response.headers.get("retry-after", "")
            seconds = int(after) if after.isdecimal() else wait if limit is None else limit.reset_in_seconds + 1
            logger.warning("The Hub is busy (%d); asking again in %d s.", response.status_code, seconds)
            time.sleep(min(seconds, LONGEST_WAIT))


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
