"""Add up gradients and counts over the processes of a run, once a step.

Each process has the whole model and adds the gradients of its own rows, with as many forward passes as it has rows:
only the sums travel, after the last row. That needs no memory but for one bucket, and no process waits for another
within a step, whatever its rows hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

from lora_llava.system.ranks import is_alone

BUCKET_BYTES = 2**26
"""Largest amount of gradients that one all-reduce adds up; they are copied to one tensor for it."""


class Gradients(Protocol):
    """The gradients of an optimizer step: how they are added up, and what the loop and its checks see of them."""

    def before_row(self) -> torch.Tensor | None:
        """Prepare the forward pass of a row; return what its loss adds, if anything: a scalar 0."""

    def backward(self, loss: torch.Tensor, *, has_image: bool) -> None:
        """Add the gradients of a row; `has_image`: whether the projector has any."""

    def idle(self) -> None:
        """Take part in a pass in which this process has no row."""

    def complete(self) -> None:
        """Add up the gradients of all processes, after the last row of the step."""

    def norms(self) -> Mapping[str, torch.Tensor]:
        """Compute the norm of the sums of each group, such as lora and projector: scalars; 0 without gradients."""

    def clip(self, max_norm: float) -> torch.Tensor:
        """Scale the sums to a total norm of at most `max_norm`, if it is not 0; return the norm before, a scalar."""

    def drop(self) -> None:
        """Forget the gradients of a step that is not applied: it changes neither weights nor the optimizer's state."""


class WholeGradients:
    """Gradients in `parameter.grad`, whole in every process."""

    def __init__(self, model: nn.Module, groups: Mapping[str, Sequence[nn.Parameter]]) -> None:
        """Handle the gradients of `model`; `groups`: its trained parameters, by the name of their group."""
        self.model, self.groups = model, groups

    def before_row(self) -> None:
        """Do nothing: a row completes the gradients that it has."""

    def backward(self, loss: torch.Tensor, *, has_image: bool) -> None:
        """Add the gradients of a row."""
        loss.backward()

    def idle(self) -> None:
        """Do nothing: processes wait for each other only in `complete`."""

    def complete(self) -> None:
        """Add up the gradients of all processes."""
        sum_gradients(list(chain.from_iterable(self.groups.values())))

    def norms(self) -> dict[str, torch.Tensor]:
        """Compute the norm of each group, a scalar; 0 without gradients."""
        return {
            name: get_total_norm([weight.grad for weight in parameters if weight.grad is not None])
            for name, parameters in self.groups.items()
        }

    def clip(self, max_norm: float) -> torch.Tensor:
        """Clip the gradients to a total norm of `max_norm`, if it is not 0; return the norm before."""
        return clip_grad_norm_(self.model.parameters(), max_norm or math.inf)

    def drop(self) -> None:
        """Free the gradients."""
        self.model.zero_grad()


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
    # On the CPU, so that nothing waits for the device.
    has_gradient = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
    dist.all_reduce(has_gradient, dist.ReduceOp.MAX)
    reached = [weight for weight, is_reached in zip(parameters, has_gradient.tolist(), strict=True) if is_reached]
    for bucket in _buckets(reached):
        gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in bucket]
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
