"""The processes that train one run together: which of them writes, what they agree on, how they end.

torchrun and accelerate start them and number them in the environment. In a single process nothing here waits, and
nothing imports PyTorch.
"""

from __future__ import annotations

import os
import pickle
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from lora_llava.errors import LostProcessError, ModelError, RecipeError

T = TypeVar("T")

TIMEOUT = "LORA_LLAVA_TIMEOUT"
"""Variable with the seconds that a process waits for the others in a collective of a step."""
_TIMEOUT_SECONDS = 1800.0
_FIRST_PATIENCE = timedelta(hours=12)
"""How long the others wait for the first process, which alone hashes or assembles a base, saves and compares."""
_CLEANUP_SECONDS, _REPORT_SECONDS = 10.0, 1.0
_ERROR, _FIRST_LEFT = "error", "first_left"
"""Keys of the store: who reports which error, and that the first process has cleaned up."""


@dataclass(slots=True)
class _Links:
    """How this process reaches the others."""

    store: Any
    """Key-value store of the launcher, which outlives the processes."""
    group: Any = None
    """Group for flags and objects, which travel over the CPU; None: disconnected."""


_links: _Links | None = None
_planned: int | None = None
_phase = "its start"
"""What this process does, for the message of a process that was lost."""


def world_size() -> int:
    """Return the number of processes that train together, or that `planned_for` plans for."""
    return _planned or int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> int:
    """Return the number of this process among them, from 0."""
    return _of_launcher("RANK", 0)


def local_rank() -> int:
    """Return the number of this process on its machine, from 0: that of its card."""
    return _of_launcher("LOCAL_RANK", 0)


def local_world_size() -> int:
    """Return the number of processes on this machine."""
    return _of_launcher("LOCAL_WORLD_SIZE", 1)


def is_first() -> bool:
    """Tell whether this is the process that writes and speaks."""
    return rank() == 0


def note_phase(text: str) -> None:
    """Note what this process begins to do, which is said if another one is lost meanwhile."""
    global _phase
    _phase = text


def is_alone() -> bool:
    """Tell whether no other process is connected: then nothing here waits for one."""
    return _group() is None


def _group() -> Any:
    """Return the group for flags and objects; None if no other process is connected."""
    return None if _links is None or _planned is not None else _links.group


@contextmanager
def planned_for(processes: int) -> Iterator[None]:
    """Plan for `processes` processes inside the `with` block, as the first of them; none is started."""
    global _planned
    before, _planned = _planned, processes
    try:
        yield
    finally:
        _planned = before


@contextmanager
def connected() -> Iterator[None]:
    """Connect the processes of a run inside the `with` block, each with its own card.

    Does nothing in a single process, or where they are connected. Raises ModelError if a process has no card, or two
    share one; LostProcessError, naming the phase, if another process ended or did not answer in time.
    """
    if world_size() == 1 or not _is_launched() or not is_alone():
        yield
        return
    failed = True
    try:
        _connect()
        yield
        failed = False
    except BaseException as error:
        if _is_lost(error):
            raise LostProcessError(_lost_message(error)) from error
        # Before the connections close: the others then know that the error is reported.
        reports(error)
        raise
    finally:
        _disconnect(wait=failed)


def by_first(make: Callable[[], T]) -> T:
    """Return what `make` returns in the first process, to all; what it raises there is raised in all."""
    if (group := _group()) is None:
        return make()
    import torch
    import torch.distributed as dist

    value: Any = None
    error: Exception | None = None
    if is_first():
        try:
            value = make()
        except Exception as caught:  # noqa: BLE001 - raised below, in all processes
            error = caught
    box = [value, error and _portable(error)]
    dist.broadcast_object_list(box, src=0, group=group, device=torch.device("cpu"))
    if not is_first():
        value, error = box
    if error is not None:
        raise error
    result: T = value
    return result


@contextmanager
def entered_by_first(context: Callable[[], AbstractContextManager[T]]) -> Iterator[T]:
    """Enter a context, such as a lock, in the first process alone; the others wait for what it yields."""
    with ExitStack() as stack:
        yield by_first(lambda: stack.enter_context(context()))


def least(value: int) -> int:
    """Return the smallest of the processes' values."""
    return -largest(-value)


def largest(value: int) -> int:
    """Return the largest of the processes' values."""
    if (group := _group()) is None:
        return value
    import torch
    import torch.distributed as dist

    tensor = torch.tensor(value)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=group)
    return int(tensor)


