"""What several files of tests share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.broken import Project
from tests.helpers.runs import write_data, write_recipe


@pytest.fixture
def project(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project that runs, in the current directory."""
    write_data(tmp_path)
    shutil.copytree(tiny_base, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    return Project(tmp_path, write_recipe(tmp_path, {"model_name_or_path": "./base"}))


@pytest.fixture
def masked_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attend within trees by masks, as on CUDA."""
    monkeypatch.setattr("lora_llava.modeling.attention.spans_of", lambda *_: None)
