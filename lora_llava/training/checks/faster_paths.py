"""Try the faster ways to compute the decoder layers on CUDA, and leave them where they fail or compute something else.

Each is compared with the slower way by the loss and gradients of a row, before the first step. Weights do not change.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_llava.data.packing import PlanItem, conversations, row_length
from lora_llava.data.rows import PackedRows
from lora_llava.modeling.attention import padded_length, to_device, with_block_lists
from lora_llava.modeling.fused.layer import has_fused_layers, install_trunk, layers_unfused, remove_trunk, unfuse_layers
from lora_llava.modeling.fused.trunk import Capture, CudaGraphs, Trunk
from lora_llava.modeling.recompute import recomputed_in_full, set_recompute
from lora_llava.planning.graphs import choose_lengths
from lora_llava.training.checks.longest_row import timed_pass

TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 0.1}
"""Largest relative difference of gradients between fused layers and PEFT's, by dtype: each rounds in every layer. A
term that is missing or wrong changes them by more."""
_GRAPH_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 1e-2}
"""The same with and without graphs, which run the same kernels."""
_FILLED = 0.01
"""Largest value that stands in for zeros: where LoRA's B is zero, so are the gradients of A."""


@dataclass(frozen=True, slots=True)
class _RowPass:
    """A row's loss, its gradients on the host by parameter, and how long both took."""

    loss: float
    gradients: dict[str, torch.Tensor]
    seconds: float

    def difference(self, other: _RowPass) -> float:
        """Return the relative difference of all gradients together, or of the losses if that is larger; NaN if any is.

        Infinite if other parameters have gradients.
        """
        if self.gradients.keys() != other.gradients.keys():
            return math.inf
        pairs = [(gradient, other.gradients[name]) for name, gradient in self.gradients.items()]
        apart = math.sqrt(sum(float((mine - theirs).double().square().sum()) for mine, theirs in pairs))
        size = math.sqrt(sum(float(theirs.double().square().sum()) for _, theirs in pairs))
        differences = [apart / size if size else apart, abs(self.loss - other.loss) / max(abs(other.loss), 1e-12)]
        return math.nan if any(map(math.isnan, differences)) else max(differences)


def _pass_row(model: Any, batch: Mapping[str, torch.Tensor], dtype: torch.dtype) -> _RowPass:
    """Compute a row's loss and gradients twice, and return those of the second time; the first compiles."""
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        loss, seconds = timed_pass(model, batch, dtype)
    with_gradient = ((name, weight) for name, weight in model.named_parameters() if weight.grad is not None)
    gradients = {name: weight.grad.to("cpu", copy=True) for name, weight in with_gradient}
    model.zero_grad(set_to_none=True)
    return _RowPass(float(loss), gradients, seconds)


@contextmanager
def _every_gradient(model: nn.Module) -> Iterator[None]:
    """Train, with small numbers in trained weights that are all zero, inside the block."""
    zeros = [weight for weight in model.parameters() if weight.requires_grad and not weight.any()]
    was_training = model.training
    model.train()
    try:
        with torch.no_grad():
            for number, weight in enumerate(zeros):
                generator = torch.Generator(weight.device).manual_seed(number)
                weight.uniform_(-_FILLED, _FILLED, generator=generator)
        yield
    finally:
        with torch.no_grad():
            for weight in zeros:
                weight.zero_()
        model.train(was_training)
        model.zero_grad(set_to_none=True)


