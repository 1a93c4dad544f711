"""What all tests share: one thread, no network, and a tiny base model on disk.

Heavy imports are inside of the fixtures: the process that hands out the tests needs none.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from lora_llava.system.hub.network import offline

# As in every command of the kit; set before the first tokenizer is used.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let `make torture` ask for more than the short form that every run of the tests has."""
    parser.addoption("--kills", type=int, default=4, help="moments at which tests/torture kills a run")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Import all tests without collecting garbage; what the modules hold is not looked through again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors are faster on one thread, and sums keep one order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _no_flushes() -> Iterator[None]:
    """Leave out the flush of `os.fsync`, which no test can see: tests/helpers/disk.py sees the calls."""

    def fsync(handle: int) -> None:
        os.fstat(handle)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield


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
    from tests.helpers.tiny import save_tiny_base

    return save_tiny_base(tmp_path_factory.mktemp("tiny") / "tiny-llava")
