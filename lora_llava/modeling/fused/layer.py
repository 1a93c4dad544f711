"""`FusedLayer`: a Llama decoder layer that trains on packed rows with few operators and few saved activations."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from transformers.models.llama.modeling_llama import ALL_ATTENTION_FUNCTIONS, LlamaDecoderLayer

from lora_llava.modeling.attention import PACKED_ATTENTIONS
from lora_llava.modeling.fused.compiled import CompiledElementwise
from lora_llava.modeling.fused.elementwise import Elementwise
from lora_llava.modeling.fused.functions import LayerParts, compute_output, compute_qkv
from lora_llava.modeling.fused.projection import FactorCopies
from lora_llava.modeling.fused.support import why_not_fused
from lora_llava.modeling.packed import llava_in
from lora_llava.modeling.structure import LANGUAGE_MODEL


class FusedLayer(LlamaDecoderLayer):  # type: ignore[misc]  # transformers has no types
    """A decoder layer with the same modules and parameters, and another forward pass for packed rows.

    Generation, batches and single conversations go through transformers' own forward, and PEFT's.
    """

    parts: LayerParts
    copies: FactorCopies
    is_first: bool

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return the hidden states (1, T, D) after this layer; the arguments are transformers'."""
        attention = self.self_attn.config._attn_implementation
        if past_key_values is None and position_embeddings is not None and self._is_packed(hidden_states, attention):
            # Every dtype is right already: autocast would only look at each operator.
            device = hidden_states.device.type
            with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
                attend = ALL_ATTENTION_FUNCTIONS[attention]
                return self._packed(hidden_states[0], position_embeddings, attend, attention_mask, kwargs)
        plain: torch.Tensor = super().forward(
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        return plain

    def _is_packed(self, hidden_states: torch.Tensor, attention: str) -> bool:
        """Return whether this is a packed row, in the compute dtype, through the adapters that were fused."""
        return (
            attention in PACKED_ATTENTIONS
            and hidden_states.shape[0] == 1
            and hidden_states.dtype == self.copies.dtype
            and not any(module.disable_adapters or module.merged for module in self.parts.adapted)
        )

    def _packed(
        self,
        x: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attend: Callable[..., tuple[torch.Tensor, Any]],
        attention_mask: Any,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """Return the hidden states (1, T, D) of a row, given its input x (T, D)."""
        parts, attention = self.parts, self.self_attn
        if self.is_first:
            self.copies.refresh()
        cos, sin = (table[0].unsqueeze(1) for table in position_embeddings)
        heads = compute_qkv(parts, x, cos, sin, *parts.qkv.factors())

        # Attention as in transformers: (1, heads, T, head_dim) to (1, T, heads, head_dim).
        queries, keys, values = (one.transpose(0, 1).unsqueeze(0) for one in heads)
        attended, _ = attend(
            attention, queries, keys, values, attention_mask, dropout=0.0, scaling=attention.scaling, **options
        )

        factors = [*parts.out.factors(), *parts.gate_up.factors(), *parts.down.factors()]
        output: torch.Tensor = compute_output(parts, x, attended.reshape(len(x), -1), *factors)
        return output.unsqueeze(0)


def fuse_layers(model: Any) -> str | None:
    """Turn all decoder layers but the last into `FusedLayer`s, or none; return the reason if none, for the log.

    The last one computes only where a token is predicted; see `modeling.packed`. Call it when the weights are on their
    device and LoRA is in them. Names, parameters and hooks stay: only the class of the layers changes.
    """
    *layers, _last = llava_in(model).get_submodule(LANGUAGE_MODEL).layers
    if not layers:
        return None
    if reason := next(filter(None, map(why_not_fused, layers)), None):
        return reason
    norm = layers[0].input_layernorm.weight
    elementwise = CompiledElementwise() if norm.is_cuda else Elementwise()
    copies = FactorCopies(norm.dtype)
    for number, layer in enumerate(layers):
        layer.__class__ = FusedLayer
        layer.parts, layer.copies, layer.is_first = LayerParts.of(layer, copies, elementwise), copies, number == 0
    if isinstance(elementwise, CompiledElementwise):
        elementwise.try_on(norm, layers[0].self_attn.config)
    return None


def why_not_compiled(model: Any) -> str | None:
    """Return why elementwise parts of fused layers could not be compiled, for the log; None if nothing failed."""
    first = llava_in(model).get_submodule(LANGUAGE_MODEL).layers[0]
    return first.parts.elementwise.failure if isinstance(first, FusedLayer) else None
