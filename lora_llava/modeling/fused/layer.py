"""`FusedLayer`: a Llama decoder layer that trains on packed rows with few operators and few saved activations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers.models.llama.modeling_llama import ALL_ATTENTION_FUNCTIONS, LlamaDecoderLayer

from lora_llava.modeling.attention import PACKED_ATTENTIONS, attention_of, has_buffers
from lora_llava.modeling.fused.compiled import CompiledElementwise
from lora_llava.modeling.fused.elementwise import Elementwise
from lora_llava.modeling.fused.functions import LayerParts, compute_output, compute_qkv
from lora_llava.modeling.fused.projection import FactorCopies
from lora_llava.modeling.fused.support import why_not_fused
from lora_llava.modeling.fused.trunk import Capture, Trunk
from lora_llava.modeling.packed import llava_in
from lora_llava.modeling.structure import FLEX, LANGUAGE_MODEL


class RotaryTables:
    """cos and sin of a row in the form that fused layers take, made once for all of them."""

    def __init__(self) -> None:
        self._given: object = None
        self._tables: tuple[torch.Tensor, torch.Tensor]

    def tables(self, position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin (T, 1, head_dim) of transformers' (1, T, head_dim)."""
        # The same tuple for all layers of a row; layers that are checkpointed may get an earlier row's again.
        if self._given is not position_embeddings:
            self._given = position_embeddings
            cos, sin = position_embeddings
            self._tables = cos[0].unsqueeze(1), sin[0].unsqueeze(1)
        return self._tables


class FusedLayer(LlamaDecoderLayer):  # type: ignore[misc]  # transformers has no types
    """A decoder layer with the same modules and parameters, and another forward pass for packed rows.

    Generation, batches and single conversations go through transformers' own forward, and PEFT's.
    """

    parts: LayerParts
    copies: FactorCopies
    rotary: RotaryTables
    is_first: bool
    trunk: Trunk | None = None
    """The graphs of all fused layers, if there are any."""

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **options: Any) -> Any:
        """Run the layer, checkpointed if it is set to; of a row with graphs, the first layer runs all of them."""
        if self.trunk is not None and self._is_packed(hidden_states, self.parts.attention.config._attn_implementation):
            if self.is_first:
                self._start(self.trunk, hidden_states, options)
            if self.trunk.output is not None:
                return self.trunk.output.unsqueeze(0)
        return super().__call__(hidden_states, *args, **options)

    def _start(self, trunk: Trunk, hidden_states: torch.Tensor, options: dict[str, Any]) -> None:
        """Run all layers through the graphs of a row (1, T, D), if it has some."""
        mask, tables = options.get("attention_mask"), options.get("position_embeddings")
        trunk.output = None
        if tables is not None and options.get("past_key_values") is None and has_buffers(mask):
            device = hidden_states.device.type
            with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
                trunk.run(hidden_states[0], *self.rotary.tables(tables), mask)

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: Any, **options: Any
    ) -> torch.Tensor:
        """Return attention's output (1, T, heads, head_dim), given its inputs (1, heads, T, head_dim)."""
        attention = self.parts.attention
        function = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
        options = {"dropout": 0.0, "scaling": attention.scaling, **options}
        attended: torch.Tensor = function(attention, queries, keys, values, mask, **options)[0]
        return attended

    def factors(self) -> list[torch.Tensor]:
        """Return LoRA's trained factors, in the order of their gradients in both halves."""
        parts = self.parts
        return [factor for part in (parts.qkv, parts.out, parts.gate_up, parts.down) for factor in part.factors()]

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
        attention = self.parts.attention.config._attn_implementation
        if past_key_values is None and position_embeddings is not None and self._is_packed(hidden_states, attention):
            # Every dtype is right already: autocast would only look at each operator.
            device = hidden_states.device.type
            with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
                return self._packed(hidden_states, position_embeddings, attention_mask, kwargs)
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
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: Any,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """Return the hidden states (1, T, D) of a row after this layer."""
        parts = self.parts
        if self.is_first:
            self.copies.refresh()
        tables = self.rotary.tables(position_embeddings)
        queries, keys, values = compute_qkv(parts, hidden_states, *tables, *parts.qkv.factors())
        attended = self.attend(queries, keys, values, attention_mask, **options)
        factors = [*parts.out.factors(), *parts.gate_up.factors(), *parts.down.factors()]
        output: torch.Tensor = compute_output(parts, hidden_states, attended, *factors)
        return output


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
    copies, rotary = FactorCopies(norm.dtype), RotaryTables()
    for number, layer in enumerate(layers):
        layer.__class__ = FusedLayer
        layer.parts, layer.copies, layer.rotary = LayerParts.of(layer, copies, elementwise), copies, rotary
        layer.is_first = number == 0
    if isinstance(elementwise, CompiledElementwise):
        elementwise.try_on(norm, layers[0].self_attn.config)
    return None


