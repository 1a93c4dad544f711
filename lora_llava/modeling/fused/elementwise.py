"""Elementwise parts of a decoder layer and their gradients: RMSNorm, rotary embeddings, SwiGLU.

Shapes: T tokens of a row, D a width of the model. As in transformers, the norm is computed in fp32 and everything else
in the dtype of the hidden states. `Elementwise` is what a layer calls; `compiled.py` has the same with fewer kernels.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Return 1 / sqrt(mean(x^2) + eps) of each token of `x` (T, D): (T, 1) in fp32."""
    # One reduction instead of a cast, a square and a mean of the whole tensor.
    norm: torch.Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def scaled(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return RMSNorm of `x` (T, D) with `weight` (D,), given `scale` (T, 1) from `inverse_rms`."""
    return (x * scale).to(x.dtype).mul_(weight)


def scaled_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, more: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the gradient of RMSNorm's input `x` (T, D), plus `more`, the residual's gradient. Overwrites `dy`.

    With n = x * scale and g = dy * weight it is (g - n * mean(g * n)) * scale.
    """
    dy.mul_(weight)
    normalized = x * scale
    dot = (dy * normalized).mean(-1, keepdim=True)
    dx = torch.addcmul(dy, normalized, dot, value=-1).mul_(scale)
    if more is not None:
        dx.add_(more)
    return dx.to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary embeddings to `x` (T, heads, D); `cos` and `sin` are (T, 1, D)."""
    out = x * cos
    # One call for both halves: from Python, a slice costs half as much as a kernel.
    (first, second), (x_first, x_second), (sin_first, sin_second) = (one.chunk(2, dim=-1) for one in (out, x, sin))
    first.addcmul_(x_second, sin_first, value=-1)
    second.addcmul_(x_first, sin_second)
    return out


def rotate_backward(dy: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return the gradient of `rotate`'s input: the transpose of the same rotation."""
    out = dy * cos
    (first, second), (dy_first, dy_second), (sin_first, sin_second) = (one.chunk(2, dim=-1) for one in (out, dy, sin))
    first.addcmul_(dy_second, sin_second)
    second.addcmul_(dy_first, sin_first, value=-1)
    return out


class Elementwise:
    """The elementwise parts of a layer, one operator after the other."""

    failure: str | None = None
    """Why they are not compiled although they should be."""

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return RMSNorm of `x` (T, D), and the scales (T, 1) from which `normalized` computes it again."""
        scale = inverse_rms(x, eps)
        return scaled(x, weight, scale), scale

    def normalized(self, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return RMSNorm of `x` (T, D), given its scales."""
        return scaled(x, weight, scale)

    def norm_backward(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        more: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the gradient of RMSNorm's input, plus `more`. May overwrite `dy`."""
        return scaled_backward(dy, x, weight, scale, more)

    def rotate(
        self, queries: torch.Tensor, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply rotary embeddings to queries and keys (T, heads, D)."""
        return rotate(queries, cos, sin), rotate(keys, cos, sin)

    def rotate_backward(
        self, d_queries: torch.Tensor, d_keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients of `rotate`'s inputs."""
        return rotate_backward(d_queries, cos, sin), rotate_backward(d_keys, cos, sin)

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Return silu(gate) * up, all (T, D)."""
        return F.silu(gate).mul_(up)

    def swiglu_again(self, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return `swiglu` for the backward pass, and what `swiglu_backward` reuses of it."""
        activated = F.silu(gate)
        return activated * up, activated

    def swiglu_backward(
        self, dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activated: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients of `gate` and `up`. May overwrite `dy` and `activated`, which is silu(gate)."""
        d_up = (F.silu(gate) if activated is None else activated).mul_(dy)
        return torch.ops.aten.silu_backward(dy.mul_(up), gate), d_up
