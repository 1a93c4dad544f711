"""The table of cases: every case has tests of its number in each of the files that it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = re.findall(
    r"^\| K(\d+) \| .+? \| .+? \| (.+?) \|$", (ROOT / "docs/cases.md").read_text(encoding="utf-8"), re.MULTILINE
)


def test_every_case_has_one_row() -> None:
    numbers = [int(number) for number, _ in ROWS]
    assert numbers == sorted(set(numbers))
    assert len(numbers) > 40


@pytest.mark.parametrize(("number", "files"), ROWS, ids=[f"K{number}" for number, _ in ROWS])
def test_what_holds_a_case_exists(number: str, files: str) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)`", files)
    assert named
    for path in named:
        text = (ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"^def test_(?:k\d+_)*k{number}_", text, re.MULTILINE), f"{path} has no test of K{number}"


def test_every_test_of_a_case_is_of_one_in_the_table() -> None:
    known = {number for number, _ in ROWS}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for name in re.findall(r"^def test_((?:k\d+_)+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert set(re.findall(r"k(\d+)_", name)) <= known, f"{path}: {name}"
