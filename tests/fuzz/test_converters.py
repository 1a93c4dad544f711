"""Published data sets that were damaged: a converter ends in seconds, with whole records or one LoraLlavaError."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.converters import CONVERTERS, make_converters
from tests.fuzz.foreign import Sandbox
from tests.helpers.published_sets import needs_pydicom

NAMES = [pytest.param(name, marks=needs_pydicom if name == "dicom" else ()) for name in CONVERTERS]


@pytest.fixture(scope="module")
def sandbox_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Sandbox]:
    directory = tmp_path_factory.mktemp("converters")
    proved: dict[str, Sandbox] = {}

    def sandbox(name: str) -> Sandbox:
        if name not in proved:
            proved[name] = Sandbox(directory / name, make_converters(directory / "sets", (name,))[name])
        return proved[name]

    return sandbox


# `python -m tests.fuzz` tries thousands.
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**48))
@pytest.mark.parametrize("name", NAMES)
def test_damaged_sets(sandbox_of: Callable[[str], Sandbox], name: str, seed: int) -> None:
    sandbox_of(name).try_one(seed)
