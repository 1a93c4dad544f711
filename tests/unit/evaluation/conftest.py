"""Answers are computed in the test that asks for them."""

from __future__ import annotations

import pytest

from lora_llava.evaluation.scoring import exact_match


@pytest.fixture(autouse=True)
def _empty_caches() -> None:
    """A cached answer of an earlier test would hide that the code computes another one now."""
    for cached in (exact_match.answer_tokens, exact_match._bare_letter, exact_match._option_letter):
        cached.cache_clear()
