"""Make requests to the Hub: within bounds, retried where that may help, with one HubError for any failure."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from lora_llava.errors import HubError
from lora_llava.system.hub import network
from lora_llava.system.hub.failures import explain

ATTEMPTS = 4
"""Attempts of a request. `huggingface_hub` itself retries some of its requests, up to 5 times."""
Result = TypeVar("Result")


class UnansweredError(HubError):
    """No answer came, so that it is unknown whether the request did something."""


def ask(
    what: str, repo_id: str, request: Callable[[], Result], token: str | None, *, attempts: int = ATTEMPTS
) -> Result:
    """Make a request, and retry failures that may pass, in `Bounds.patience` seconds; longer if a rate limit asks.

    `what` completes "cannot ..." in the error. Contract: `request` is safe to repeat. Raises HubError, which never
    contains the token or an address with a signature; UnansweredError if the request may have been carried out.
    """
    with network.bounded():
        # Without the waits that the Hub asks for: those have a bound of their own.
        start, asked = time.monotonic(), 0.0
        answered = True
        for attempt in range(1, attempts + 1):
            try:
                return request()
            except Exception as error:
                failure = explain(error, repo_id, token)
                if failure is None:
                    raise
                answered = answered and failure.answered
                late = time.monotonic() - start - asked > network.BOUNDS.patience
                if attempt == attempts or late or not failure.transient:
                    times = "once" if attempt == 1 else f"{attempt} times"
                    reason = failure.reason.replace("{tries} times", times).replace("{tries}", str(attempt))
                    kind = HubError if answered else UnansweredError
                    raise kind(f"cannot {what}: {reason}") from error
                wait = failure.wait
            time.sleep(network.BOUNDS.retry_delay * 2 ** (attempt - 1) if wait is None else wait)
            asked += wait or 0.0
    raise AssertionError("the last attempt returns or raises")
