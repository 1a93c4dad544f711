"""All fused layers as one forward and one backward function over static buffers, of which CUDA graphs are captured.

A graph repeats the same kernels on the same addresses. So rows are padded to one of a few lengths, and each length has
a pair of graphs: inputs are copied to buffers, the graph runs, and its output is copied from a buffer. The functions
are those of the layers (`functions.py`), with LoRA's gradients added to `parameter.grad` by the backward function.

What the backward pass needs lies in memory that the forward graph writes again for the next row. A backward pass that
finds another row's there computes its own row's forward pass again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from lora_llava.modeling.attention import block_mask_tensors, clone_mask
from lora_llava.modeling.fused.functions import output_backward, output_forward, qkv_backward, qkv_forward

Run = Callable[[], None]
Capture = Callable[[Run], Run]
"""Turns a function of static buffers into one that repeats its operators on the same tensors; need not run it."""


class CudaGraphs:
    """Captures CUDA graphs, all in one pool of memory: no two of them run at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Run) -> Run:
        """Capture `function`, which has run before, so that nothing is compiled or loaded meanwhile."""
        # The allocator cannot give memory back while a graph is captured, and holds what earlier passes used.
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            function()
        return graph.replay


class _LayerPass:
    """What a layer keeps between its passes."""

    def __init__(self, layer: Any, row: _Row, x: torch.Tensor) -> None:
        """Compute the layer's `output` (T, D) of `x` (T, D)."""
        self.layer = layer
        heads, self.kept = qkv_forward(layer.parts, x, row.cos, row.sin)
        # Attention has its own gradient, whatever it is.
        self.heads = [one.transpose(0, 1).unsqueeze(0).detach().requires_grad_() for one in heads]
        with torch.enable_grad():
            self.attended = layer.attend(*self.heads, row.mask)
        attended = self.attended.detach().reshape(len(x), -1)
        self.output, self.kept_output = output_forward(layer.parts, x, attended)

    def backward(self, dy: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the gradients of the layer's input and of LoRA's factors, given its output's."""
        parts = self.layer.parts
        d_residual, d_attended, d_factors = output_backward(parts, self.kept_output, dy)
        d_heads = torch.autograd.grad(self.attended, self.heads, d_attended.view(self.attended.shape))
        d_queries, d_keys, d_values = (one[0].transpose(0, 1) for one in d_heads)
        dx, d_qkv_factors = qkv_backward(parts, self.kept, (d_queries, d_keys, d_values))
        return dx.add_(d_residual), [*d_qkv_factors, *d_factors]


class _Row:
    """The graphs of rows of one length T, and their buffers."""

    def __init__(self, trunk: Trunk, tokens: int, mask: Any, tables: Sequence[torch.Tensor]) -> None:
        """`mask`, `tables`: any row's of this length."""
        self.trunk, self.mask = trunk, clone_mask(mask)
        self.cos, self.sin = (table.clone() for table in tables)
        self.x, self.output, self.d_output, self.d_input = (buffer[:tokens] for buffer in trunk.buffers)
        self._passes: list[tuple[torch.Tensor, _LayerPass | None]] = []
        self.forward, self.backward = self._forward, self._backward

    def capture(self, capture: Capture) -> None:
        """Run both functions once, with gradients of zero, then capture them."""
        self.x.zero_()
        self.d_output.zero_()
        with torch.no_grad():
            with _aside() if self.x.is_cuda else nullcontext():
                self._forward()
                self._backward()
            self.forward = capture(self._forward)
            self.backward = capture(self._backward)
        # The memory that they lie in is free for the graphs of other lengths.
        self._passes.clear()

    def load(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: Any) -> None:
        """Copy a row's inputs to the buffers."""
        for buffer, tensor in zip((self.x, self.cos, self.sin), (x, cos, sin), strict=True):
            buffer.copy_(tensor)
        torch._foreach_copy_(block_mask_tensors(self.mask), block_mask_tensors(mask))

    def _forward(self) -> None:
        self.trunk.copies.refresh()
        self._passes.clear()
        hidden = self.x
        for layer, is_recomputed in zip(self.trunk.layers, self.trunk.recomputed, strict=True):
            done = _LayerPass(layer, self, hidden)
            self._passes.append((hidden, None if is_recomputed else done))
            hidden = done.output
        self.output.copy_(hidden)

    def _backward(self) -> None:
        dy, gradients = self.d_output, dict(self.trunk.gradients)
        for layer in reversed(self.trunk.layers):
            x, done = self._passes.pop()
            dy, d_factors = (done or _LayerPass(layer, self, x)).backward(dy)
            if d_factors:
                torch._foreach_add_([gradients[factor] for factor in layer.factors()], d_factors)
        self.d_input.copy_(dy)


@contextmanager
def _aside() -> Iterator[None]:
    """Use another stream inside the `with` block, as what is captured later does."""
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


class Trunk:
    """The graphs of a model's fused layers, by the length of a row."""

    def __init__(self, layers: Sequence[Any], lengths: Sequence[int], capture: Capture) -> None:
        """`layers`: all fused ones, in order; `lengths`: tokens of the padded rows that get graphs, at first use."""
        self.layers, self.lengths, self._capture, self.copies = layers, sorted(lengths), capture, layers[0].copies
        self.recomputed = [bool(layer.gradient_checkpointing) for layer in layers]
        weight = layers[0].input_layernorm.weight
        self.buffers = [
            torch.zeros(self.lengths[-1], len(weight), dtype=weight.dtype, device=weight.device) for _ in range(4)
        ]
        factors = [factor for layer in layers for factor in layer.factors()]
        # These become the parameters' gradients, so they take no more memory than those would.
        self.gradients = {factor: torch.zeros_like(factor) for factor in factors}
        self._rows: dict[int, _Row] = {}
        self._current: object | None = None
        self.is_on = True
        """Off: all rows go through the layers one by one."""
        self.output: torch.Tensor | None = None
        """Hidden states (T, D) after all layers, of the row that the model computes; None if it has no graphs."""

    def run(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: Any) -> None:
        """Compute `output` of a row if it has graphs: its input x (T, D), `cos`, `sin` (T, 1, head_dim), and mask."""
        if self.is_on and len(x) in self.lengths:
            row = self._rows.get(len(x)) or self._captured(cos, sin, mask)
            # One factor, so that autograd asks for gradients although only a factor needs them.
            anchor = next(iter(self.gradients), None)
            self.output = _replayed(self, row, x, cos, sin, mask, anchor)

    def _captured(self, cos: torch.Tensor, sin: torch.Tensor, mask: Any) -> _Row:
        """Capture the graphs for rows of a length, given the tables and mask of any of them."""
        # Running the functions adds to gradients; those that are none yet are set to zero when they become some.
        attached = [buffer for factor, buffer in self.gradients.items() if factor.grad is buffer]
        before = [buffer.clone() for buffer in attached]
        row = _Row(self, len(cos), mask, (cos, sin))
        row.capture(self._capture)
        for buffer, gradient in zip(attached, before, strict=True):
            buffer.copy_(gradient)
        self._current, self._rows[len(cos)] = None, row
        return row

    def replay(self, row: _Row, owner: object, inputs: Sequence[Any]) -> None:
        """Compute a row's forward pass, unless its results are still there."""
        if self._current is not owner:
            row.load(*inputs)
            row.forward()
            self._current = owner

    def backward(self, row: _Row) -> None:
        """Compute the backward pass of the row whose forward pass was the last."""
        fresh = [buffer for factor, buffer in self.gradients.items() if factor.grad is None]
        if fresh:
            torch._foreach_zero_(fresh)
        for factor, buffer in self.gradients.items():
            if factor.grad is not None and factor.grad is not buffer:
                buffer.copy_(factor.grad)
            factor.grad = buffer
        row.backward()
        self._current = None


class _Replay(torch.autograd.Function):
    """A row through the graphs, as autograd sees it."""

    @staticmethod
    def forward(ctx: Any, trunk: Trunk, row: _Row, *inputs: Any) -> torch.Tensor:
        """`inputs`: x, cos, sin, the mask, and a factor that has no other use here."""
        x, cos, sin, mask, _ = inputs
        ctx.trunk, ctx.row, ctx.mask, ctx.owner = trunk, row, mask, object()
        ctx.save_for_backward(x, cos, sin)
        trunk.replay(row, ctx.owner, (x, cos, sin, mask))
        return row.output.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        """Return the gradient of x; the factors have theirs already."""
        x, cos, sin = ctx.saved_tensors
        ctx.trunk.replay(ctx.row, ctx.owner, (x, cos, sin, ctx.mask))
        ctx.row.d_output.copy_(dy)
        ctx.trunk.backward(ctx.row)
        return None, None, ctx.row.d_input.clone(), None, None, None, None


_replayed: Callable[..., torch.Tensor] = _Replay.apply
