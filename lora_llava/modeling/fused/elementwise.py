"""Elementwise parts of a decoder layer and their gradients: RMSNorm, rotary embeddings, SwiGLU.

Shapes: T tokens of a row, D a width of the model. As in transformers, the norm is computed in fp32 and everything else
in the dtype of the hidden states.
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
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def rotate_backward(dy: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return the gradient of `rotate`'s input: the transpose of the same rotation."""
    half = dy.shape[-1] // 2
    out = dy * cos
    out[..., :half].addcmul_(dy[..., half:], sin[..., half:])
    out[..., half:].addcmul_(dy[..., :half], sin[..., :half], value=-1)
    return out


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up, all (T, D)."""
    return F.silu(gate).mul_(up)


def swiglu_backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activated: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of `gate` and `up`. Overwrites `dy` and `activated`, which is silu(gate)."""
    d_up = activated.mul_(dy)
    return torch.ops.aten.silu_backward(dy.mul_(up), gate), d_up
