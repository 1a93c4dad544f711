"""Frozen linear layers that read the same input, and their LoRA, as few products as possible.

Of a layer with weight W (out, in), LoRA factors A (r, in), B (out, r) and scaling s:

    y = x W^T + s (x A^T) B^T

The second term is added by the product itself (`addmm_`), and layers with the same input share one product with their
A's, stacked. Shapes: x (T, in), y (T, out), inner = x A^T (T, sum of r).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.functional import dequantize_blockwise
from torch import nn


class FactorCopies:
    """LoRA's factors of all layers in the compute dtype, refreshed by one call for each row.

    They are refreshed for each row, not when a factor's version changes: bitsandbytes' optimizers write through
    pointers and leave the version as it was.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._factors: list[nn.Module] = []
        self._copies: list[torch.Tensor] = []

    def stack(self, factors: Sequence[Any]) -> torch.Tensor:
        """Return a buffer for the weights of `factors`, all of the same width, one below the other."""
        rows = [factor.weight.shape[0] for factor in factors]
        weight = factors[0].weight
        stacked = torch.empty(sum(rows), weight.shape[1], dtype=self.dtype, device=weight.device)
        self._factors += factors
        self._copies += stacked.split(rows)
        return stacked

    def refresh(self) -> None:
        """Copy every factor, cast to the compute dtype."""
        if self._factors:
            with torch.no_grad():
                torch._foreach_copy_(self._copies, [factor.weight for factor in self._factors])


@dataclass(slots=True)
class _Branch:
    """One linear layer: its frozen part, and its LoRA if it has one."""

    linear: Any
    """`nn.Linear`, or `Linear4bit`."""
    rank: int = 0
    """0: no LoRA."""
    scaling: float = 0.0
    factors: tuple[Any, ...] = ()
    """A and B as PEFT's linear layers: what the optimizer trains."""
    b: torch.Tensor | None = None
    """Copy of B (out, r) in the compute dtype."""


class Projection:
    """Linear layers of one input."""

    def __init__(self, modules: Sequence[Any], copies: FactorCopies) -> None:
        """Read `modules`, plain layers or PEFT's around them; `why_not_fused` has accepted them."""
        self.dtype = copies.dtype
        self.adapted = [module for module in modules if hasattr(module, "lora_A")]
        self.branches = [_branch(module, copies) for module in modules]
        self.ranks = [branch.rank for branch in self.branches if branch.rank]
        self.a = copies.stack([branch.factors[0] for branch in self.branches if branch.rank]) if self.ranks else None
        """Copies of all A's (sum of r, in)."""

    def factors(self) -> list[torch.Tensor]:
        """Return the trained A and B of each layer that has LoRA, in the order of `backward`'s gradients."""
        return [factor.weight for branch in self.branches for factor in branch.factors]

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """Return the outputs (T, out) of each layer, plus `residual`, and `inner`, which `backward` needs."""
        inner = None if self.a is None else x @ self.a.t()
        parts = self._per_adapter(inner)
        outputs = []
        for branch in self.branches:
            weight = _frozen_weight(branch.linear, self.dtype).t()
            out = x @ weight if residual is None else torch.addmm(residual, x, weight)
            if branch.b is not None:
                out.addmm_(parts.pop(0), branch.b.t(), alpha=branch.scaling)
            outputs.append(out)
        return outputs, inner

    def backward(
        self, dys: Sequence[torch.Tensor], x: torch.Tensor | None, inner: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the gradient of the input, and those of `factors` in fp32.

        `dys`: gradients of the outputs (T, out). `x` is read only where a layer has LoRA.
        """
        # Through the frozen weights.
        dx: torch.Tensor | None = None
        for branch, dy in zip(self.branches, dys, strict=True):
            weight = _frozen_weight(branch.linear, self.dtype)
            dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
        assert dx is not None
        if self.a is None or inner is None or x is None:
            return dx, []

        # Through each B, into one gradient of `inner`. With beta = 0, what the output held does not count.
        d_inner = torch.empty_like(inner)
        parts, d_parts = self._per_adapter(inner), self._per_adapter(d_inner)
        d_bs = []
        adapted = [(branch, dy) for branch, dy in zip(self.branches, dys, strict=True) if branch.rank]
        for (branch, dy), part, d_part in zip(adapted, parts, d_parts, strict=True):
            torch.addmm(d_part, dy, branch.b, beta=0, alpha=branch.scaling, out=d_part)
            d_bs.append(torch.addmm(branch.b, dy.t(), part, beta=0, alpha=branch.scaling).float())

        # Through all A's at once.
        dx.addmm_(d_inner, self.a)
        d_as = (d_inner.t() @ x).float().split(self.ranks)
        return dx, [gradient for pair in zip(d_as, d_bs, strict=True) for gradient in pair]

    def _per_adapter(self, inner: torch.Tensor | None) -> list[torch.Tensor]:
        """Split (T, sum of r) into views, one for each layer with LoRA."""
        return [] if inner is None else list(inner.split(self.ranks, dim=1))


def _branch(module: Any, copies: FactorCopies) -> _Branch:
    if not hasattr(module, "lora_A"):
        return _Branch(module)
    [adapter] = module.active_adapters
    a, b = module.lora_A[adapter], module.lora_B[adapter]
    scaling = float(module.scaling[adapter])
    return _Branch(module.base_layer, a.weight.shape[0], scaling, (a, b), copies.stack([b]))


def _frozen_weight(linear: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight (out, in) of a frozen linear layer, dequantized to `dtype` if it is in NF4."""
    weight = linear.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        plain: torch.Tensor = weight.data
        return plain
    scales = state.absmax
    if state.nested:
        scales = dequantize_blockwise(scales, state.state2) + state.offset
    # The operator itself: bitsandbytes' function around it costs more than the launch.
    dequantize = torch.ops.bitsandbytes.dequantize_4bit.default
    dequantized: torch.Tensor = dequantize(weight.data, scales, state.blocksize, state.quant_type, state.shape, dtype)
    return dequantized
