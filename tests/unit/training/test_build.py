"""How many workers the data loader gets."""

from __future__ import annotations

import os
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_llava.modeling.attention import set_attention
from lora_llava.modeling.packed import llava_in
from lora_llava.modeling.structure import FLEX, TREES
from lora_llava.training import build
from lora_llava.training.trainer import PackedTrainer
from tests.parity.test_packed import branches, build_model, row_of

Usage = namedtuple("Usage", "total used free")


def on(monkeypatch: pytest.MonkeyPatch, cores: int, shared: int, directory: Path = Path("/")) -> None:
    monkeypatch.setattr(build, "available_cores", lambda: cores)
    monkeypatch.setattr(build, "_SHARED_MEMORY", directory)
    monkeypatch.setattr(build.shutil, "disk_usage", lambda _: Usage(shared, 0, shared))


@pytest.mark.parametrize(("cores", "workers"), [(1, 2), (2, 2), (3, 2), (4, 3), (5, 4), (64, 4)])
def test_auto_takes_two_to_four_workers_on_cuda(monkeypatch: pytest.MonkeyPatch, cores: int, workers: int) -> None:
    on(monkeypatch, cores, 2**34)
    assert build.pick_num_workers("auto", "cuda") == (workers, "auto")
    assert build.pick_num_workers("auto", "cpu") == (0, "")
    # What is set is taken.
    assert build.pick_num_workers(7, "cuda") == (7, "")
    assert build.pick_num_workers(0, "cuda") == (0, "")


def test_auto_takes_no_worker_where_shared_memory_is_small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # As in a container that was started without --shm-size.
    on(monkeypatch, 8, 2**26)
    workers, why = build.pick_num_workers("auto", "cuda")
    assert workers == 0
    assert why == (
        "auto: / has 64 MiB free, workers need 512 MiB; start the container with --shm-size=1g, or set a number"
    )
    # Not every system has such a directory.
    on(monkeypatch, 8, 2**26, tmp_path / "none")
    assert build.pick_num_workers("auto", "cuda") == (4, "auto")


class Rows(list[Any]):
    """Rows, as a dataset that notes which process reads them."""

    def __getitem__(self, index: Any) -> Any:
        return {**super().__getitem__(index), "process": torch.tensor(os.getpid())}


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_list_the_blocks_of_flex_attention_and_no_others(workers: int) -> None:
    rows = Rows([row_of([branches(3), branches(1)], torch.float32), row_of([branches(2)], torch.float32)])
    trainer: Any = PackedTrainer.__new__(PackedTrainer)
    trainer.model, trainer.device, trainer.saver = build_model(), torch.device("cpu"), None
    trainer.args = type("Arguments", (), {"dataloader_num_workers": workers})
    for attention in (TREES, FLEX):
        set_attention(llava_in(trainer.model), attention)
        loaded = list(trainer.rows_loader(rows))
        assert len(loaded) == 2
        for row in loaded:
            assert ("full_q_indices" in row) is (attention == FLEX)
            assert (int(row["process"]) == os.getpid()) is (workers == 0)
