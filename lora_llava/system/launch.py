"""Start the processes of a run on this machine, with the agent of torchrun: one for each card."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Mapping, Sequence

import click

from lora_llava.errors import RecipeError
from lora_llava.system.processes import available_cores

_STEP_SECONDS = 600
"""After a signal, how long the processes may take to finish and save their step."""


def run_on_cards(count: int, arguments: Sequence[str]) -> int:
    """Run `lora-llava ARGUMENTS` in `count` processes, one for each card; return the exit code.

    Raises RecipeError if this machine has fewer cards.
    """
    import torch

    cards = torch.cuda.device_count()
    if cards < count:
        raise RecipeError(
            f"--gpus {count}: PyTorch finds {cards or 'no'} GPU{'' if cards == 1 else 's'} on this machine. Give the "
            "number of cards that there are (CUDA_VISIBLE_DEVICES may hide some). To try several processes on a CPU: "
            f"torchrun --nproc-per-node {count} -m lora_llava finetune RECIPE"
        )
    return run_processes(count, arguments)


def run_processes(count: int, arguments: Sequence[str]) -> int:
    """Run `lora-llava ARGUMENTS` in `count` processes, whatever their device; return the exit code.

    It is 0, or that of the process that failed first, which has reported why; a process that the system ended is
    named here. A signal is passed on, so that the processes finish and save their step.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # It would add its own report to that of the process.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // count)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        shutdown_timeout=_STEP_SECONDS,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "lora_llava", *arguments)
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        if line := _killed_line({number: failure.exitcode for number, failure in error.failures.items()}, count):
            click.echo(line, err=True)
        _, first = error.get_first_failure()
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    return 0


def _killed_line(codes: Mapping[int, int], count: int) -> str | None:
    """Name the process that the system ended, by the exit codes of those that failed.

    None if another one has reported why: the agent ends the others by SIGTERM once one has failed.
    """
    killed = {number: signal.Signals(-code) for number, code in codes.items() if code < 0}
    reported = len(killed) < len(codes)
    culprits = [number for number, received in killed.items() if received != signal.SIGTERM]
    if not culprits and (reported or not killed):
        return None
    number = culprits[0] if culprits else next(iter(killed))
    memory = ", as the system does when memory runs out" if killed[number] == signal.SIGKILL else ""
    return (
        f"Error: process {number} of {count} was ended by {killed[number].name}{memory}. The last checkpoint is "
        "intact: start the run again with --resume."
    )
