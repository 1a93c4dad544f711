"""Parallel work in forked processes, which share the memory they read; a crash costs only one item."""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from lora_llava.system.progress import Advance, counting

T = TypeVar("T")
R = TypeVar("R")
_CHUNKS_PER_WORKER = 8
_MAX_CHUNK_SIZE = 256
_NO_INTERRUPTS = (signal.SIGINT, signal.SIG_IGN)
"""Leave Ctrl-C to the parent process."""

_job: tuple[Callable[[Any], Any], Sequence[Any]] | None = None
"""Work and items, which forked processes inherit; set for the duration of a call."""


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(
    work: Callable[[T], R],
    items: Sequence[T],
    *,
    on_crash: Callable[[T], R],
    workers: int | None = None,
    label: str | None = None,
) -> list[R]:
    """Return `work(item)` for all items, in order; only results are sent between processes.

    `label`: name of the items in the progress bar. `on_crash`: returns the result of an item that crashes its process,
    as hostile bytes can in a C library.
    """
    global _job
    workers = workers or available_cores()
    size = max(1, min(_MAX_CHUNK_SIZE, -(-len(items) // (workers * _CHUNKS_PER_WORKER))))
    chunks = [(start, min(start + size, len(items))) for start in range(0, len(items), size)]
    _job = (work, items)
    try:
        with counting(label or "", len(items) if label else 0) as advance:
            # All processes are forked at once, needed or not.
            done = _run(chunks, min(workers, len(chunks)), advance) if chunks else {}
            for chunk in chunks:
                if chunk not in done:
                    done.update(_one_by_one(chunk, on_crash, items, advance))
    finally:
        _job = None
    return [result for chunk in sorted(done) for result in done[chunk]]


def _run(chunks: Sequence[tuple[int, int]], workers: int, advance: Advance) -> dict[tuple[int, int], list[Any]]:
    """Run chunks of items; those unfinished when a process crashed are missing from the result."""
    done: dict[tuple[int, int], list[Any]] = {}
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), signal.signal, _NO_INTERRUPTS)
    try:
        with warnings.catch_warnings():
            # Python warns about forks with threads; these children only decode and take none of the threads' locks.
            warnings.simplefilter("ignore", DeprecationWarning)
            futures = {executor.submit(_run_chunk, chunk): chunk for chunk in chunks}
        for future in as_completed(futures):
            start, stop = futures[future]
            done[start, stop] = future.result()
            advance(stop - start)
    except BrokenProcessPool:
        pass
    finally:
        executor.shutdown(cancel_futures=True)
    return done


def _one_by_one(
    chunk: tuple[int, int], on_crash: Callable[[Any], Any], items: Sequence[Any], advance: Advance
) -> dict[tuple[int, int], list[Any]]:
    """Find the item of a chunk that crashes a process by bisection."""
    done = _run([chunk], 1, advance)
    if done:
        return done
    start, stop = chunk
    if stop - start == 1:
        advance(1)
        return {chunk: [on_crash(items[start])]}
    middle = (start + stop) // 2
    return _one_by_one((start, middle), on_crash, items, advance) | _one_by_one(
        (middle, stop), on_crash, items, advance
    )


def _run_chunk(chunk: tuple[int, int]) -> list[Any]:
    assert _job is not None
    work, items = _job
    return [work(item) for item in items[slice(*chunk)]]
