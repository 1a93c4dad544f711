"""Check and measure a GPU in eight minutes: `make gpu-check`; without a GPU, the same in tiny form on the CPU.

python -m benchmarks.check [--minutes 8] [--output benchmarks/results/gpu_check.json]

1. V11, V1, V4 and S1 against Hugging Face in 24 GiB, and V11 in 12 GiB; retries of the allocator, which must be none.
2. Rows of one, two and four trees through PEFT's path, through fused layers, and on CUDA through graphs of those: wall
   time, kernel time, kernels, memory; where the time of a row goes; operators that wait for the device.
3. Gradients of all paths, against those of PEFT's path in fp32.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from bitsandbytes.nn import Linear4bit
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import measure_for
from benchmarks.measure import write_report
from benchmarks.model import build_model, make_config, release_memory
from benchmarks.work import SHAPES, Shapes, make_work, pixels
from lora_llava.data.rows import build_row
from lora_llava.modeling.attention import padded_length, set_attention, to_device, with_block_lists
from lora_llava.modeling.base import drop_unused_layers, undo_double_quantization
from lora_llava.modeling.fused.layer import fuse_layers, install_trunk, remove_trunk
from lora_llava.modeling.fused.trunk import CudaGraphs
from lora_llava.modeling.packed import packed_loss
from lora_llava.modeling.structure import FLEX, TREES
from lora_llava.planning.attention import pick_attention
from lora_llava.system.device import autocast, pick_device, pick_dtype

NUM_TREES = (1, 2, 4)
BRANCHES = 11
"""Questions of each tree."""
WARMUP, REPEATS = 2, 5
MAX_RATIO = 1.1
"""Largest error of the fused layers' gradients against fp32, relative to that of PEFT's path in the same precision."""
ROUNDING = 1e-5
"""Error in fp32 that rounding alone makes."""
TABLE_ROWS = 25
COMPARISONS = [("V11", 24.0), ("V1", 24.0), ("V4", 24.0), ("V11", 12.0), ("S1", 24.0)]
SMALL = 12.0
"""GiB of a card on which the kit is measured alone: the others take one conversation at a time there."""
ROWS_SHARE = 0.25
"""Share of the minutes that is left to the rows."""


class Rows:
    """Rows of a stage-2 model in NF4, on the device."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes, self.device = shapes, pick_device()
        self.dtype = pick_dtype("auto", self.device)
        self.attention, why = pick_attention("auto", make_config(shapes).text_config, self.device, self.dtype)
        click.echo(f"attention: {self.attention}, {why}")
        self.model = build_model(shapes, "instruct", self.device, self.dtype, nf4=True)
        drop_unused_layers(self.model.get_base_model())
        undo_double_quantization(self.model)
        set_attention(self.model.get_base_model(), self.attention)

    def row(self, trees: int) -> dict[str, torch.Tensor]:
        """Make a row of `trees` trees."""
        conversations = make_work(f"V{BRANCHES}", self.shapes, trees * BRANCHES).conversations
        row = build_row([conversations[start : start + BRANCHES] for start in range(0, len(conversations), BRANCHES)])
        row["pixel_values"] = torch.stack([pixels(image, self.shapes) for image in range(trees)])
        return to_device(with_block_lists(row) if self.attention == FLEX else row, self.device)

    def run(self, row: dict[str, torch.Tensor]) -> torch.Tensor:
        """Run a forward and a backward pass; return the loss, a scalar."""
        with autocast(self.device, self.dtype):
            loss = packed_loss(self.model, row, row["shift_labels"].numel())
        loss.backward()
        return loss.detach()

    def gradients(self, row: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the gradient of each parameter, on the CPU."""
        self.model.zero_grad(set_to_none=True)
        self.run(row)
        named = self.model.named_parameters()
        return {
            name: weight.grad.to("cpu", torch.float32, copy=True) for name, weight in named if weight.grad is not None
        }

    def exact_gradients(self, row: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the gradients of PEFT's path in fp32, with the weights as they are dequantized in the compute type."""
        frozen = [
            weight for weight in self.model.parameters() if not weight.requires_grad and weight.is_floating_point()
        ]
        linears = [module for module in self.model.modules() if isinstance(module, Linear4bit)]
        dtype, types = self.dtype, [weight.dtype for weight in frozen]
        try:
            self._compute_in(torch.float32, frozen, [torch.float32] * len(frozen), linears)
            # FlexAttention may multiply in TF32.
            set_attention(self.model.get_base_model(), TREES)
            return self.gradients(row)
        finally:
            self._compute_in(dtype, frozen, types, linears)
            set_attention(self.model.get_base_model(), self.attention)

    def _compute_in(self, dtype: torch.dtype, frozen: list[Any], types: list[torch.dtype], linears: list[Any]) -> None:
        self.dtype = dtype
        for weight, its_type in zip(frozen, types, strict=True):
            weight.data = weight.data.to(its_type)
        for linear in linears:
            linear.compute_dtype = dtype

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def timed(rows: Rows, trees: int) -> tuple[dict[str, Any], str]:
    """Time a row; return its figures, and the profiler's table of where the time goes."""
    row = rows.row(trees)
    for _ in range(WARMUP):
        rows.run(row)
    rows.wait()
    seconds, on_cuda = [], rows.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(REPEATS):
        started = time.perf_counter()
        rows.run(row)
        rows.wait()
        seconds.append(time.perf_counter() - started)
    memory = [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()] if on_cuda else [0, 0]
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as profiler:
        rows.run(row)
        rows.wait()
    averages = profiler.key_averages()
    attribute = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    # On CUDA the kernels' own events, not those of the operators that launched them.
    kind = "CUDA" if on_cuda else "CPU"
    events = [event for event in averages if event.device_type.name == kind and getattr(event, attribute) > 0]
    figures = {
        "trees": trees,
        "tokens": row["input_ids"].shape[1],
        "wall_ms": round(1e3 * min(seconds), 2),
        "kernel_ms": round(sum(getattr(event, attribute) for event in events) / 1e3, 2),
        "kernels": sum(event.count for event in events),
        "allocated_bytes": memory[0],
        "reserved_bytes": memory[1],
    }
    return figures, str(averages.table(sort_by=attribute, row_limit=TABLE_ROWS, max_name_column_width=60))


def compare_gradients(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> dict[str, float | str]:
    """Return the relative difference over all parameters, and that of the worst."""
    assert theirs.keys() == ours.keys()
    differences = {name: float((ours[name] - gradient).norm()) for name, gradient in theirs.items()}
    norms = {name: float(gradient.norm()) for name, gradient in theirs.items()}
    worst = max(theirs, key=lambda name: differences[name] / (norms[name] or 1.0))
    whole = math.hypot(*differences.values()) / math.hypot(*norms.values())
    return {"relative": whole, "worst": differences[worst] / (norms[worst] or 1.0), "worst_parameter": worst}


def check_rows(shapes: Shapes, keep: Callable[..., None]) -> list[str]:
    """Time rows through both paths and compare their gradients; return the problems."""
    rows = Rows(shapes)
    gradients = {"exact": rows.exact_gradients(rows.row(1))}
    for path in ("peft", "fused"):
        if path == "fused" and (reason := fuse_layers(rows.model)):
            return [f"the layers are not fused: {reason}"]
        gradients[path] = rows.gradients(rows.row(1))
        figures, table = [], ""
        for trees in NUM_TREES:
            try:
                row, table = timed(rows, trees)
            except torch.OutOfMemoryError:
                rows.model.zero_grad(set_to_none=True)
                release_memory()
                click.echo(f"{path:6} {trees} trees: more than this card holds, nothing recomputed")
                continue
            figures.append(row)
            click.echo(
                f"{path:6} {trees} trees, {row['tokens']:6,} tokens: {row['wall_ms']:9.2f} ms, "
                f"{row['kernel_ms']:9.2f} ms in {row['kernels']:,} kernels"
            )
        keep(**{f"rows_{path}": figures, f"profile_{path}": table.splitlines()})
        click.echo(table)
    errors = {path: compare_gradients(gradients["exact"], gradients[path]) for path in ("peft", "fused")}
    waits = count_waits(rows)
    retries = torch.cuda.memory_stats()["num_alloc_retries"] if rows.device.type == "cuda" else 0
    keep(gradients=errors, row_allocator_retries=retries, waits=waits)
    peft, fused = (float(errors[path]["relative"]) for path in ("peft", "fused"))
    click.echo(f"gradients against fp32: PEFT's path {peft:.2e}, fused {fused:.2e}")
    click.echo(f"a row waits for the device {len(waits)} times{''.join(f'; {line}' for line in waits)}")
    check_graphs(rows, gradients["fused"], keep)
    wrong = (
        [] if fused <= max(MAX_RATIO * peft, ROUNDING) else ["the fused layers' gradients are less exact than PEFT's"]
    )
    wrong += ["a row waits for the device"] if waits else []
    return [*wrong, *(["the allocator tried again in rows"] if retries else [])]


def count_waits(rows: Rows) -> list[str]:
    """Return the lines of code at which a row waits for the device, by the warnings of CUDA's debug mode."""
    if rows.device.type != "cuda":
        return []
    row = rows.row(1)
    rows.wait()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            rows.run(row)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]


def check_graphs(rows: Rows, expected: dict[str, torch.Tensor], keep: Callable[..., None]) -> None:
    """Time rows through CUDA graphs, and compare their gradients with those of fused layers, or say why there are none.

    No problem of the check if they fail: a run tries them before its first step, and goes without.
    """
    lengths = [padded_length(rows.row(trees)["input_ids"].shape[1]) for trees in NUM_TREES]
    try:
        trunk = "no GPU" if rows.device.type != "cuda" else install_trunk(rows.model, lengths, CudaGraphs())
        if isinstance(trunk, str):
            keep(graphs={"failure": trunk})
            click.echo(f"graphs: none: {trunk}")
            return
        difference = compare_gradients(expected, rows.gradients(rows.row(1)))
        figures = [timed(rows, trees)[0] for trees in NUM_TREES]
        keep(graphs={"rows": figures, "gradients": difference, "memory": torch.cuda.max_memory_reserved()})
        for row in figures:
            click.echo(f"graphs {row['trees']} trees, {row['tokens']:6,} tokens: {row['wall_ms']:9.2f} ms")
        click.echo(f"gradients, graphs against layer by layer: {difference['relative']:.1e}")
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        keep(graphs={"failure": f"{type(error).__name__}: {error}"})
        click.echo(f"graphs: {type(error).__name__}: {error}")
    finally:
        remove_trunk(rows.model)
        rows.model.zero_grad(set_to_none=True)


def retried(results: list[dict[str, Any]]) -> list[str]:
    """Name the sets in which the kit's allocator had to try again."""
    rows = {f"{result['set']} in {result['cap']:g} GiB": result["peers"].get("lora-llava", {}) for result in results}
    return [f"the allocator tried again in {name}" for name, row in rows.items() if row.get("allocator_retries")]


@click.command()
@click.option("--minutes", default=8.0, show_default=True, help="Minutes that the whole may take.")
@click.option("--model", type=click.Choice(list(SHAPES)), help="Default: 7b on a GPU, else tiny.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the results as JSON, after every part.")
@click.option("--sets/--no-sets", default=True, help="Compare with Hugging Face, too.")
@click.option("--steps", type=int, help="Timed steps of each peer, if the minutes allow. Default: 8 on a GPU, else 3.")
def main(minutes: float, model: str | None, output: Path | None, sets: bool, steps: int | None) -> None:
    """Check the kit on this machine's GPU; without one, try the check itself in tiny form."""
    started = time.monotonic()
    on_cuda = pick_device().type == "cuda"
    model = model or ("7b" if on_cuda else "tiny")
    click.echo(f"{model} on {pick_device().type}, {minutes:g} minutes")
    facts: dict[str, Any] = {"results": [], "ladder": None}

    def keep(**more: Any) -> None:
        facts.update(more)
        write_report(output, model=model, micro_batch=None, **facts)

    problems: list[str] = []
    if sets:
        peers, left = ["lora-llava", "hf-trainer"], (1 - ROWS_SHARE) * minutes
        results = measure_for(
            left, COMPARISONS, peers, model, (1, steps or (8 if on_cuda else 3)), output, alone_up_to=SMALL
        )
        keep(results=results)
        problems += retried(results)
    problems += check_rows(SHAPES[model], keep)
    seconds = round(time.monotonic() - started)
    keep(seconds=seconds, problems=problems)
    click.echo(f"{seconds} s; " + ("; ".join(problems) or "all as it must be"))
    if problems:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
