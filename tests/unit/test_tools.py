"""Scripts of maintainers: what other software answers is compared with the kit's answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tools.foreign.__main__ import Check, _compared, verdict

CHECK = Check("software", "form", None, "ask", (), goal=0.9)


@pytest.mark.parametrize(
    ("answers", "equal", "asked", "said"),
    [
        (["a"] * 10, 10, 10, "ok"),
        (["a"] * 9 + ["b"], 9, 10, "ok"),
        (["a"] * 8 + ["b"] * 2, 8, 10, "missed: 90% wanted"),
        (["a"] * 8, 8, 10, "missed: 90% wanted"),
        ([], 0, 0, "ok"),
    ],
)
def test_a_missing_answer_counts_as_a_wrong_one(
    tmp_path: Path, answers: list[str], equal: int, asked: int, said: str
) -> None:
    for name, given in (("theirs", answers), ("ours", ["a"] * 10)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"answers": given}), encoding="utf-8")
        np.save(tmp_path / f"{name}.npy", np.ones((10, 4)))
    result = _compared(tmp_path / "theirs.json", tmp_path / "ours.json", 1.0)
    assert (result.equal, result.asked, result.difference) == (equal, asked, 0.0)
    assert verdict(CHECK, result, trained=True) == said
