"""Whether the Hub can be reached: by a proxy if one is set, and never with an exception."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from lora_llava.system.hub import network


@pytest.mark.parametrize(
    ("proxy", "address"),
    [
        ("", ("huggingface.co", 443)),
        ("http://proxy:3128", ("proxy", 3128)),
        ("proxy:3128", ("proxy", 3128)),
        ("https://proxy", ("proxy", 443)),
        ("http://proxy:port", None),
    ],
)
def test_the_hub_is_reached_by_the_proxy(
    monkeypatch: pytest.MonkeyPatch, proxy: str, address: tuple[str, int] | None
) -> None:
    tried: list[Any] = []

    def refuse(where: tuple[str, int], timeout: float) -> socket.socket:
        tried.append(where)
        raise OSError("refused")

    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://huggingface.co")
    monkeypatch.setattr(socket, "create_connection", refuse)
    for name in ("https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    assert not network._can_connect()
    assert tried == ([address] if address else [])
