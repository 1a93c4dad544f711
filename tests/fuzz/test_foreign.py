"""Directories of strangers: a loader ends in seconds, with a model or one LoraLlavaError, and writes nothing else."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils import logging as transformers_logging

import tests.fuzz.foreign as foreign
from lora_llava.errors import LoraLlavaError
from tests.fuzz.__main__ import Tally, main, run_chunk
from tests.fuzz.converters import CONVERTERS
from tests.fuzz.foreign import LOADERS, Load, Loader, Sandbox, make_loaders

# A model is loaded for each example; `python -m tests.fuzz` tries thousands.
FEW = settings(max_examples=15, deadline=None)
SEEDS = st.integers(0, 2**48)


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    yield
    transformers_logging.set_verbosity(before)


@pytest.fixture(scope="module")
def sandboxes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Sandbox]:
    directory = tmp_path_factory.mktemp("foreign")
    loaders = make_loaders(directory / "models")
    assert tuple(loaders) == LOADERS
    proved: dict[str, Sandbox] = {}

    def sandbox(name: str) -> Sandbox:
        if name not in proved:
            proved[name] = Sandbox(directory / name, loaders[name])
        return proved[name]

    return sandbox


@FEW
@given(seed=SEEDS)
@pytest.mark.parametrize("name", LOADERS)
def test_damaged_directories(sandboxes: Callable[[str], Sandbox], name: str, seed: int) -> None:
    sandboxes(name).try_one(seed)


def _raise(copy: Path, out: Path) -> None:
    raise ValueError("a damaged file")


def _write_beside(copy: Path, out: Path) -> None:
    (out.parent / "other.txt").write_text("x", encoding="utf-8")


def _write_into(copy: Path, out: Path) -> None:
    (copy / "a.txt").write_text("other", encoding="utf-8")


def _refuse_half(copy: Path, out: Path) -> None:
    out.mkdir()
    raise LoraLlavaError("no")


def _sleep(copy: Path, out: Path) -> None:
    time.sleep(foreign.SECONDS + 0.2)


def _calculate(copy: Path, out: Path) -> None:
    while True:
        pass


def _hold_memory(copy: Path, out: Path) -> None:
    bytearray(foreign.MOST_KIB * 1024 + 2**24)


def _print_escapes(copy: Path, out: Path) -> None:
    # Past the capture of pytest, as libraries in other languages write.
    os.write(1, b"\x1b[2J")


def _die(copy: Path, out: Path) -> None:
    os._exit(9)


FAULTY: dict[str, tuple[Load, str]] = {
    "raises": (_raise, "ValueError"),
    "writes elsewhere": (_write_beside, "AssertionError"),
    "changes what it reads": (_write_into, "AssertionError"),
    "leaves half a result": (_refuse_half, "AssertionError"),
    "sleeps": (_sleep, "Endless"),
    "calculates": (_calculate, "Endless"),
    "holds memory": (_hold_memory, "AssertionError"),
    "obeys a terminal": (_print_escapes, "not safe for a terminal"),
    "dies": (_die, "the process ended with 9"),
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_faulty_loader_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(foreign, "SECONDS", 0.5)
    monkeypatch.setattr(foreign, "MOST_KIB", 2**16)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.txt").write_text("text", encoding="utf-8")
    sandbox = Sandbox(tmp_path / "sandbox", Loader(tmp_path / "source", lambda *_: None))
    sandbox.load, kind = FAULTY[name]
    tally = Tally()
    faults = run_chunk(sandbox, tally, 2)
    # One that dies ends its chunk.
    faults += run_chunk(sandbox, tally, 2)
    assert tally.cases == 2
    assert [fault["case"] for fault in faults] == ["0", "1"]
    assert all(kind in fault["kind"] for fault in faults), faults


def test_an_unknown_loader_is_named_with_the_known_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["fuzz", "--loader", "guff"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "invalid choice: 'guff'" in said
    assert all(name in said for name in (*LOADERS, *CONVERTERS))
