"""Talking to the Hub: transient failures are waited out, within bounds, and any other is one clear HubError."""

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
"""Times a request is made; those that carry large files `huggingface_hub` makes up to 6 times, and they are not
repeated here."""
LONGEST_WAIT = 300.0
"""Seconds that the Hub may ask to wait, such as to the end of the window of its rate limit."""
TIMEOUT = 120.0
"""Seconds without a byte after which a connection counts as cut; without it, it would hang for ever."""

_TRANSIENT = (408, 429, 500, 502, 503, 504)
_AGAIN = "Nothing was committed. Push again: what was uploaded is not sent twice."
_URL = re.compile(r"https?://\S+")
Result = TypeVar("Result")


def refuse_offline() -> None:
    """Raise HubError if the environment forbids to use the network."""
    if is_offline_mode():
        raise HubError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it, or look with --dry-run")


def ask(what: str, repo_id: str, request: Callable[[], Result], token: str | None) -> Result:
    """Make a request, again if it fails for the moment. Raises HubError, which never holds the token or an address.

    `what` says what it was for, as in "cannot WHAT". Contract: `request` may be made twice.
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
            # What huggingface_hub and hf_xet raise for a failure in a thread that uploads.
            if any(type(one) is RuntimeError for one in _chain(error)):
                raise HubError(_explain_upload(failure, repo_id)) from error
            wait = _wait(failure, attempt)
            if wait is None or attempt == ATTEMPTS - 1:
                raise HubError(_explain(failure, what, repo_id, token)) from error
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _bound_session() -> None:
    """Keep the shared HTTP session from waiting without end, for an answer or because the Hub says so."""
    session: Any = get_session()
    session.timeout = TIMEOUT
    hooks = session.event_hooks
    if _refuse_long_wait not in hooks["response"]:
        session.event_hooks = {**hooks, "response": [*hooks["response"], _refuse_long_wait]}


def _refuse_long_wait(response: Any) -> None:
    if response.status_code in _TRANSIENT and (seconds := _retry_after(response)) and seconds > LONGEST_WAIT:
        raise HubError(
            f"the Hub asks to wait {seconds:.0f} seconds before the next request ({response.status_code}); nothing was "
            "committed. Push again then: what was uploaded is not sent twice."
        )


def _retry_after(response: Any) -> float | None:
    value = response.headers.get("Retry-After", "")
    return float(value) if re.fullmatch(r"\d+(\.\d+)?", value) else None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it was raised from: `huggingface_hub` wraps those of its upload threads."""
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__ or one.__context__


def _failure(error: BaseException) -> BaseException | None:
    """Find in an error what the Hub or the network did; None if it was neither."""
    for one in _chain(error):
        if isinstance(one, (HubError, HfHubHTTPError, OfflineModeIsEnabled, ConnectionError, TimeoutError)):
            return one
        # The HTTP library has another name in other versions; its errors are no OSError, nor are hf_xet's.
        if type(one).__module__.startswith(("httpx", "hf_xet")) or type(one).__name__ == "JSONDecodeError":
            return one
    return next((one for one in _chain(error) if type(one) is RuntimeError), None)


def _wait(failure: BaseException, attempt: int) -> float | None:
    """Return the seconds until the next attempt; None if there is no point in one."""
    if isinstance(failure, HfHubHTTPError):
        if failure.response.status_code not in _TRANSIENT:
            return None
        if (asked := _retry_after(failure.response)) is not None:
            return min(asked, LONGEST_WAIT)
    return None if isinstance(failure, OfflineModeIsEnabled) else 2.0**attempt


def _explain(failure: BaseException, what: str, repo_id: str, token: str | None) -> str:
    """Say what failed, why, and what to do."""
    if isinstance(failure, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing can be pushed; unset it"
    if not isinstance(failure, HfHubHTTPError):
        return (
            f"cannot {what}: the connection to the Hub was cut or could not be made ({type(failure).__name__}), "
            f"{ATTEMPTS} times. {_AGAIN}"
        )
    status = failure.response.status_code
    reasons = {
        401: "the Hub does not know the token, or it has expired. Log in again with: hf auth login, or set HF_TOKEN",
        403: f"the token may not write to {repo_id}. Give one with write access, and a namespace that is yours",
        404: f"there is no {repo_id}, or the token may not see it. Check the namespace and the token",
        409: f"another operation on {repo_id} is under way, or the name is taken. Push again in a moment",
        412: f"somebody else committed to {repo_id} meanwhile, and nothing of this was. Look at it, then push again",
        429: f"too many requests, after {ATTEMPTS} attempts. Nothing was committed; push again later",
    }
    if status >= 500:
        reason = f"the Hub failed {ATTEMPTS} times. Nothing was committed; push again later"
    else:
        reason = reasons.get(status, "the Hub refuses")
    return f"cannot {what} ({status}): {reason}.{_said(failure, token)}"


def _explain_upload(failure: BaseException, repo_id: str) -> str:
    """Say the same of the place where large files go, which does not know the token."""
    reason = f"the connection failed in every attempt ({type(failure).__name__})"
    if isinstance(failure, HfHubHTTPError):
        status = failure.response.status_code
        reason = f"the store for large files {'keeps failing' if status in _TRANSIENT else 'refuses'} ({status})"
    return f"cannot upload the files of {repo_id}: {reason}. {_AGAIN}"


def _said(failure: HfHubHTTPError, token: str | None) -> str:
    """Quote the Hub, without addresses, which may be signed, and without the token, which it may repeat."""
    text = " ".join(_URL.sub("...", failure.server_message or "").split())[:300]
    if token:
        text = text.replace(token, "...")
    return f" The Hub says: {text}" if text else ""
