"""Processes that work together over gloo on the CPU, started by hand so that a test can end one of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from torch.distributed import TCPStore

ROOT = Path(__file__).parents[2]
_stores: list[TCPStore] = []


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


def start(arguments: Sequence[str], count: int, **variables: str) -> list[subprocess.Popen[str]]:
    """Start `count` Python processes with the same arguments; their output is captured."""
    # As in torchrun, the store outlives the processes.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    _stores.append(store)
    port = store.port
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**environment(rank, count, port), **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def ended(processes: Sequence[subprocess.Popen[str]], timeout: float = 120) -> list[tuple[int, str, str]]:
    """Wait for all processes; return exit code, stdout and stderr of each."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
        _stores.clear()
    return [(process.returncode, *texts) for process, texts in zip(processes, outputs, strict=True)]
