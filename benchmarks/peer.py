"""One peer in a process of its own: it waits for a word before every optimizer step, and says what the step took.

python -m benchmarks.peer NAME SET --questions 16 --steps 8
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

import click
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.peers import PEERS
from benchmarks.work import SMALL, make_work


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


@click.command()
@click.argument("name", type=click.Choice(list(PEERS)))
@click.argument("set_name", metavar="SET")
@click.option("--questions", default=16)
@click.option("--steps", default=8)
@click.option("--micro-batch", default=2)
@click.option("--threads", default=2)
def main(name: str, set_name: str, questions: int, steps: int, micro_batch: int, threads: int) -> None:
    """Train, step by step as the parent says."""
    sys.stdout = sys.stderr
    torch.set_num_threads(threads)
    work = make_work(set_name, SMALL, questions)
    trainer, computed = PEERS[name](work, SMALL, steps, micro_batch)
    trainer.add_callback(Gate())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    trainer.train()
    say(
        supervised=work.supervised,
        computed_tokens=computed,
        work_sha256=work.sha256,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        bytes_before_training=before,
    )


if __name__ == "__main__":
    main()
