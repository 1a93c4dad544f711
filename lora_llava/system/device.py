"""Where and how precisely to compute, the memory there is, and the most that was taken.

PyTorch is imported inside the functions that ask it: a dry run on a machine without a GPU does without.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from lora_llava.errors import ModelError
from lora_llava.system.text import counted

if TYPE_CHECKING:
    import torch


def has_driver() -> bool:
    """Tell whether a GPU's driver is installed; without one there is no need to import PyTorch and ask it."""
    if Path("/dev/kfd").exists():
        return True
    try:
        # What PyTorch opens first, too.
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def device_type() -> str:
    """Name the device that `pick_device` takes, `cuda` or `cpu`; PyTorch is asked only where there is a driver."""
    return pick_device().type if has_driver() else "cpu"


def pick_device() -> torch.device:
    """Take the CUDA device if there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Choose the compute precision: bf16 on CUDA, fp32 on a CPU, where bf16 is a hundred times slower.

    Raises ModelError if bf16 is asked for on a device without it.
    """
    import torch

    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16" and not has_bf16:
        raise ModelError(f"precision: bf16 is not to be had on this {device.type}; use auto or fp32")
    return torch.bfloat16 if precision != "fp32" and has_bf16 else torch.float32


def describe_device() -> str:
    """Say in a few words what computes here; no name or setting of its user."""
    import torch

    device = pick_device()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return f"CPU ({platform.machine()}), {counted(torch.get_num_threads(), 'thread')}"


def world_size() -> int:
    """Processes that train together, as torchrun and accelerate announce them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def peak_memory_bytes() -> int:
    """Most memory the process has held so far, in bytes: the device's on CUDA, else the process's own."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: there a process begins with what the one that started it held.
        found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_memory_bytes(device: str) -> int:
    """Memory that could be taken now: the device's on CUDA, else the machine's."""
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()
        free: int = torch.cuda.mem_get_info()[0]
        return free
    available: int = psutil.virtual_memory().available
    return available
