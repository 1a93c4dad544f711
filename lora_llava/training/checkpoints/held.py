"""Copy what a checkpoint holds to the host, so that it can be written while the training continues."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import nn

from lora_llava.training.checkpoints.files import Progress


@dataclass(frozen=True, slots=True)
class HeldWeights:
    """The trained weights of a step, copied to the host."""

    progress: Progress
    weights: dict[str, torch.Tensor]

    @classmethod
    def of(cls, model: nn.Module, progress: Progress) -> HeldWeights:
        """Copy the trained weights of `model`."""
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        return cls(progress, copy_to_host(trained))


def copy_to_host(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return contiguous copies on the host that share no memory, with one wait for the device."""
    copies = {name: _empty_on_host(tensor) for name, tensor in tensors.items()}
    on_device = [name for name, tensor in tensors.items() if tensor.device.type == "cuda"]
    with torch.no_grad():
        for name in on_device:
            copies[name].copy_(tensors[name], non_blocking=True)
        if on_device or torch.cuda.is_initialized():
            torch.cuda.synchronize()
        # The device may write to host tensors, too: those of paged optimizers. So they are read after the wait.
        for name in tensors.keys() - set(on_device):
            copies[name].copy_(tensors[name])
    return copies


def _empty_on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return an uninitialized tensor on the host; pinned for the copy of a CUDA tensor, if the host has the memory."""
    if tensor.device.type == "cuda":
        with suppress(RuntimeError):
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return torch.empty(tensor.shape, dtype=tensor.dtype)
