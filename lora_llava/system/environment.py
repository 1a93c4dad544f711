"""Versions, device and memory of this machine, without any path, name or setting of the user."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import psutil
import torch

from lora_llava.system.device import pick_device, pick_dtype
from lora_llava.system.text import dtype_name

_PACKAGES = (
    "lora-llava",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "huggingface_hub",
    "Pillow",
)


def describe_environment() -> dict[str, str]:
    """Return what affects a run on this machine, as name and value in display order."""
    device = pick_device()
    rows = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    rows.update({name: _version(name) for name in _PACKAGES})
    rows["device"] = "CPU"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        rows["device"] = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
        rows["device memory"] = f"{properties.total_memory / 2**30:.1f} GiB"
        rows["devices"] = str(torch.cuda.device_count())
        rows["CUDA"] = str(torch.version.cuda)
    rows["precision: auto"] = dtype_name(pick_dtype("auto", device))
    rows["CPU cores"] = str(os.cpu_count())
    rows["torch threads"] = str(torch.get_num_threads())
    rows["memory"] = f"{psutil.virtual_memory().total / 2**30:.1f} GiB"
    return rows


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
