"""Checksum frozen weights before and after a stage, so that a changed base cannot go unnoticed."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import nn

from lora_llava.errors import TrainingError
from lora_llava.system.text import counted, listed
from lora_llava.training.checks.check import Check

CHUNK = 2**20
"""32-bit words summed at a time; with their products they take 20 MiB."""


class FrozenWeights(Check):
    """Checksums of all that a stage must not change: every parameter that is not trained, and every buffer."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.model: nn.Module | None = None
        self.bytes = 0
        self.sums: dict[str, str] = {}
        self.seconds = 0.0

    def before_training(self, model: nn.Module) -> None:
        """Checksum the frozen weights of `model`."""
        started = time.monotonic()
        self.model = model
        self.bytes = sum(held_part(tensor).nbytes for _, tensor in frozen_tensors(model))
        self.sums = _checksums(model)
        self.seconds = time.monotonic() - started

    def on_save(self) -> str | None:
        """Return a line that says that nothing changed; raise TrainingError, with the names, if something did.

        Saved after a change, weights would be loaded onto a base that they were not trained on.
        """
        if self.model is None:
            return None
        started = time.monotonic()
        after = _checksums(self.model)
        self.seconds += time.monotonic() - started
        names = [name for name in {**self.sums, **after} if self.sums.get(name) != after.get(name)]
        if names:
            raise TrainingError(
                f"stage {self.stage}: {len(names)} of {len(self.sums):,} frozen weights changed while it trained: "
                f"{listed(names, separator='; ')}. Nothing more is saved, since it would not fit its base. The cause "
                "is faulty memory, or a bug in a library: resume with --resume; if it happens again, report it with "
                "the versions that lora-llava env prints."
            )
        return (
            f"checked: the frozen weights did not change ({counted(len(after), 'tensor')}, "
            f"{self.bytes / 2**20:,.0f} MiB, in {self.seconds:.1f} s)"
        )


def frozen_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield frozen parameters, buffers, and the scales of 4-bit weights."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            yield name, parameter
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            yield f"{name}.absmax", state.absmax
            if state.nested:
                yield f"{name}.nested_absmax", state.state2.absmax
                yield f"{name}.offset", state.offset
    yield from model.named_buffers()


def held_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this process holds of a tensor: its part if it is sharded, else the whole."""
    part: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def _checksums(model: nn.Module) -> dict[str, str]:
    """Checksum every frozen tensor, each on its own device."""
    return {name: checksum(tensor) for name, tensor in frozen_tensors(model)}


@torch.no_grad()
def checksum(tensor: torch.Tensor) -> str:
    """Return a checksum of dtype, shape and bits: SHA-256 on a CPU; elsewhere that of sums computed on the device.

    Of a sharded tensor, it is that of this process's part.
    """
    data = held_part(tensor).detach().contiguous().flatten().view(torch.uint8)
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(data.numpy().data if data.device.type == "cpu" else str(chunk_sums(data)).encode())
    return digest.hexdigest()


def chunk_sums(data: torch.Tensor) -> list[int]:
    """Hash bytes chunk by chunk on their device.

    32-bit words times random 64-bit factors are added modulo 2^64 (multilinear hashing, Carter and Wegman 1979), so the
    order in which a GPU adds does not matter. A change goes undetected with probability at most 2^-32. This does not
    protect against an attacker, who could compute the factors.
    """
    sums = [_sum(chunk) for chunk in data.split(4 * CHUNK)]
    # Synchronizes with the device once per tensor.
    return torch.stack(sums).tolist() if sums else []


def _sum(data: torch.Tensor) -> torch.Tensor:
    missing = -data.numel() % 4
    if missing or data.storage_offset() % 4:
        # A view as int32 must start at a multiple of four bytes.
        data = torch.cat([data, data.new_zeros(missing)])
    words = data.view(torch.int32).long()
    return (words * _factors(data.device)[: words.numel()]).sum()


@lru_cache(maxsize=1)
def _factors(device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    limits = torch.iinfo(torch.int64)
    return torch.randint(limits.min, limits.max, (CHUNK,), dtype=torch.int64, generator=generator).to(device)
