"""What the machine has, and what a process has held."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_llava.errors import ModelError
from lora_llava.modeling.structure import FP16
from lora_llava.system.device import (
    CUDA_CONTEXT,
    autocast,
    free_memory_bytes,
    left_by_control_groups,
    memory_capped,
    peak_memory_bytes,
    pick_dtype,
    precision_line,
    reset_peak_memory,
)

CHILD = "from lora_llava.system.device import peak_memory_bytes; print(peak_memory_bytes())"
HELD = 3 * 2**29
GIB = 2**30


def test_a_process_does_not_count_what_its_parent_held() -> None:
    held = bytearray(HELD)
    held[:: 2**12] = b"1" * len(held[:: 2**12])
    child = subprocess.run([sys.executable, "-c", CHILD], check=True, capture_output=True, text=True)
    assert peak_memory_bytes() >= HELD
    assert int(child.stdout) < HELD / 2


def test_each_phase_has_its_own_peak() -> None:
    held = bytearray(HELD)
    held[:: 2**12] = b"1" * len(held[:: 2**12])
    before = peak_memory_bytes()
    del held
    reset_peak_memory()
    assert peak_memory_bytes() < before - HELD / 2


@pytest.mark.parametrize(
    ("precision", "device", "has_bf16", "dtype"),
    [
        ("auto", "cpu", False, torch.float32),
        ("auto", "cuda", True, torch.bfloat16),
        ("auto", "cuda", False, torch.float16),
        ("fp32", "cuda", True, torch.float32),
        ("fp16", "cuda", True, torch.float16),
        ("fp16", "cuda", False, torch.float16),
        ("bf16", "cuda", True, torch.bfloat16),
    ],
)
def test_auto_takes_fp16_where_a_card_has_no_bf16(
    monkeypatch: pytest.MonkeyPatch, precision: str, device: str, has_bf16: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bf16)
    assert pick_dtype(precision, torch.device(device)) == dtype


@pytest.mark.parametrize(("precision", "device"), [("bf16", "cpu"), ("fp16", "cpu"), ("bf16", "cuda")])
def test_a_precision_that_the_device_lacks_is_refused(
    monkeypatch: pytest.MonkeyPatch, precision: str, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    with pytest.raises(ModelError, match=f"precision: {precision} is not supported on this {device}; use auto or fp32"):
        pick_dtype(precision, torch.device(device))


def test_a_run_says_why_it_computes_in_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    why = precision_line("auto", torch.float16)
    assert why is not None
    assert why.startswith("precision: fp16 (auto: bf16 needs compute capability 8.0, this card has 7.5); ")
    assert precision_line("fp16", FP16) == precision_line("fp16", torch.float16) != why
    assert precision_line("auto", torch.bfloat16) is precision_line("fp32", torch.float32) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products_are_in_the_compute_dtype(dtype: torch.dtype) -> None:
    with autocast(torch.device("cpu"), dtype):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert not torch.is_autocast_enabled("cpu")


class Card:
    """Takes the calls to a CUDA device of 80 GiB, of which another process holds 2 GiB."""

    def __init__(self, patch: pytest.MonkeyPatch, reserved: int = 0) -> None:
        self.share, self.shares = 1.0, []
        self.free, self.total = 78 * GIB, 80 * GIB
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "mem_get_info", lambda: (self.free - reserved, self.total))
        patch.setattr(torch.cuda, "memory_reserved", lambda: reserved)
        patch.setattr(torch.cuda, "empty_cache", lambda: None)
        patch.setattr(torch.cuda, "set_per_process_memory_fraction", self.cap)
        patch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: self.share)

    shares: list[float]

    def cap(self, share: float) -> None:
        assert 0.0 <= share <= 1.0
        self.share = share
        self.shares.append(share)


def test_memory_caps_the_process_on_cuda_and_the_cap_ends_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch, reserved=3 * GIB)
    assert free_memory_bytes("cuda") == 75 * GIB

    def fail() -> None:
        assert card.share * card.total == pytest.approx(24 * GIB - CUDA_CONTEXT)
        # What is free for the rest of the run, such as for answers, ends at the cap, too.
        assert free_memory_bytes("cuda") == pytest.approx(21 * GIB - CUDA_CONTEXT, abs=1)
        raise KeyError

    with pytest.raises(KeyError), memory_capped(24 * GIB):
        fail()
    assert card.share == 1.0


@pytest.mark.parametrize(("memory", "shares"), [(None, []), (200 * GIB, [1.0, 1.0])])
def test_no_memory_given_is_no_cap_and_more_than_the_card_has_is_its_own(
    monkeypatch: pytest.MonkeyPatch, memory: Any, shares: list[float]
) -> None:
    card = Card(monkeypatch)
    with memory_capped(memory):
        pass
    assert card.shares == shares


def test_the_peak_on_cuda_is_what_was_reserved_since_it_is_counted_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA graphs compute in is reserved alone; what an earlier phase left in the cache is not counted."""
    Card(monkeypatch)
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 7 * GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5 * GIB)
    reset_peak_memory()
    assert calls == ["empty", "reset"]
    assert peak_memory_bytes() == 7 * GIB


def test_a_cap_on_a_cpu_changes_nothing() -> None:
    with memory_capped(GIB):
        assert free_memory_bytes("cpu") > 0


V2 = ("", "memory.max", "memory.current", "inactive_file")
V1 = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def write_group(directory: Path, names: Sequence[str], limit: str, used: int, cached: int) -> None:
    """A control group as the kernel shows it; `names`: of the limit, the usage, and the cached files."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / names[1]).write_text(f"{limit}\n")
    (directory / names[2]).write_text(f"{used}\n")
    (directory / "memory.stat").write_text(f"anon 5\n{names[3]} {cached}\n")


@pytest.mark.parametrize("names", [V2, V1])
def test_memory_limits_of_a_group_and_its_parents_count_without_cached_files(
    tmp_path: Path, names: Sequence[str]
) -> None:
    top, own = tmp_path / "fs" / names[0], tmp_path / "cgroup"
    own.write_text(f"3:cpu:/elsewhere\n{'4:hugetlb,memory' if names[0] else '0:'}:/jobs/one\n")
    write_group(top, names, "max", 90, 0)
    write_group(top / "jobs", names, "1000", 400, 100)
    write_group(top / "jobs/one", names, "500", 100, 20)
    write_group(top / "jobs/two", names, "1", 1, 0)
    write_group(tmp_path, names, "2", 1, 0)
    assert left_by_control_groups(tmp_path / "fs", own) == [420, 700]


@pytest.mark.parametrize("limit", ["max", "40"])
def test_a_containers_limit_is_at_the_root_whatever_the_host_calls_the_group(tmp_path: Path, limit: str) -> None:
    own = tmp_path / "cgroup"
    own.write_text("0::/docker/abc\n")
    write_group(tmp_path / "fs", V2, limit, 50, 5)
    assert left_by_control_groups(tmp_path / "fs", own) == ([0] if limit == "40" else [])
    assert left_by_control_groups(tmp_path / "none", own) == left_by_control_groups(tmp_path, tmp_path / "none") == []


def test_the_free_memory_of_a_machine_is_within_its_control_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_llava.system.device.left_by_control_groups", lambda: [5 * GIB, 3])
    assert free_memory_bytes("cpu") == 3
