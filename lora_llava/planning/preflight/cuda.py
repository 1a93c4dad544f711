"""Ask the driver for the CUDA devices of this machine: importing torch would take seconds."""

from __future__ import annotations

import ctypes
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from lora_llava.system.device import has_driver

_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h."""


@cache
def capabilities() -> list[tuple[int, int]] | None:
    """Return the compute capability of each visible device; [] on a CPU; None where only torch can tell (ROCm)."""
    if not has_driver():
        return []
    built = _torch_built_for()
    if built != "cuda":
        return [] if built == "cpu" else None
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    return [(_attribute(driver, number, _MAJOR), _attribute(driver, number, _MINOR)) for number in range(count.value)]


def _attribute(driver: ctypes.CDLL, device: int, attribute: int) -> int:
    value = ctypes.c_int()
    driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    return value.value


def _torch_built_for() -> str | None:
    """Return what the installed torch was built for, `cuda` or `cpu`; None if its files do not tell."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    values = dict(re.findall(r"^(cuda|hip|xpu)\b[^=\n]*=\s*(.+)$", text, re.MULTILINE))
    if values.get("cuda", "None").strip() != "None":
        return "cuda"
    return "cpu" if all(value.strip() == "None" for value in values.values()) else None
