"""The two halves of a decoder layer around attention, as autograd functions.

    x -> [RMSNorm, q | k | v, rotary embeddings] -> attention -> [o + x, RMSNorm, gate | up, SwiGLU, down + residual]

For the backward pass they keep x, the residual after attention, gate, up and the inner products of LoRA; attention
keeps queries, keys, values and its output. Norms, rotations and activations are computed again, which costs less than
reading them back would. Shapes: T tokens, D hidden size.

Nothing here waits for the device, and nothing saved is written to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from lora_llava.modeling.fused.elementwise import Elementwise
from lora_llava.modeling.fused.projection import Drawn, FactorCopies, Projection


@dataclass(frozen=True, slots=True)
class LayerParts:
    """What a decoder layer computes with."""

    qkv: Projection
    out: Projection
    gate_up: Projection
    down: Projection
    input_norm: Any
    mlp_norm: Any
    attention: Any
    adapted: tuple[Any, ...]
    """PEFT's layers among them."""
    elementwise: Elementwise

    @classmethod
    def of(cls, layer: Any, copies: FactorCopies, elementwise: Elementwise) -> LayerParts:
        """Read the parts of a Llama layer; LoRA's factors are read through `copies`."""
        attention, mlp = layer.self_attn, layer.mlp
        groups = (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj),
            (mlp.down_proj,),
        )
        qkv, out, gate_up, down = (Projection(group, copies) for group in groups)
        adapted = tuple(module for group in groups for module in group if hasattr(module, "lora_A"))
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        return cls(qkv, out, gate_up, down, *norms, attention, adapted, elementwise)

    def read_weights_anew(self) -> None:
        """Read the frozen weights from their layers in each pass, as sharding needs, which gathers and frees them."""
        for projection in (self.qkv, self.out, self.gate_up, self.down):
            for weight in projection.weights:
                weight.read_anew()


