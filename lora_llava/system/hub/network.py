"""Bound every wait for the Hub and for its store of large files; detect that the Hub cannot be reached."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import urlsplit

_REACHABLE_WITHIN = 2.0
"""Seconds in which the Hub must accept a connection; otherwise this machine counts as offline."""
TRANSIENT = (408, 429, 500, 502, 503, 504)
"""Statuses that another attempt may not meet."""
_OFFLINE = "HF_HUB_OFFLINE"
_TRUE = ("1", "on", "yes", "true")
_RATE_LIMIT = re.compile(r'"\w+"\s*;\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)')
"""The header `RateLimit` of the Hub, such as `"api";r=0;t=20`: no request is left for 20 seconds."""
OLD_WAY = "HF_HUB_DISABLE_XET=1 uploads another way"
LOGIN_PAGE = (
    "a web page came instead of the Hub's answer, as from the login page of a network. Open a browser and log in to "
    "the network, then try again"
)


@dataclass(frozen=True, slots=True)
class Bounds:
    """The longest waits, in seconds."""

    connect: float = 10.0
    """To connect. A firewall that drops packets never refuses a connection."""
    answer: float = 60.0
    """Without a byte of an answer. The Hub's own gateways give up on a request after 60."""
    patience: float = 60.0
    """Of failures, after which no further attempt is made: a longer outage is better waited out by the user."""
    retry_delay: float = 1.0
    """Before the second attempt; twice as long before each further one."""
    rate_limit: float = 300.0
    """In total, where the Hub's rate limit asks to wait. It counts requests in windows of 300."""
    store_answer: float = 120.0
    """For a block to be uploaded to the store of large files. `hf_xet` counts the upload itself, of up to 64 MB, so
    less would fail on a slow line."""
    store_retries: int = 1
    """Retries inside `hf_xet`, which come on top of those of `ask`."""
    store_delay: float = 1.0
    """Before such a retry."""
    store_silence: float = 250.0
    """Of an upload without progress. More than `hf_xet` waits for a block, since it says which request failed."""


BOUNDS = Bounds()


class GiveUpError(Exception):
    """Ends a request from within its hooks; the message says why."""

    def __init__(self, reason: str, *, answered: bool) -> None:
        super().__init__(reason)
        self.answered = answered
        """Whether the Hub answered, so that it is known that the request did nothing."""


class _Watch:
    """Watches the requests of one task: gives up after too long without a good answer, or on a login page."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        answer = dict.fromkeys(("read", "write", "pool"), bounds.answer)
        self._timeouts = {"connect": bounds.connect, **answer}
        self._thread = threading.local()
        self._limited = 0.0

    def on_request(self, request: Any) -> None:
        """Bound a request; give up instead of starting it if this thread's requests have failed for too long."""
        # Some methods of huggingface_hub override the session's timeouts with none.
        timeouts = request.extensions.setdefault("timeout", {})
        for name, bound in self._timeouts.items():
            if timeouts.get(name) is None:
                timeouts[name] = bound
        now = time.monotonic()
        since = getattr(self._thread, "since", None)
        if since is None:
            self._thread.since = now
        elif now - since > self._bounds.patience:
            raise GiveUpError(f"the Hub gave no good answer for {now - since:.0f} seconds", answered=False)

    def on_response(self, response: Any) -> None:
        """Note a good answer; give up if the Hub asks to wait too long, or if something else answers in its name."""
        status = response.status_code
        if status in TRANSIENT:
            if (seconds := wait_asked(response)) is not None:
                self._limited += seconds
                self._thread.since = None
                if self._limited > self._bounds.rate_limit:
                    asked = f"the Hub asks to wait {seconds:.0f} seconds before the next request ({status})"
                    raise GiveUpError(f"{asked}. Try again then", answered=True)
            return
        self._thread.since = None
        if is_login_page(response):
            raise GiveUpError(LOGIN_PAGE, answered=True)


def is_login_page(response: Any) -> bool:
    """Tell whether a response to a request of the Hub's API is a web page; errors of the Hub's gateways are, too."""
    is_page = str(response.headers.get("content-type", "")).startswith("text/html")
    first = response.history[0] if response.history else response
    return is_page and response.status_code < 500 and "/api/" in str(first.request.url)


def wait_asked(response: Any) -> float | None:
    """Return the seconds that a response asks to wait, by `Retry-After` or the Hub's `RateLimit`; None if none."""
    if match := re.fullmatch(r"\d+(\.\d+)?", response.headers.get("Retry-After", "").strip()):
        return float(match[0])
    if response.status_code == 429 and (limit := _RATE_LIMIT.search(response.headers.get("RateLimit", ""))):
        # The seconds are whole ones, rounded down.
        return float(limit[1]) + 1
    return None


@contextmanager
def bounded() -> Iterator[None]:
    """Bound the waits of `huggingface_hub` and `hf_xet` in this block.

    `huggingface_hub` opens a new session after an error of the connection, so its factory of sessions is replaced, not
    only the session. `hf_xet` reads its settings from the environment when it is first used; those of the user stay.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    bounds = BOUNDS
    watch = _Watch(bounds)
    for name, value in store_settings(bounds).items():
        os.environ.setdefault(name, value)
    previous = _http._GLOBAL_CLIENT_FACTORY

    def bounded_client() -> Any:
        client: Any = previous()
        hooks = client.event_hooks
        client.event_hooks = {
            "request": [*hooks["request"], watch.on_request],
            "response": [*hooks["response"], watch.on_response],
        }
        return client

    set_client_factory(bounded_client)
    try:
        yield
    finally:
        set_client_factory(previous)


def store_settings(bounds: Bounds) -> dict[str, str]:
    """Return the settings of `hf_xet`, as variables of the environment."""
    seconds = {
        "CONNECT_TIMEOUT": bounds.connect,
        "READ_TIMEOUT": bounds.store_answer,
        "RETRY_BASE_DELAY": bounds.store_delay,
    }
    settings = {f"HF_XET_CLIENT_{name}": f"{1000 * value:.0f}ms" for name, value in seconds.items()}
    return {**settings, "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": str(bounds.store_retries)}


@cache
def offline() -> bool:
    """Tell whether the Hub is switched off or cannot be reached; if so, switch its libraries to offline mode."""
    if os.environ.get(_OFFLINE, "").lower() in _TRUE:
        return True
    answers: list[bool] = []
    # In a thread, since a name lookup has no timeout.
    trying = threading.Thread(target=lambda: answers.append(_can_connect()), daemon=True)
    trying.start()
    trying.join(_REACHABLE_WITHIN)
    if answers == [True]:
        return False
    _switch_off()
    return True


def _can_connect() -> bool:
    from huggingface_hub import constants

    endpoint = urlsplit(constants.ENDPOINT)
    names = (f"{endpoint.scheme}_proxy", f"{endpoint.scheme}_proxy".upper(), "ALL_PROXY")
    proxy = next((value for name in names if (value := os.environ.get(name))), None)
    address = urlsplit(proxy if "://" in proxy else f"http://{proxy}") if proxy else endpoint
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        with socket.create_connection((str(address.hostname), port), timeout=_REACHABLE_WITHIN):
            return True
    # ValueError: the port of a proxy is not a number.
    except (OSError, ValueError):
        return False


def _switch_off() -> None:
    """Switch the Hub's libraries to offline mode, imported or not: at import they read the variables."""
    from huggingface_hub import constants

    os.environ[_OFFLINE] = "1"
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True
