"""docs/faults.md says which test holds which fault, as the tests' own markers do."""

from __future__ import annotations

from tests.faults import SECTIONS, TESTS, faults, page


def test_the_page_of_faults_is_up_to_date() -> None:
    text = (TESTS.parent / "docs/faults.md").read_text(encoding="utf-8")
    assert text == page(), "run: python -m tests.faults > docs/faults.md"


def test_faults_are_many_and_in_words() -> None:
    known = faults()
    assert len(known) > 60
    assert {fault.split(":")[0] for fault in known} == set(SECTIONS)
    assert all(len(fault.split()) > 1 for fault in known)
