"""Device, compute dtype, free and peak memory.

PyTorch is imported inside the functions that need it: a dry run on a machine without a GPU does not.
"""

from __future__ import annotations

import ctypes
import platform
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from lora_llava.errors import ModelError
from lora_llava.system.ranks import local_rank, world_size
from lora_llava.system.text import counted, dtype_name

if TYPE_CHECKING:
    import torch

CUDA_CONTEXT = 2**29
"""Bytes that a process holds on a CUDA device next to PyTorch's allocator: context and kernels, an estimate."""


def has_driver() -> bool:
    """Tell whether a GPU driver is installed; without one, importing PyTorch to look for a GPU is unnecessary."""
    if Path("/dev/kfd").exists():
        return True
    try:
        # The library that PyTorch opens first, too.
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def device_type() -> str:
    """Return the type of the device that `pick_device` picks; imports PyTorch only if there is a driver."""
    return pick_device().type if has_driver() else "cpu"


def pick_device() -> torch.device:
    """Return the CUDA device of this process if there is one, else the CPU."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank()) if world_size() > 1 else torch.device("cuda")


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the compute dtype of a `precision` setting.

    `auto`: bf16 on CUDA, fp16 on a card without bf16, fp32 on a CPU, where both are 100x slower. Raises ModelError for
    a half precision that the device does not support.
    """
    import torch

    is_cuda = device.type == "cuda"
    if precision == "fp32" or (precision == "auto" and not is_cuda):
        return torch.float32
    if precision == "fp16" and not is_cuda:
        raise ModelError(f"precision: fp16 is not supported on this {device.type}; use auto or fp32")
    has_bf16 = is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16" and not has_bf16:
        raise ModelError(f"precision: bf16 is not supported on this {device.type}; use auto or fp32")
    return torch.bfloat16 if precision != "fp16" and has_bf16 else torch.float16


def precision_line(precision: str, dtype: object) -> str | None:
    """Return a line for the console that says why a run computes in fp16; None if it does not."""
    if dtype_name(dtype) != "float16":
        return None
    scaled = "the loss is scaled, so that small gradients do not become 0"
    if precision != "auto":
        return f"precision: fp16 (recipe); {scaled}"
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"precision: fp16 (auto: bf16 needs compute capability 8.0, this card has {major}.{minor}); {scaled}"


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return a context in which a model computes in `dtype`; its trained weights are fp32. In fp32 it does nothing."""
    import torch

    is_half = dtype in (torch.float16, torch.bfloat16)
    return torch.autocast(device.type, dtype=dtype if is_half else torch.bfloat16, enabled=is_half)


def describe_device() -> str:
    """Describe the device in a few words, without any name or setting of the user."""
    import torch

    device = pick_device()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return f"CPU ({platform.machine()}), {counted(torch.get_num_threads(), 'thread')}"


@contextmanager
def memory_capped(memory: int | None) -> Iterator[None]:
    """Keep the process within `memory` bytes of its CUDA device inside the `with` block, its context included.

    An allocation beyond that raises torch.OutOfMemoryError, as on a device of that size. None, or a CPU: no cap.
    """
    import torch

    if memory is None or not torch.cuda.is_available():
        yield
        return
    share = (memory - CUDA_CONTEXT) / torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, share)))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def reset_peak_memory() -> None:
    """Begin to count the peak memory anew; without CUDA that needs Linux, elsewhere the peak stays."""
    import torch

    if torch.cuda.is_available():
        # What is only cached is not needed from here on.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):
        # Writing 5 resets VmHWM; see proc(5).
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_bytes() -> int:
    """Return the peak memory of the process since `reset_peak_memory`: device memory on CUDA, else resident memory."""
    import torch

    if torch.cuda.is_available():
        # CUDA graphs compute in memory that is reserved, but not allocated while they are replayed.
        return int(torch.cuda.max_memory_reserved())
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage, whose peak includes that of the parent process.
        match = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"), re.MULTILINE)
        if match:
            return int(match[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_memory_bytes(device: str) -> int:
    """Return the free memory in bytes: device memory on CUDA, within `memory_capped`, else that of the machine.

    The machine's is also bounded by the limits of control groups, as of a container.
    """
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        capped = int(torch.cuda.get_per_process_memory_fraction() * total) - torch.cuda.memory_reserved()
        return min(free, capped)
    available: int = psutil.virtual_memory().available
    return min([available, *left_by_control_groups()])


def left_by_control_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """List the bytes that each memory limit of the process's control groups leaves, those of parent groups included.

    `own` has a line HIERARCHY:CONTROLLERS:PATH for each hierarchy; cgroups(7) of Linux. In a container, PATH may be one
    of the host, and then the root is the container's group.
    """
    left = []
    for line in own.read_text(encoding="utf-8").splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = top / path.lstrip("/")
        for directory in (group, *group.parents):
            if directory == top or top in directory.parents:
                # Files are missing without a controller, and the limit may be `max`.
                with suppress(OSError, ValueError):
                    left.append(_left_in(directory, *names))
    return left


def _left_in(group: Path, limit: str, usage: str, cache: str) -> int:
    """Return the bytes that the limit of a control group leaves; cached files count as free."""
    statistics = dict(line.split(" ") for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
    used = int((group / usage).read_text(encoding="utf-8")) - int(statistics.get(cache, 0))
    return max(0, int((group / limit).read_text(encoding="utf-8")) - used)
