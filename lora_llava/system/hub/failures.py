"""Say why a request to the Hub, or to its store of large files, failed, and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from lora_llava.errors import HubError
from lora_llava.system.hub import network
from lora_llava.system.hub.network import LOGIN_PAGE, OLD_WAY, TRANSIENT, GiveUpError, is_login_page, wait_asked

_URL = re.compile(r"https?://\S+")
_STORE = re.compile(r"\((?P<status>[45]\d\d) [^)]*\), domain: (?P<url>\S+)|for url \((?P<silent>https?://[^)\s]+)\)")
"""What `hf_xet` says: a status with its address, or an address that did not answer."""
_STORE_WORDS = re.compile(r"^(Network|Server|Authentication|Rate limited|Client|Request)\b.*error", re.IGNORECASE)
_QUOTA = re.compile(r"storage|quota|upgrade your plan|billing|limit reached", re.IGNORECASE)
_LOGIN = "Log in again with: hf auth login, or set HF_TOKEN"
_LIBRARIES = ("huggingface_hub", "hf_xet", "httpx", "json", "email", "http")


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request failed."""

    reason: str
    """What went wrong and what to do; `{tries}` stands for the number of attempts."""
    transient: bool = False
    """Whether another attempt may succeed."""
    answered: bool = True
    """Whether the Hub answered, so that it is known that the request did nothing."""
    wait: float | None = None
    """Seconds to wait before another attempt, if the Hub asks for it."""


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes: `huggingface_hub` wraps those of its upload threads."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def explain(error: BaseException, repo_id: str, token: str | None) -> Failure | None:
    """Say why a request failed; None for an error that comes neither from the Hub nor from the network.

    The reason never contains the token, or an address, which may be signed.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    causes = list(chain(error))
    # huggingface_hub raises RuntimeError for a failure in an upload thread, which it retried.
    in_store = any(type(cause) is RuntimeError for cause in causes)
    for cause in causes:
        if isinstance(cause, HubError):
            return Failure(str(cause))
        if isinstance(cause, GiveUpError):
            return Failure(str(cause), answered=cause.answered)
        if isinstance(cause, OfflineModeIsEnabled):
            return Failure("HF_HUB_OFFLINE is set; unset it")
        if isinstance(cause, HfHubHTTPError):
            return _of_lfs(cause) if in_store else _of_hub(cause, repo_id, token)
        if isinstance(cause, (ConnectionError, RuntimeError)) and any(
            pattern.search(str(cause)) for pattern in (_STORE, _STORE_WORDS)
        ):
            return _of_store(str(cause), repo_id, token)
    for cause in causes:
        if isinstance(cause, LocalEntryNotFoundError):
            continue
        if isinstance(cause, (ConnectionError, TimeoutError)) or type(cause).__module__.startswith(("httpx", "hf_xet")):
            return _of_network(cause, in_store)
    return _of_answer(error, causes, token)


def _of_hub(error: Any, repo_id: str, token: str | None) -> Failure:
    """Explain an answer of the Hub."""
    from huggingface_hub import errors

    response = error.response
    status, said = response.status_code, _said(error, token)
    if isinstance(error, errors.GatedRepoError):
        return Failure(gated(repo_id))
    if isinstance(error, errors.RevisionNotFoundError):
        return Failure(f"{repo_id} has no such revision ({status}). Correct it")
    if is_login_page(response):
        return Failure(LOGIN_PAGE)
    reasons = {
        401: f"the Hub rejects the token; it may have expired. {_LOGIN}",
        403: f"the token may not write to {repo_id}. Use a token with write access, and your own namespace",
        404: f"{repo_id} does not exist, or the token may not read it. Check the namespace and the token",
        409: f"another operation on {repo_id} is in progress, or the name is taken. Try again in a moment",
        412: f"somebody else committed to {repo_id} meanwhile. Review it, then try again",
        429: "too many requests, after {tries} attempts. Try again later",
    }
    if status == 403 and _QUOTA.search(said):
        reason = "the account's storage on the Hub is used up. Remove files there or upgrade its plan, then try again"
    elif status >= 500:
        reason = "the Hub failed {tries} times. Try again later"
    else:
        reason = reasons.get(status, "the Hub refuses")
    # A gateway gives up on a request that the Hub may still carry out.
    answered = status < 500 and status != 408
    what, stop, fix = reason.partition(". ")
    return Failure(f"{what} ({status}){stop}{fix}.{said}", status in TRANSIENT, answered, wait_asked(response))


def gated(repo_id: str) -> str:
    """Say where to ask for access to a gated repository."""
    from huggingface_hub import constants

    return (
        f"{repo_id} is gated: the Hub gives it to users who accepted its terms. Ask for access at "
        f"{constants.ENDPOINT}/{repo_id}, then log in: hf auth login"
    )


def _of_lfs(error: Any) -> Failure:
    """Explain an answer of the store for large files without Xet, which `huggingface_hub` retried."""
    status = error.response.status_code
    verb = "keeps failing" if status in TRANSIENT else "refuses"
    return Failure(f"the store for large files {verb} ({status})")


def _of_store(text: str, repo_id: str, token: str | None) -> Failure:
    """Explain what `hf_xet` says of the store for large files, Xet."""
    match = _STORE.search(text)
    if match is None:
        if "decoding response" in text:
            return Failure(LOGIN_PAGE)
        return Failure("the store for large files (Xet) failed {tries} times. Try again later", transient=True)
    address = urlsplit(match["url"] or match["silent"])
    host = address.hostname
    if match["status"] is None:
        reason = f"the store for large files (Xet, {host}) does not answer, {{tries}} times. A firewall may block it: "
        return Failure(f"{reason}{OLD_WAY}", transient=True)
    status = int(match["status"])
    if "/xet-write-token/" in address.path or "/xet-read-token/" in address.path:
        return _of_store_token(status, address.path, repo_id, token)
    if status in TRANSIENT:
        reason = f"the store for large files (Xet, {host}) keeps failing ({status}), {{tries}} times. Try again later"
        return Failure(reason, transient=True)
    what = "the list of what was uploaded" if "/shards" in address.path else "the upload"
    fix = "Update huggingface_hub and hf_xet" if "/shards" in address.path else "A proxy may block it"
    reason = f"the store for large files (Xet, {host}) refuses {what} ({status}). {fix}; {OLD_WAY}"
    return Failure(reason)


def _of_store_token(status: int, path: str, repo_id: str, token: str | None) -> Failure:
    """Explain why the Hub gave no access to the store: `hf_xet` hides what it said, so ask again."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import get_session, hf_raise_for_status  # type: ignore[attr-defined]  # not exported

    if status in TRANSIENT:
        return Failure("the Hub failed {tries} times. Try again later", transient=True)
    try:
        headers = HfApi(token=token)._build_hf_headers()
        hf_raise_for_status(get_session().get(constants.ENDPOINT + path, headers=headers))
    except HfHubHTTPError as error:
        said = _of_hub(error, repo_id, token).reason
    except Exception:  # noqa: BLE001 - the first answer is known, whatever happens to the second
        said = f"the token may not use it ({status})"
    else:
        said = f"the Hub refused ({status}), and then did not. Try again"
    return Failure(f"the Hub gives no access to its store for large files: {said}")


