"""Processes that work together over gloo on the CPU, forked from one that has imported everything, to be quick."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import TCPStore

ROOT = Path(__file__).parents[2]

Work = Callable[[], object]
"""What each process does: a function of a module, or a `partial` of one."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended, and what it printed."""

    code: int
    out: str
    err: str


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    """Return what torchrun sets for one of `count` processes."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    variables = {
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
    }
    return {**os.environ, **variables, **{name: str(value) for name, value in numbers.items()}}


def run_together(directory: Path, work: Work, count: int, *, timeout: float = 100, **variables: str) -> list[Ended]:
    """Do `work` in `count` processes; `directory` takes their output, and `variables` join their environment."""
    directory.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lora_llava.training.run", "deepspeed", "tests.helpers.ranks"])
    # As in torchrun, the store outlives the processes.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = []
    for rank in range(count):
        environ = {**environment(rank, count, store.port), **variables}
        processes.append(context.Process(target=_do, args=(environ, str(directory / str(rank)), work)))
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(timeout)
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert None not in codes, f"still running: {codes}"
    texts = [[(directory / f"{rank}.{name}").read_text() for name in ("out", "err")] for rank in range(count)]
    return [Ended(code or 0, *both) for code, both in zip(codes, texts, strict=True)]


def _do(variables: dict[str, str], output: str, work: Work) -> None:
    """Work in this process as a script would, with its output in files."""
    os.environ.clear()
    os.environ.update(variables)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    code: object = 0
    try:
        work()
    except SystemExit as ended:
        code = ended.code
    except BaseException:  # noqa: BLE001 - the test that reads the output shows it
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with suppress(ValueError):
            stream.flush()
    # As in a script that ends without waiting for threads of other libraries.
    os._exit(code if isinstance(code, int) else int(code is not None))
