"""The same work on many items, in processes that are forked: what they read is shared, and one may die."""

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
_CHUNKS_A_WORKER = 8
_MOST_A_CHUNK = 256

_job: tuple[Callable[[Any], Any], Sequence[Any]] | None = None
"""What forked processes find in their copy of the memory; set for the length of a call."""


def available_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(
    work: Callable[[T], R],
    items: Sequence[T],
    *,
    died: Callable[[T], R],
    workers: int | None = None,
    label: str | None = None,
    advance: Advance | None = None,
) -> list[R]:
    """Return `work` of every item, in their order; only the results pass between the processes.

    `label` names the items where progress is shown; `advance` hears of them as well.

    A library in C that is given hostile bytes may take its process along: `died` makes the result of that item.
    """
    global _job
    workers = workers or available_cores()
    size = max(1, min(_MOST_A_CHUNK, -(-len(items) // (workers * _CHUNKS_A_WORKER))))
    chunks = [(start, min(start + size, len(items))) for start in range(0, len(items), size)]
    _job = (work, items)
    try:
        with counting(label or "", len(items) if label else 0) as shown:

            def hear(count: int) -> None:
                shown(count)
                if advance is not None:
                    advance(count)

            done = _run(chunks, workers, hear)
            for chunk in chunks:
                if chunk not in done:
                    done.update(_one_by_one(chunk, died, items, hear))
    finally:
        _job = None
    return [result for chunk in sorted(done) for result in done[chunk]]


def _run(chunks: Sequence[tuple[int, int]], workers: int, advance: Advance) -> dict[tuple[int, int], list[Any]]:
    """Run chunks of items; those that were left when a process died are missing."""
    done: dict[tuple[int, int], list[Any]] = {}
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _ignore_interrupts)
    try:
        with warnings.catch_warnings():
            # Python warns of forks beside threads; these children run Python and decoders, none of the threads' locks.
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
    chunk: tuple[int, int], died: Callable[[Any], Any], items: Sequence[Any], advance: Advance
) -> dict[tuple[int, int], list[Any]]:
    """Find the item of a chunk that a process dies on, by halves."""
    done = _run([chunk], 1, advance)
    if done:
        return done
    start, stop = chunk
    if stop - start == 1:
        advance(1)
        return {chunk: [died(items[start])]}
    middle = (start + stop) // 2
    return _one_by_one((start, middle), died, items, advance) | _one_by_one((middle, stop), died, items, advance)


def _run_chunk(chunk: tuple[int, int]) -> list[Any]:
    assert _job is not None
    work, items = _job
    return [work(item) for item in items[slice(*chunk)]]


def _ignore_interrupts() -> None:
    """Leave Ctrl-C to the process that a person sees."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