def gathered(value: T) -> list[T]:
    """Return the values of all processes, in the order of their ranks."""
    if (group := _group()) is None:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def own_share(count: int) -> range:
    """Return which of `count` items in order this process takes: neighbors, as many as each other process."""
    if is_alone():
        return range(count)
    first, last = (number * count // world_size() for number in (rank(), rank() + 1))
    return range(first, last)


def reports(error: BaseException) -> bool:
    """Tell whether this process is to print `error`: the first to ask about it, and no other was there before.

    A lost process is reported only if nobody reported why it ended.
    """
    if _links is None:
        return True
    text = str(error) or type(error).__name__
    if isinstance(error, LostProcessError):
        time.sleep(_REPORT_SECONDS)
        text = ""
    with suppress(Exception):
        stored = _links.store.compare_set(_ERROR, "", f"{rank()} {text}").decode()
        reporter, _, reported = stored.partition(" ")
        return int(reporter) == rank() or (bool(text) and reported != text)
    return True


def _is_launched() -> bool:
    """Tell whether a launcher said how to reach the other processes; a number alone may be left over from another."""
    return _planned is None and all(name in os.environ for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))


def _of_launcher(name: str, alone: int) -> int:
    """Return a number that the launcher set in the environment; `alone` in a single process."""
    return alone if _planned or world_size() == 1 else int(os.environ.get(name) or alone)


def _connect() -> None:
    global _links
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=timedelta(minutes=10)))
    _links = _Links(PrefixStore("lora_llava", store))
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        _check_card(torch.cuda.device_count())
        torch.cuda.set_device(local_rank())
        # A collective that hangs then raises an error, which names the phase, instead of ending the process.
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
        store=PrefixStore("torch", store),
        rank=rank(),
        world_size=world_size(),
        timeout=_timeout(),
    )
    _links.group = dist.new_group(backend="gloo", timeout=_FIRST_PATIENCE)
    if on_cuda:
        device = torch.cuda.current_device()
        _refuse_shared_cards(gathered((socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid))))
        # NCCL takes its buffers now, so that the free memory that a stage is planned for is without them.
        dist.all_reduce(torch.zeros(1, device=device))


def _timeout() -> timedelta:
    """Return how long a collective of a step may take. Raises RecipeError for a variable that does not say it."""
    text = os.environ.get(TIMEOUT) or str(_TIMEOUT_SECONDS)
    with suppress(ValueError, OverflowError):
        timeout = timedelta(seconds=float(text))
        if timeout > timedelta():
            return timeout
    raise RecipeError(f"{TIMEOUT} is {text!r}, must be a number of seconds above 0, such as 1800; correct or unset it")


def _disconnect(*, wait: bool) -> None:
    """Close the connections; after an error (`wait`), let the first process clean up before the launcher ends it."""
    import torch.distributed as dist

    if _links is None:
        return
    _links.group = None
    if dist.is_initialized():
        dist.destroy_process_group()
    with suppress(Exception):
        if is_first():
            _links.store.set(_FIRST_LEFT, "1")
        waited_since = time.monotonic()
        while wait and time.monotonic() - waited_since < _CLEANUP_SECONDS and not _links.store.check([_FIRST_LEFT]):
            time.sleep(0.1)


def _check_card(cards: int) -> None:
    if local_rank() >= cards:
        raise ModelError(
            f"process {rank()} of {world_size()} has no card: it is number {local_rank()} on its machine, and the "
            f"cards are 0 to {cards - 1}. Start as many processes as there are cards, or make more visible with "
            "CUDA_VISIBLE_DEVICES"
        )


def _refuse_shared_cards(cards: list[tuple[str, str]]) -> None:
    for number, card in enumerate(cards):
        if (other := cards.index(card)) != number:
            raise ModelError(
                f"processes {other} and {number} share one card of {card[0]}: each needs its own. Start as many "
                "processes as there are cards, and let every process see all cards (CUDA_VISIBLE_DEVICES)"
            )


def _portable(error: Exception) -> Exception:
    """Return an error that can be sent: itself, or its text."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - just written
    except Exception:  # noqa: BLE001 - whatever it holds
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _is_lost(error: BaseException) -> bool:
    """Tell whether an error is that of a connection to another process."""
    if "torch" not in str(type(error).__module__) and not isinstance(error, RuntimeError):
        return False
    import torch.distributed as dist

    return isinstance(error, (dist.DistBackendError, dist.DistNetworkError)) or "gloo/transport" in str(error)


def _lost_message(error: BaseException) -> str:
    text = " ".join(str(error).split())
    what = "did not answer in time" if "imed out" in text or "imeout" in text else "ended"
    return (
        f"process {rank()} of {world_size()}: another process of the run {what}; this one was at: "
        f"{_phase}. The last checkpoint is intact: start the run again with --resume. "
        f"({text[:200]})"
    )
