"""Uploads to Xet are watched where `huggingface_hub` lets them be, and go through where it does not."""

from __future__ import annotations

import pytest
from huggingface_hub.utils import _xet

from lora_llava.system.hub.store import watched_upload


def test_k52_an_upload_goes_through_where_the_session_has_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(_xet, "_GLOBAL_XET_HOLDER")
    uploaded = []
    with watched_upload():
        uploaded.append("file")
    assert uploaded == ["file"]
