"""What was written is what was read, bit by bit."""

from __future__ import annotations

import torch

from lora_llava.errors import ArtifactError


def check_bits(ours: torch.Tensor, theirs: torch.Tensor, name: str) -> None:
    """Raise ArtifactError unless two tensors have one type, one shape and the same bytes."""
    same = ours.dtype == theirs.dtype and ours.shape == theirs.shape
    # As bytes: NaN then equals itself, and -0 does not equal 0.
    if not same or not torch.equal(_bytes(ours), _bytes(theirs)):
        raise ArtifactError(f"{name} was written otherwise than it was read; please report it")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)
