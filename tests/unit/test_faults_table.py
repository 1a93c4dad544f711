"""The table of faults: every number from 1 to 65 is there, and every test it names exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAST = 65
ROWS = re.findall(
    r"^\| T(\d+) \| (.+?) \| (.+?) \|$", (ROOT / "docs/faults.md").read_text(encoding="utf-8"), re.MULTILINE
)


@cache
def names_in(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_number_has_a_row() -> None:
    assert [int(number) for number, _, _ in ROWS] == list(range(1, LAST + 1))


@pytest.mark.parametrize(("number", "fault", "held"), ROWS, ids=[f"T{number}" for number, _, _ in ROWS])
def test_what_holds_a_fault_exists(number: str, fault: str, held: str) -> None:
    assert len(fault) > 10
    named = re.findall(r"`(tests/[\w/]+\.py)`::(test_\w+)", held)
    for path, name in named:
        assert name in names_in(path), f"T{number}: {path} has no {name}"
    assert named or held.startswith("does not apply: ")
