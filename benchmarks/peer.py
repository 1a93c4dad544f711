"""One peer in a process of its own: it waits for a word before every optimizer step, and says what the step took.

python -m benchmarks.peer NAME SET --questions 16 --steps 8
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import click
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.model import make_config
from benchmarks.peers import LADDER, PEERS, Task
from benchmarks.work import SHAPES, make_work
from lora_llava.modeling.structure import linear_weights
from lora_llava.planning.memory_plan import GIB
from lora_llava.system.device import peak_memory_bytes, pick_device, pick_dtype
from lora_llava.training.trainer import PackedTrainer


def say(**facts: Any) -> None:
    """Write a line of JSON that the parent reads; what libraries print is not JSON."""
    sys.__stdout__.write(json.dumps(facts) + "\n")  # type: ignore[union-attr]  # a process started with pipes
    sys.__stdout__.flush()  # type: ignore[union-attr]


class Gate(TrainerCallback):  # type: ignore[misc]
    """Holds every step until the parent asks for it, and reports it."""

    def __init__(self) -> None:
        self.started = 0.0
        self.norms: dict[str, float] = {}

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Wait."""
        say(ready=state.global_step)
        if not sys.stdin.readline():
            raise SystemExit("the parent is gone")
        self.started = time.perf_counter()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Measure the gradients of each group."""
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
            say(step=state.global_step, seconds=self.seconds, loss=logs["loss"], gradient_norms=self.norms)


def peak_bytes() -> dict[str, int]:
    """Return the most memory held: of the device, allocated and reserved, or of the process."""
    if torch.cuda.is_available():
        return {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}
    return {"peak_bytes": peak_memory_bytes()}


@click.command()
@click.argument("name", type=click.Choice([*PEERS, *LADDER]))
@click.argument("set_name", metavar="SET")
@click.option("--model", type=click.Choice(list(SHAPES)), default="small")
@click.option("--questions", default=16)
@click.option("--steps", default=8)
@click.option("--micro-batch", default=2)
@click.option("--threads", default=2)
@click.option("--nf4/--no-nf4", default=False)
@click.option("--checkpointing/--no-checkpointing", default=False)
@click.option("--cap", type=float, help="GiB of the card that the process may take; the kit then plans for it.")
def main(
    name: str,
    set_name: str,
    model: str,
    questions: int,
    steps: int,
    micro_batch: int,
    threads: int,
    nf4: bool,
    checkpointing: bool,
    cap: float | None,
) -> None:
    """Train, step by step as the parent says."""
    sys.stdout = sys.stderr
    torch.set_num_threads(threads)
    device, shapes = pick_device(), SHAPES[model]
    task = Task(
        work=make_work(set_name, shapes, questions),
        shapes=shapes,
        steps=steps,
        micro_batch=micro_batch,
        device=device,
        dtype=pick_dtype("auto", device),
        nf4=nf4,
        checkpointing=checkpointing,
        cap=None if cap is None else int(cap * GIB),
    )
    trainer, computed = (PEERS | LADDER)[name](task)
    if isinstance(trainer, PackedTrainer):
        trainer.callbacks.append(Gate())
    else:
        trainer.add_callback(Gate())
    before = peak_bytes()["peak_bytes"]
    if device.type == "cuda" and task.cap is not None:
        # Only now: while the model is made, before it is quantised, it takes more.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_per_process_memory_fraction(task.cap / torch.cuda.mem_get_info()[1])
    trainer.train()
    say(
        supervised=task.work.supervised,
        computed_tokens=computed,
        separate_tokens=sum(len(one.input_ids) for one in task.work.conversations),
        linear_weights=linear_weights(make_config(shapes)),
        work_sha256=task.work.sha256,
        bytes_before_training=before,
        **peak_bytes(),
    )


if __name__ == "__main__":
    main()
