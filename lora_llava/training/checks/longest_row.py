"""Memory probe: two forward and backward passes over the longest row, before the first step on CUDA."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from lora_llava.data.packing import PlanItem, row_length
from lora_llava.data.rows import PackedRows
from lora_llava.errors import TrainingError
from lora_llava.modeling.attention import attention_of, set_attention, to_device, with_block_lists
from lora_llava.modeling.fused.layer import graph_lengths
from lora_llava.modeling.packed import llava_in, packed_loss
from lora_llava.modeling.structure import FLEX, TREES
from lora_llava.planning.memory_plan import (
    GIB,
    MemoryPlan,
    StageShapes,
    next_smaller,
    plan_line,
    predicted_seconds,
)
from lora_llava.planning.speed import Machine
from lora_llava.system.device import autocast, peak_memory_bytes

_PASSES = 2
"""The second pass runs with gradients allocated, as all later ones do."""
_TOLERANCE = 1.3
"""Warn if the row takes longer than predicted by this factor."""


@dataclass(frozen=True, slots=True)
class Trial:
    """The longest row, and how long its second forward and backward pass took."""

    tokens: int
    seconds: float


def try_longest_row(
    model: Any,
    rows: PackedRows,
    items: Sequence[PlanItem],
    dtype: torch.dtype,
    console: Console,
    *,
    attn_implementation: str = "auto",
) -> Trial:
    """Run two forward and backward passes over the longest row, and time the second. Weights do not change.

    If FlexAttention fails and the recipe says `auto`, SDPA replaces it; otherwise raises TrainingError.
    torch.OutOfMemoryError is left to `out_of_memory_named`.
    """
    lengths = [row_length(row, items) for row in rows.rows]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    llava = llava_in(model)
    try:
        return Trial(lengths[longest], _pass_twice(model, rows[longest], dtype))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if attention_of(llava) != FLEX:
            raise
        if attn_implementation == FLEX:
            raise TrainingError(
                f"attn_implementation: flex_attention does not work with this model ({type(error).__name__}: {error}); "
                "set auto or sdpa"
            ) from error
        failure = type(error).__name__
    # Not in the handler, where the error would hold what the passes that failed have computed.
    console.print(f"flex_attention does not work with this model ({failure}); using sdpa instead")
    set_attention(llava, TREES)
    return Trial(lengths[longest], _pass_twice(model, rows[longest], dtype))


def _pass_twice(model: Any, row: dict[str, torch.Tensor], dtype: torch.dtype) -> float:
    """Return the seconds of the second pass; the first compiles."""
    device = next(model.parameters()).device
    batch = to_device(with_block_lists(row, lengths) if (lengths := graph_lengths(model)) else row, device)
    was_training = model.training
    model.train()
    try:
        for _ in range(_PASSES):
            _, seconds = timed_pass(model, batch, dtype)
        return seconds
    finally:
        model.train(was_training)
        model.zero_grad(set_to_none=True)


def timed_pass(model: Any, batch: Mapping[str, torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    """Add the gradients of the mean loss of a row; return this loss, a scalar, and the seconds of both passes."""
    device = next(model.parameters()).device
    started = _now(device)
    with autocast(device, dtype):
        loss = packed_loss(model, batch, max(1, batch["shift_labels"].numel()))
    loss.backward()
    return loss.detach(), _now(device) - started


def _now(device: torch.device) -> float:
    """Return the time once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def trial_lines(trial: Trial, shapes: StageShapes, plan: MemoryPlan) -> list[str]:
    """Report memory and time of the trial next to what was planned; the last line warns if the time is far off."""
    predicted = predicted_seconds(shapes, plan, trial.tokens)
    expected = "" if predicted is None else f", predicted {1e3 * predicted:.0f} ms"
    line = (
        f"two passes over the longest row, {trial.tokens:,} tokens: {peak_memory_bytes() / GIB:.1f} GiB, "
        f"planned {plan.bytes_needed / GIB:.1f} GiB with the optimizer; {1e3 * trial.seconds:.0f} ms a pass{expected}"
    )
    if predicted is None or trial.seconds <= _TOLERANCE * predicted:
        return [line]
    warning = (
        f"warning: the longest row takes {trial.seconds / predicted:.1f} times as long as predicted, so another plan "
        "may be faster. Something else may be using the device, or its clock changes; start again, or set "
        f"stages.{shapes.stage}.tokens_per_micro_batch"
    )
    return [line, warning]


@contextmanager
def out_of_memory_named(shapes: StageShapes, machine: Machine, plan: MemoryPlan) -> Iterator[None]:
    """Turn an out-of-memory error into a TrainingError that says what to change."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise TrainingError(
            f"stage {shapes.stage}: out of memory on this {machine.device}, with {plan_line(plan, shapes)}. Nothing "
            f"else may run next to it; otherwise {next_smaller(shapes, machine, plan)}"
        ) from error
