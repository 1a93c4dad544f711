"""Make requests to the Hub: retry transient failures, within limits, and turn any other into one HubError."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from huggingface_hub import is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session  # type: ignore[attr-defined]  # their way to export

from lora_llava.errors import HubError

ATTEMPTS = 4
"""Attempts of a request. `huggingface_hub` itself retries uploads of large files, up to 5 times; they are not retried
here."""
MAX_WAIT = 300.0
"""Maximum seconds that the Hub may ask to wait, such as until its rate limit resets."""
TIMEOUT = 120.0
"""Seconds without data after which a connection counts as broken; without a timeout it could hang forever."""

_TRANSIENT = (408, 429, 500, 502, 503, 504)
_AGAIN = "Nothing was committed. Push again: what was uploaded is not sent twice."
_URL = re.compile(r"https?://\S+")
Result = TypeVar("Result")


def refuse_offline() -> None:
    """Raise HubError if the environment forbids network access."""
    if is_offline_mode():
        raise HubError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it, or preview with --dry-run")


def ask(what: str, repo_id: str, request: Callable[[], Result], token: str | None) -> Result:
    """Make a request, and retry transient failures. Raises HubError, which never contains the token or an address.

    `what` completes "cannot ..." in the error. Contract: `request` is safe to repeat.
    """
    for attempt in range(ATTEMPTS):
        _bound_session()
        try:
            return request()
        except Exception as error:
            failure = _failure(error)
            if failure is None:
                raise
            if isinstance(failure, HubError):
                raise failure from error
            # huggingface_hub and hf_xet raise RuntimeError for a failure in an upload thread, which they retried.
            if any(type(cause) is RuntimeError for cause in _chain(error)):
                raise HubError(_explain_upload(failure, repo_id)) from error
            wait = _wait(failure, attempt)
            if wait is None or attempt == ATTEMPTS - 1:
                raise HubError(_explain(failure, what, repo_id, token)) from error
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _bound_session() -> None:
    """Limit how long the shared HTTP session waits: for a response, or because the Hub asks it to."""
    session: Any = get_session()
    session.timeout = TIMEOUT
    hooks = session.event_hooks
    if _refuse_long_wait not in hooks["response"]:
        session.event_hooks = {**hooks, "response": [*hooks["response"], _refuse_long_wait]}


def _refuse_long_wait(response: Any) -> None:
    if response.status_code in _TRANSIENT and (seconds := _retry_after(response)) and seconds > MAX_WAIT:
        raise HubError(
            f"the Hub asks to wait {seconds:.0f} seconds before the next request ({response.status_code}); nothing was "
            "committed. Push again then: what was uploaded is not sent twice."
        )


def _retry_after(response: Any) -> float | None:
    value = response.headers.get("Retry-After", "")
    return float(value) if re.fullmatch(r"\d+(\.\d+)?", value) else None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes: `huggingface_hub` wraps those of its upload threads."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _failure(error: BaseException) -> BaseException | None:
    """Return the failure of the Hub or the network in the causes of an error; None if there is none."""
    for cause in _chain(error):
        if isinstance(cause, (HubError, HfHubHTTPError, OfflineModeIsEnabled, ConnectionError, TimeoutError)):
            return cause
        # By name: which HTTP library is installed depends on the version, and its errors and hf_xet's are no OSError.
        if type(cause).__module__.startswith(("httpx", "hf_xet")) or type(cause).__name__ == "JSONDecodeError":
            return cause
    return next((cause for cause in _chain(error) if type(cause) is RuntimeError), None)


def _wait(failure: BaseException, attempt: int) -> float | None:
    """Return the seconds until the next attempt; None if another attempt cannot help."""
    if isinstance(failure, HfHubHTTPError):
        if failure.response.status_code not in _TRANSIENT:
            return None
        if (asked := _retry_after(failure.response)) is not None:
            return min(asked, MAX_WAIT)
    return None if isinstance(failure, OfflineModeIsEnabled) else 2.0**attempt


def _explain(failure: BaseException, what: str, repo_id: str, token: str | None) -> str:
    """Return what failed, why, and what to do."""
    if isinstance(failure, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing can be pushed; unset it"
    if not isinstance(failure, HfHubHTTPError):
        return f"cannot {what}: the connection to the Hub failed ({type(failure).__name__}), {ATTEMPTS} times. {_AGAIN}"
    status = failure.response.status_code
    reasons = {
        401: "the Hub rejects the token; it may have expired. Log in again with: hf auth login, or set HF_TOKEN",
        403: f"the token may not write to {repo_id}. Use a token with write access, and your own namespace",
        404: f"{repo_id} does not exist, or the token may not read it. Check the namespace and the token",
        409: f"another operation on {repo_id} is in progress, or the name is taken. Push again in a moment",
        412: f"somebody else committed to {repo_id} meanwhile, so nothing was committed. Review it, then push again",
        429: f"too many requests, after {ATTEMPTS} attempts. Nothing was committed; push again later",
    }
    if status >= 500:
        reason = f"the Hub failed {ATTEMPTS} times. Nothing was committed; push again later"
    else:
        reason = reasons.get(status, "the Hub refuses")
    return f"cannot {what} ({status}): {reason}.{_said(failure, token)}"


def _explain_upload(failure: BaseException, repo_id: str) -> str:
    """Return the same for the store of large files, to which the token is not sent."""
    reason = f"the connection failed in every attempt ({type(failure).__name__})"
    if isinstance(failure, HfHubHTTPError):
        status = failure.response.status_code
        reason = f"the store for large files {'keeps failing' if status in _TRANSIENT else 'refuses'} ({status})"
    return f"cannot upload the files of {repo_id}: {reason}. {_AGAIN}"


def _said(failure: HfHubHTTPError, token: str | None) -> str:
    """Return the Hub's message, without URLs, which may be signed, and without the token, which it may repeat."""
    text = " ".join(_URL.sub("...", failure.server_message or "").split())[:300]
    if token:
        text = text.replace(token, "...")
    return f" The Hub says: {text}" if text else ""
