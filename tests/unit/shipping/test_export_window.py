"""An export says which window of gray values the model was trained with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_llava import artifact
from lora_llava.artifact import Usage
from lora_llava.shipping import export as exports


@pytest.mark.parametrize(("window", "lines"), [(None, ["done"]), ((0.0, 4095.0), ["done", "told"])])
def test_an_export_says_which_grays_become_black_and_white(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: Any, lines: list[str]
) -> None:
    usage = replace(Usage(None, "pad", None), window=window)
    monkeypatch.setattr(artifact, "read_usage", lambda *_: usage)
    monkeypatch.setitem(exports.FORMATS, "hf", lambda *_: {"summary": ["done"]})
    summary = exports.export(tmp_path, tmp_path / "out", "hf")["summary"]
    assert len(summary) == len(lines)
    if window is not None:
        assert "images.window [0, 4095], which other software does not know" in summary[1]
        assert "with 0 as black and 4095 as white" in summary[1]