def _of_network(error: BaseException, in_store: bool) -> Failure:
    """Explain a connection that failed or brought no answer."""
    name = type(error).__name__
    if in_store:
        return Failure(f"the connection failed in every attempt ({name})")
    if name in ("ReadTimeout", "WriteTimeout", "PoolTimeout"):
        return Failure(
            f"the Hub did not answer within {network.BOUNDS.answer:g} seconds ({name})", True, answered=False
        )
    if name == "ConnectTimeout":
        reason = f"the Hub could not be reached within {network.BOUNDS.connect:g} seconds, {{tries}} times"
        return Failure(reason, transient=True)
    reason = f"the connection to the Hub failed ({name}), {{tries}} times"
    return Failure(reason, transient=True, answered=name == "ConnectError")


def _of_answer(error: BaseException, causes: list[BaseException], token: str | None) -> Failure | None:
    """Explain an answer that the Hub's libraries do not understand; None if none of them raised the error."""
    if any(type(cause) is RuntimeError for cause in causes):
        name = type(error).__name__
        return Failure(f"the connection failed in every attempt ({name})")
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or not str(last.tb_frame.f_globals.get("__name__", "")).startswith(_LIBRARIES):
        return None
    if type(error).__name__ == "JSONDecodeError":
        return Failure(LOGIN_PAGE, answered=False)
    if "LFS batch" in str(error):
        said = _clean(str(error).partition(":")[2], token)
        return Failure(f"the store for large files refuses: {said}")
    if not isinstance(error, (ValueError, TypeError, KeyError)):
        return None
    said = _clean(str(error), token)
    return Failure(f"the Hub's answer is not understood ({said}). Update huggingface_hub", answered=False)


def _said(failure: Any, token: str | None) -> str:
    """Return the Hub's message, without URLs, which may be signed, and without the token, which it may repeat."""
    text = _clean(failure.server_message or "", token)
    return f" The Hub says: {text}" if text else ""


def _clean(text: str, token: str | None) -> str:
    text = " ".join(_URL.sub("...", text).split())[:300]
    return text.replace(token, "...") if token else text
