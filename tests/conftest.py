"""What all tests share: one thread, no network, and a tiny base model on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from lora_llava.system.hub.network import offline
from tests.helpers.tiny import save_tiny_base


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let `make torture` ask for more than the short form that every run of the tests has."""
    parser.addoption("--kills", type=int, default=4, help="moments at which tests/torture kills a run")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors are faster on one thread, and sums keep one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _hub_switch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command that finds no Hub says so to the libraries of its process, which is that of the other tests too."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE)
    before = {name: os.environ.get(name) for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")}
    offline.cache_clear()
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that `LlavaForConditionalGeneration.from_pretrained` loads; not to be written to."""
    return save_tiny_base(tmp_path_factory.mktemp("tiny") / "tiny-llava")