def has_fused_layers(model: Any) -> bool:
    """Tell whether the decoder layers but the last are fused."""
    return isinstance(llava_in(model).get_submodule(LANGUAGE_MODEL).layers[0], FusedLayer)


@contextmanager
def layers_unfused(model: Any) -> Iterator[None]:
    """Use transformers' and PEFT's own layers inside the `with` block."""
    layers = [one for one in llava_in(model).get_submodule(LANGUAGE_MODEL).layers if isinstance(one, FusedLayer)]
    for layer in layers:
        layer.__class__ = LlamaDecoderLayer
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = FusedLayer


def unfuse_layers(model: Any) -> None:
    """Undo `fuse_layers`."""
    remove_trunk(model)
    for layer in llava_in(model).get_submodule(LANGUAGE_MODEL).layers:
        if isinstance(layer, FusedLayer):
            layer.__class__ = LlamaDecoderLayer
            del layer.parts, layer.copies, layer.rotary, layer.is_first


def install_trunk(model: Any, lengths: Sequence[int], capture: Capture) -> Trunk | str:
    """Have rows padded to one of `lengths` tokens run through graphs; return why not, for the log, if they cannot.

    Call it when layers are fused and set to be checkpointed or not.
    """
    *layers, _last = llava_in(model).get_submodule(LANGUAGE_MODEL).layers
    if not has_fused_layers(model):
        return "the layers are not fused"
    if attention_of(llava_in(model)) != FLEX:
        return "the attention is not flex_attention, whose mask has one shape for all rows of a length"
    projections = [part for layer in layers for part in (layer.parts.qkv, layer.parts.out, layer.parts.gate_up)]
    projections += [layer.parts.down for layer in layers]
    if any(projection.has_dropout for projection in projections):
        return "lora_dropout draws random numbers, which a graph would repeat"
    trunk = Trunk(layers, lengths, capture)
    for layer in layers:
        layer.trunk = trunk
    return trunk


def remove_trunk(model: Any) -> None:
    """Have all rows run layer by layer."""
    for layer in llava_in(model).get_submodule(LANGUAGE_MODEL).layers:
        if isinstance(layer, FusedLayer):
            layer.trunk = None


@contextmanager
def without_graphs(model: Any) -> Iterator[None]:
    """Run all rows layer by layer inside the `with` block, for `torch.autograd.grad`.

    Graphs return no gradients of LoRA's factors: they add them to `parameter.grad`.
    """
    trunk = _trunk_of(model)
    if trunk is not None:
        trunk.is_on = False
    try:
        yield
    finally:
        if trunk is not None:
            trunk.is_on = True


def graph_lengths(model: Any) -> list[int]:
    """Return the tokens that rows are padded to for graphs, ascending; none without graphs."""
    trunk = _trunk_of(model)
    return [] if trunk is None else trunk.lengths


def _trunk_of(model: Any) -> Trunk | None:
    trunk: Trunk | None = getattr(llava_in(model).get_submodule(LANGUAGE_MODEL).layers[0], "trunk", None)
    return trunk


def why_not_compiled(model: Any) -> str | None:
    """Return why elementwise parts of fused layers could not be compiled, for the log; None if nothing failed."""
    first = llava_in(model).get_submodule(LANGUAGE_MODEL).layers[0]
    return first.parts.elementwise.failure if isinstance(first, FusedLayer) else None
