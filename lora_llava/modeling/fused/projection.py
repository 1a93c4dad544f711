"""Frozen linear layers that read the same input, and their LoRA, as few products as possible.

Of a layer with weight W (out, in), LoRA factors A (r, in), B (out, r) and scaling s:

    y = x W^T + s (x A^T) B^T

The second term is added by the product itself (`addmm_`), and layers with the same input share one product with their
A's, stacked. Shapes: x (T, in), y (T, out), inner = x A^T (T, sum of r).

With dropout each A reads its own part of x: x times a mask (T, in) of zeros and ones with mean 1 - p, and s / (1 - p)
takes the place of s. Masks are drawn in PEFT's order, and once more in the backward pass instead of being kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.functional import dequantize_blockwise
from torch.nn import functional as F

Drawn = torch.Tensor
"""The state of a random number generator before dropout drew from it; on the host."""


class FactorCopies:
    """LoRA's factors of all layers in the compute dtype, refreshed by one call for each row.

    They are refreshed for each row, not when a factor's version changes: bitsandbytes' optimizers write through
    pointers and leave the version as it was.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._factors: list[torch.Tensor] = []
        self._copies: list[torch.Tensor] = []

    def stack(self, factors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return a buffer for `factors` (r, width), one below the other; a single one in the right dtype itself."""
        if len(factors) == 1 and factors[0].dtype == self.dtype:
            return factors[0]
        rows = [len(factor) for factor in factors]
        stacked = torch.empty(sum(rows), factors[0].shape[1], dtype=self.dtype, device=factors[0].device)
        self._factors += factors
        self._copies += stacked.split(rows)
        return stacked

    def refresh(self) -> None:
        """Copy every factor, cast to the compute dtype."""
        if self._factors:
            with torch.no_grad():
                torch._foreach_copy_(self._copies, self._factors)


class _FrozenWeight:
    """The weight (out, in) of a frozen linear layer, plain or in NF4."""

    def __init__(self, linear: Any, dtype: torch.dtype) -> None:
        self._linear = linear
        # Shares the parameter's memory. Reading it from the parameter in each pass would go through the Python of
        # bitsandbytes' tensor class.
        self._data: torch.Tensor | None = linear.weight.data
        self._state = getattr(linear.weight, "quant_state", None)
        self._dtype = dtype

    def read_anew(self) -> None:
        """Read the weight from its layer in each pass from here on, and hold no reference to it."""
        self._data = None

    def dequantized(self) -> torch.Tensor:
        """Return the weight in the compute dtype."""
        data: torch.Tensor = self._linear.weight.data if self._data is None else self._data
        state = self._state
        if state is None:
            return data
        scales = state.absmax
        if state.nested:
            scales = dequantize_blockwise(scales, state.state2) + state.offset
        # The operator itself: bitsandbytes' function around it costs more than the launch.
        weight: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            data, scales, state.blocksize, state.quant_type, state.shape, self._dtype
        )
        return weight


@dataclass(frozen=True, slots=True)
class _Lora:
    """The adapter of one linear layer."""

    a: torch.Tensor
    b: torch.Tensor
    """Parameters A (r, in) and B (out, r)."""
    b_copy: torch.Tensor
    """B (out, r) in the compute dtype."""
    scaling: float
    dropout: Any
    """PEFT's dropout of the input, or its identity."""
    keep: float
    """Mean share of the input that dropout leaves."""

    def scale(self, drawn: Drawn | None) -> float:
        """Return what multiplies x A^T B^T, given what dropout drew."""
        return self.scaling if drawn is None else self.scaling / self.keep


class Projection:
    """Linear layers of one input."""

    def __init__(self, modules: Sequence[Any], copies: FactorCopies) -> None:
        """Read `modules`, plain layers or PEFT's around them; `why_not_fused` has accepted them."""
        self.weights = [_FrozenWeight(getattr(module, "base_layer", module), copies.dtype) for module in modules]
        self.loras = [_lora_of(module, copies) if hasattr(module, "lora_A") else None for module in modules]
        a_factors = [lora.a for lora in self.loras if lora is not None]
        self._factors = [factor for lora in self.loras if lora is not None for factor in (lora.a, lora.b)]
        self.ranks = [len(a) for a in a_factors]
        self.a_copy = copies.stack(a_factors) if a_factors else None
        """All A's (sum of r, in) in the compute dtype."""
        self.has_dropout = any(lora.keep < 1 for lora in self.loras if lora is not None)
        """Whether a layer's LoRA has dropout in training."""

    def factors(self) -> list[torch.Tensor]:
        """Return the trained A and B of each layer that has LoRA, in the order of `backward`'s gradients."""
        return self._factors

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> tuple[list[torch.Tensor], torch.Tensor | None, Drawn | None]:
        """Return the outputs (T, out) of each layer, plus `residual`; and what `backward` needs.

        That is `inner`, and the state of the random numbers that dropout drew, None without dropout.
        """
        drawn = None if self.a_copy is None or not self._drops() else _random_state(x.device)
        inner = None if self.a_copy is None else self._inner(x, self.a_copy, drawn)
        parts = self._per_adapter(inner)
        outputs = []
        for frozen, lora in zip(self.weights, self.loras, strict=True):
            weight = frozen.dequantized()
            out = F.linear(x, weight) if residual is None else torch.addmm(residual, x, weight.t())
            if lora is not None:
                out.addmm_(next(parts), lora.b_copy.t(), alpha=lora.scale(drawn))
            outputs.append(out)
        return outputs, inner, drawn

    def backward(
        self,
        dys: Sequence[torch.Tensor],
        x: torch.Tensor | None,
        inner: torch.Tensor | None,
        drawn: Drawn | None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the gradient of the input, and those of `factors` in fp32.

        `dys`: gradients of the outputs (T, out); `inner`, `drawn`: from `forward`. `x` is read only where a layer has
        LoRA.
        """
        # Through the frozen weights.
        dx: torch.Tensor | None = None
        for frozen, dy in zip(self.weights, dys, strict=True):
            weight = frozen.dequantized()
            dx = torch.mm(dy, weight) if dx is None else dx.addmm_(dy, weight)
        assert dx is not None
        if self.a_copy is None or inner is None or x is None:
            return dx, []

        # Through each B, into its part of the gradient of `inner`. With beta = 0, what the output held does not count.
        d_inner = torch.empty_like(inner)
        parts, d_parts, d_bs = self._per_adapter(inner), self._per_adapter(d_inner), []
        for lora, dy in zip(self.loras, dys, strict=True):
            if lora is not None:
                part, d_part, b, scaling = next(parts), next(d_parts), lora.b_copy, lora.scale(drawn)
                torch.addmm(d_part, dy, b, beta=0, alpha=scaling, out=d_part)
                d_bs.append(torch.addmm(b, dy.t(), part, beta=0, alpha=scaling).float())

        d_as = self._through_a(dx, d_inner, x, self.a_copy, drawn)
        return dx, [gradient for pair in zip(d_as, d_bs, strict=True) for gradient in pair]

    def _inner(self, x: torch.Tensor, a_copy: torch.Tensor, drawn: Drawn | None) -> torch.Tensor:
        """Return x A^T (T, sum of r) of all A's; with dropout, of the part of x that each A reads."""
        if drawn is None:
            return F.linear(x, a_copy)
        inner = x.new_empty(len(x), len(a_copy))
        columns, rows = self._per_adapter(inner), a_copy.split_with_sizes(self.ranks)
        for column, a, mask in zip(columns, rows, self._masks(x, _default_generator(x.device)), strict=True):
            torch.mm(x * mask, a.t(), out=column)
        return inner

    def _through_a(
        self, dx: torch.Tensor, d_inner: torch.Tensor, x: torch.Tensor, a_copy: torch.Tensor, drawn: Drawn | None
    ) -> Sequence[torch.Tensor]:
        """Add the gradient of the input through all A's to `dx`; return the gradients of the A's in fp32."""
        if drawn is None:
            dx.addmm_(d_inner, a_copy)
            d_a = torch.mm(d_inner.t(), x).float()
            return d_a.split_with_sizes(self.ranks) if len(self.ranks) > 1 else (d_a,)
        generator, d_as = torch.Generator(x.device), []
        generator.set_state(drawn)
        columns, rows = self._per_adapter(d_inner), a_copy.split_with_sizes(self.ranks)
        for column, a, mask in zip(columns, rows, self._masks(x, generator), strict=True):
            dx.addcmul_(torch.mm(column, a), mask)
            d_as.append(torch.mm(column.t(), x * mask).float())
        return d_as

    def _drops(self) -> bool:
        """Return whether dropout is at work: a model in training mode, and a rate above 0."""
        if not self.has_dropout:
            return False
        return any(lora.keep < 1 and lora.dropout.training for lora in self.loras if lora is not None)

    def _masks(self, x: torch.Tensor, generator: torch.Generator) -> Iterator[torch.Tensor]:
        """Yield the mask (T, in) of each adapter."""
        for lora in self.loras:
            if lora is not None:
                yield torch.empty_like(x).bernoulli_(lora.keep, generator=generator)

    def _per_adapter(self, inner: torch.Tensor | None) -> Iterator[torch.Tensor]:
        """Split (T, sum of r) into views, one for each layer with LoRA."""
        if inner is None or len(self.ranks) == 1:
            return iter(() if inner is None else (inner,))
        return iter(inner.split_with_sizes(self.ranks, dim=1))


def _lora_of(module: Any, copies: FactorCopies) -> _Lora:
    [adapter] = module.active_adapters
    a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    dropout = module.lora_dropout[adapter]
    keep = 1.0 - getattr(dropout, "p", 0.0)
    return _Lora(a, b, copies.stack([b]), float(module.scaling[adapter]), dropout, keep)


def _default_generator(device: torch.device) -> torch.Generator:
    """Return the generator that PyTorch's dropout draws from; reading its state does not wait for the device."""
    if device.type == "cuda":
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.default_generator


def _random_state(device: torch.device) -> Drawn:
    return _default_generator(device).get_state()
