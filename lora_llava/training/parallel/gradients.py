"""Add up gradients and counts over the processes of a run, once a step.

Each process has the whole model and adds the gradients of its own rows, with as many forward passes as it has rows:
only the sums travel, after the last row. That needs no memory but for one bucket, and no process waits for another
within a step, whatever its rows hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn

from lora_llava.system.ranks import is_alone

BUCKET_BYTES = 2**26
"""Gradients that travel at one time; they are copied once."""


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all processes; in a single process the tensor itself."""
    if is_alone():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


@torch.no_grad()
def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace each gradient by its sum over all processes.

    A parameter that has no gradient in any process keeps none, so the optimizer leaves it alone, as in a single one.
    """
    if is_alone():
        return
    # Over the CPU, which does not wait for the device.
    has_gradient = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
    dist.all_reduce(has_gradient, dist.ReduceOp.MAX)
    reached = [one for one, is_reached in zip(parameters, has_gradient.tolist(), strict=True) if is_reached]
    for bucket in _buckets(reached):
        gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in bucket]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in gradients])
        for parameter, gradient, part in zip(bucket, gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
            parameter.grad = gradient


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield consecutive parameters of one dtype and device, at most `BUCKET_BYTES` unless a single one is larger."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        is_alike = not bucket or (parameter.dtype, parameter.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (not is_alike or size + parameter.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.nbytes
    if bucket:
        yield bucket
