"""How many cases: few, and the same ones each time, in the tests; ten thousand new ones in `make fuzz`."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

MOST_MEMORY_KIB = 1_500 * 1024
"""Growth allowed to a process over a file of cases; MAX_PIXELS decoded, and converted, take less."""

_COMMON = {"database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("short", max_examples=60, deadline=None, derandomize=True, **_COMMON)
settings.register_profile("fuzz", max_examples=10_000, deadline=5_000, print_blob=True, **_COMMON)


def pytest_configure(config: pytest.Config) -> None:
    """Take the short form unless another is asked for."""
    if not config.getoption("--hypothesis-profile", None):
        settings.load_profile("short")


@pytest.fixture(scope="module", autouse=True)
def _bounded_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY_KIB
