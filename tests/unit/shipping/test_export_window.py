"""An export says which window of gray values the model was trained with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lora_llava import artifact
from lora_llava.artifact import Usage
from lora_llava.cli import cli, shipping
from lora_llava.shipping import export as exports


@pytest.mark.parametrize("window", [None, (0.0, 4095.0)])
@pytest.mark.parametrize("from_command", [False, True])
def test_an_export_says_which_grays_become_black_and_white(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: Any, from_command: bool
) -> None:
    usage = replace(Usage(None, "pad", None), window=window)
    monkeypatch.setattr(artifact, "read_usage", lambda *_: usage)
    monkeypatch.setattr(shipping, "check_export", lambda model, *_: model)
    monkeypatch.setattr(shipping, "open_model", lambda model, *_: model)
    monkeypatch.setattr(exports, "check_export", lambda model, *_: model)
    monkeypatch.setitem(exports.FORMATS, "hf", lambda *_: {"summary": ["done"]})
    if from_command:
        output = CliRunner().invoke(cli, ["export", str(tmp_path), str(tmp_path / "out"), "--format", "hf"]).stdout
        summary = output.splitlines()[-2 if window else -1 :]
    else:
        summary = exports.export(tmp_path, tmp_path / "out", "hf")["summary"]
    assert summary[0] == "done"
    assert len(summary) == (1 if window is None else 2)
    if window is not None:
        assert "images.window [0, 4095], which other software does not know" in summary[1]
        assert "with 0 as black and 4095 as white" in summary[1]