def check_fused(model: Any, rows: PackedRows, items: Sequence[PlanItem], dtype: torch.dtype) -> str | None:
    """Compare fused layers with PEFT's on the shortest conversation; return a line for the console if they differ.

    If the gradients differ, PEFT's layers are used instead. Those keep more activations than was planned, so they are
    checkpointed in full.
    """
    shortest = min(conversations(rows.rows), key=lambda index: items[index].length, default=None)
    if shortest is None or not has_fused_layers(model):
        return None
    batch = to_device(rows.with_rows([((shortest,),)])[0], next(model.parameters()).device)
    try:
        with _every_gradient(model), _without_dropout(model), recomputed_in_full(model):
            fused = _pass_row(model, batch, dtype)
            with layers_unfused(model):
                peft = _pass_row(model, batch, dtype)
        # An image may be NaN: the first row is checked for that later.
        reason = _beyond(fused.difference(peft), TOLERANCE[dtype]) if math.isfinite(peft.loss) else None
    except torch.OutOfMemoryError:
        return "fused layers are not compared with PEFT's path, which takes more memory than there is"
    except Exception as error:  # noqa: BLE001 - whatever a kernel raises
        reason = _named(error)
    if reason is None:
        return None
    unfuse_layers(model)
    set_recompute(model, True)
    return f"decoder layers train through PEFT's path with full recomputation, not fused: {reason}"


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Turn dropout off, since two paths draw different masks on CUDA; the caller's `model.train` turns it on again."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    yield


def try_graphs(
    model: Any, rows: PackedRows, items: Sequence[PlanItem], dtype: torch.dtype, capture: Capture | None = None
) -> str:
    """Capture graphs, and compare them with the layers on the longest row of each length; remove them where they fail.

    `capture`: default, CUDA's. Returns a line for the console; `graph_lengths` tells whether there are graphs.
    """
    lengths = [row_length(row, items) for row in rows.rows]
    graph_lengths = choose_lengths([padded_length(length) for length in lengths if length])
    trunk = install_trunk(model, graph_lengths, capture or CudaGraphs())
    reason = trunk if isinstance(trunk, str) else None
    if isinstance(trunk, Trunk):
        try:
            with _every_gradient(model):
                reason, line = _compare(model, trunk, rows, lengths, dtype)
        except Exception as error:  # noqa: BLE001 - out of memory too: without graphs there is more
            reason = _named(error)
    if reason is None:
        return line
    remove_trunk(model)
    # Its rows refer to it: what it holds on the device is free once the collector has found it.
    del trunk
    gc.collect()
    torch.cuda.empty_cache()
    return f"cuda_graphs: off ({reason})"


def _compare(
    model: Any, trunk: Trunk, rows: PackedRows, lengths: Sequence[int], dtype: torch.dtype
) -> tuple[str | None, str]:
    """Return why graphs cannot be used, and a line that says how long rows take with them."""
    device = next(model.parameters()).device
    seconds: list[tuple[float, float]] = []
    # The longest first, so that the others reuse its memory.
    for most in reversed(trunk.lengths):
        longest = max((number for number, length in enumerate(lengths) if length <= most), key=lengths.__getitem__)
        batch = to_device(with_block_lists(rows[longest], trunk.lengths), device)
        passes: list[_RowPass] = []
        for is_on in (False, True):
            trunk.is_on = is_on
            passes.append(_pass_row(model, batch, dtype))
        layers, graphs = passes
        if trunk.output is None:
            return f"a row of {most:,} tokens has no graph", ""
        if reason := _beyond(graphs.difference(layers), _GRAPH_TOLERANCE[dtype]):
            return reason, ""
        seconds.append((layers.seconds, graphs.seconds))
    slow, fast = seconds[0]
    if fast >= slow:
        return f"the longest row takes {1e3 * fast:.0f} ms with graphs and {1e3 * slow:.0f} ms without", ""
    padded = ", ".join(f"{length:,}" for length in trunk.lengths)
    return None, (
        f"cuda_graphs: rows are padded to {padded} tokens; the longest takes {1e3 * fast:.0f} ms instead of "
        f"{1e3 * slow:.0f} ms"
    )


def _beyond(difference: float, tolerance: float) -> str | None:
    """Describe a difference of gradients that is beyond the tolerance, as NaN is; None if it is within."""
    if difference <= tolerance:
        return None
    return f"gradients differ by {difference:.1e}, allowed {tolerance:.0e}"


def _named(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
