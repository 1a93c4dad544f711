"""One peer in a process of its own: it waits for jobs, and in each for a word before every optimizer step.

python -m benchmarks.peer NAME --model small

A job is a line of JSON, {"set": "V8", "questions": 8, "steps": 10}; then each line `go` asks for a step, and `stop`
ends the job. Answers are lines of JSON, too.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import click
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.model import ReusedModel, make_config, release_memory
from benchmarks.peers import LADDER, PEERS, Task
from benchmarks.work import SHAPES, Shapes, make_work
from lora_llava.modeling.structure import linear_weights
from lora_llava.planning.memory_plan import GIB
from lora_llava.system.device import peak_memory_bytes, pick_device, pick_dtype
from lora_llava.training.trainer import PackedTrainer


class _StoppedError(Exception):
    """The parent wants no further step."""


def say(**facts: Any) -> None:
    """Write a line of JSON that the parent reads; what libraries print is not JSON."""
    sys.__stdout__.write(json.dumps(facts) + "\n")  # type: ignore[union-attr]  # a process started with pipes
    sys.__stdout__.flush()  # type: ignore[union-attr]


class Gate(TrainerCallback):  # type: ignore[misc]
    """Holds every step until the parent asks for it, and reports it."""

    def __init__(self) -> None:
        self.started = self.cpu_started = 0.0
        self.norms: dict[str, float] = {}

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Wait."""
        say(ready=state.global_step)
        word = sys.stdin.readline()
        if not word:
            raise SystemExit("the parent is gone")
        if word.strip() == "stop":
            raise _StoppedError
        self.started, self.cpu_started = time.perf_counter(), time.process_time()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Measure the gradients of each group, in the first step only: it takes a thousand kernels."""
        if self.norms:
            return
        squares = {"lora": 0.0, "projector": 0.0}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                group = "projector" if "multi_modal_projector" in name else "lora"
                squares[group] += float(parameter.grad.float().square().sum())
        self.norms = {group: square**0.5 for group, square in squares.items()}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report the time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.started
        self.cpu_seconds = time.process_time() - self.cpu_started

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Report a step, when its loss is known."""
        if logs and "loss" in logs:
            times = {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}
            say(step=state.global_step, **times, loss=logs["loss"], gradient_norms=self.norms)


def memory_facts() -> dict[str, int]:
    """Return the most memory held: of the device, reserved and allocated, or of the process; and allocator retries.

    What CUDA graphs compute in is reserved, but not allocated while they are replayed.
    """
    if not torch.cuda.is_available():
        return {"peak_bytes": peak_memory_bytes()}
    return {
        "peak_bytes": torch.cuda.max_memory_reserved(),
        "allocated_bytes": torch.cuda.max_memory_allocated(),
        "allocator_retries": torch.cuda.memory_stats()["num_alloc_retries"],
    }


def set_cap(cap: int | None) -> None:
    """Let the process take `cap` bytes of the card; None: all of it."""
    if torch.cuda.is_available():
        share = 1.0 if cap is None else min(1.0, cap / torch.cuda.mem_get_info()[1])
        torch.cuda.set_per_process_memory_fraction(share)


def train(name: str, task: Task) -> dict[str, Any]:
    """Train until the parent stops it; return what was done in how much memory."""
    set_cap(None)
    trainer, computed = (PEERS | LADDER)[name](task)
    if isinstance(trainer, PackedTrainer):
        trainer.callbacks.append(Gate())
    else:
        trainer.add_callback(Gate())
    # Only now: before it is quantised, the model takes more.
    release_memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        retries = memory_facts()["allocator_retries"]
    set_cap(task.cap)
    before = memory_facts()["peak_bytes"]
    try:
        trainer.train()
    except _StoppedError:
        pass
    finally:
        # The model may be asked for again, without the autocast that accelerate puts around it for other trainers.
        # Its `unwrap_model` would leave a mark, and then the next trainer puts none around it.
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
            vars(trainer.model).pop(name, None)
    memory = memory_facts()
    if "allocator_retries" in memory:
        memory["allocator_retries"] -= retries
    return {
        "supervised": task.work.supervised,
        "computed_tokens": computed,
        "separate_tokens": sum(len(one.input_ids) for one in task.work.conversations),
        "linear_weights": linear_weights(make_config(task.shapes)),
        "work_sha256": task.work.sha256,
        "bytes_before_training": before,
        **memory,
    }


def as_task(job: dict[str, Any], shapes: Shapes, models: ReusedModel) -> Task:
    """Read a job."""
    device, cap = pick_device(), job.get("cap")
    return Task(
        work=make_work(job["set"], shapes, job["questions"]),
        shapes=shapes,
        steps=job["steps"],
        micro_batch=job.get("micro_batch", 2),
        device=device,
        dtype=pick_dtype("auto", device),
        nf4=job.get("nf4", False),
        checkpointing=job.get("checkpointing", False),
        cap=None if cap is None else int(cap * GIB),
        models=models,
    )


@click.command()
@click.argument("name", type=click.Choice([*PEERS, *LADDER]))
@click.option("--model", type=click.Choice(list(SHAPES)), default="small")
@click.option("--threads", default=2)
def main(name: str, model: str, threads: int) -> None:
    """Do the jobs that the parent gives, one after another."""
    sys.stdout = sys.stderr
    torch.set_num_threads(threads)
    if name == "unsloth":
        # Its patches must come before anything is made.
        import unsloth  # noqa: F401
    models = ReusedModel()
    while line := sys.stdin.readline():
        facts = train(name, as_task(json.loads(line), SHAPES[model], models))
        # What is left of the trainer would be in the next peer's way.
        release_memory()
        say(**facts)


if __name__ == "__main__":
    main()