class Kept(NamedTuple):
    """What the backward pass of a half needs."""

    tensors: tuple[torch.Tensor | None, ...]
    drawn: tuple[Drawn | None, ...]
    """The states of the random numbers before each dropout."""


Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def qkv_forward(parts: LayerParts, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[Heads, Kept]:
    """Return rotated queries and keys, and values, each (T, heads, head_dim), from the layer's input x (T, D).

    `cos`, `sin`: (T, 1, head_dim).
    """
    norm, elementwise = parts.input_norm, parts.elementwise
    normalized, scale = elementwise.norm(x, norm.weight, norm.variance_epsilon)
    outputs, inner, drawn = parts.qkv.forward(normalized)
    del normalized
    queries, keys, values = (output.view(len(x), -1, parts.attention.head_dim) for output in outputs)
    rotated = elementwise.rotate(queries, keys, cos, sin)
    return (*rotated, values), Kept((x, scale, inner, cos, sin), (drawn,))


def qkv_backward(parts: LayerParts, kept: Kept, d_heads: Heads) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the gradients of x and of LoRA's factors."""
    norm, elementwise = parts.input_norm, parts.elementwise
    x, scale, inner, cos, sin = kept.tensors
    assert x is not None and scale is not None and cos is not None and sin is not None
    d_queries, d_keys, d_values = d_heads
    gradients = (*elementwise.rotate_backward(d_queries, d_keys, cos, sin), d_values)
    normalized = None if inner is None else elementwise.normalized(x, norm.weight, scale)
    flat = [one.reshape(len(x), -1) for one in gradients]
    d_normalized, d_factors = parts.qkv.backward(flat, normalized, inner, kept.drawn[0])
    return elementwise.norm_backward(d_normalized, x, norm.weight, scale), d_factors


def output_forward(parts: LayerParts, x: torch.Tensor, attended: torch.Tensor) -> tuple[torch.Tensor, Kept]:
    """Return the layer's output (T, D) from its input x (T, D) and attention's output (T, heads * head_dim)."""
    norm, elementwise = parts.mlp_norm, parts.elementwise
    [residual], inner_out, drawn_out = parts.out.forward(attended, x)
    normalized, scale = elementwise.norm(residual, norm.weight, norm.variance_epsilon)
    [gate, up], inner_gate_up, drawn_gate_up = parts.gate_up.forward(normalized)
    del normalized
    [output], inner_down, drawn_down = parts.down.forward(elementwise.swiglu(gate, up), residual)
    # Attention saves its output as well; without LoRA on `o` it is not needed here.
    attended_for_factors = None if inner_out is None else attended
    tensors = (attended_for_factors, residual, scale, gate, up, inner_out, inner_gate_up, inner_down)
    return output, Kept(tensors, (drawn_out, drawn_gate_up, drawn_down))


def output_backward(
    parts: LayerParts, kept: Kept, dy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Return the gradients of x, of attention's output, and of LoRA's factors."""
    norm, elementwise = parts.mlp_norm, parts.elementwise
    attended, residual, scale, gate, up, inner_out, inner_gate_up, inner_down = kept.tensors
    assert residual is not None and scale is not None and gate is not None and up is not None
    drawn_out, drawn_gate_up, drawn_down = kept.drawn

    # MLP, from its end.
    mlp_input, activated = (None, None) if inner_down is None else elementwise.swiglu_again(gate, up)
    d_mlp_input, d_down = parts.down.backward([dy], mlp_input, inner_down, drawn_down)
    del mlp_input
    d_gate_up = elementwise.swiglu_backward(d_mlp_input, gate, up, activated)
    normalized = None if inner_gate_up is None else elementwise.normalized(residual, norm.weight, scale)
    d_normalized, d_gate_up_factors = parts.gate_up.backward(d_gate_up, normalized, inner_gate_up, drawn_gate_up)

    # Residual: past the MLP and through it.
    d_residual = elementwise.norm_backward(d_normalized, residual, norm.weight, scale, dy)
    d_attended, d_out = parts.out.backward([d_residual], attended, inner_out, drawn_out)
    return d_residual, d_attended, [*d_out, *d_gate_up_factors, *d_down]


# Both functions take and return tensors in transformers' layouts. Views that autograd saw would each cost a node.


class _QueriesKeysValues(torch.autograd.Function):
    """`qkv_forward` and its gradient: hidden states (1, T, D) to queries, keys and values (1, heads, T, head_dim)."""

    @staticmethod
    def forward(
        ctx: Any,
        parts: LayerParts,
        hidden_states: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *_factors: torch.Tensor,
    ) -> Heads:
        """`_factors` are named so that autograd gives them gradients."""
        (queries, keys, values), kept = qkv_forward(parts, hidden_states[0], cos, sin)
        ctx.parts, ctx.drawn = parts, kept.drawn
        ctx.save_for_backward(*kept.tensors)
        return _by_head(queries), _by_head(keys), _by_head(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_heads: torch.Tensor) -> Any:
        """Return the gradients of the hidden states and of LoRA's factors."""
        d_queries, d_keys, d_values = (one[0].transpose(0, 1) for one in d_heads)
        kept = Kept(ctx.saved_tensors, ctx.drawn)
        dx, d_factors = qkv_backward(ctx.parts, kept, (d_queries, d_keys, d_values))
        return None, dx.unsqueeze(0), None, None, *d_factors


def _by_head(tokens: torch.Tensor) -> torch.Tensor:
    """Return a view (1, heads, T, head_dim) of (T, heads, head_dim)."""
    return tokens.transpose(0, 1).unsqueeze(0)


class _OutputAndMLP(torch.autograd.Function):
    """`output_forward` and its gradient: the layer's input (1, T, D) and attention's output (1, T, heads, head_dim)."""

    @staticmethod
    def forward(
        ctx: Any, parts: LayerParts, hidden_states: torch.Tensor, attended: torch.Tensor, *_factors: torch.Tensor
    ) -> torch.Tensor:
        """`_factors` are named so that autograd gives them gradients."""
        output, kept = output_forward(parts, hidden_states[0], attended.reshape(attended.shape[1], -1))
        ctx.parts, ctx.drawn, ctx.attended_shape = parts, kept.drawn, attended.shape
        ctx.save_for_backward(*kept.tensors)
        return output.unsqueeze(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        """Return the gradients of the layer's input, of attention's output, and of LoRA's factors."""
        d_residual, d_attended, d_factors = output_backward(ctx.parts, Kept(ctx.saved_tensors, ctx.drawn), dy[0])
        return None, d_residual.unsqueeze(0), d_attended.view(ctx.attended_shape), *d_factors


compute_qkv: Callable[..., Any] = _QueriesKeysValues.apply
compute_output: Callable[..., Any] = _OutputAndMLP.apply
