"""What the machine has, and what a process has held."""

from __future__ import annotations

import subprocess
import sys

from lora_llava.system.device import peak_memory_bytes

CHILD = "from lora_llava.system.device import peak_memory_bytes; print(peak_memory_bytes())"
HELD = 3 * 2**29


def test_a_process_does_not_count_what_its_parent_held() -> None:
    held = bytearray(HELD)
    held[:: 2**12] = b"1" * len(held[:: 2**12])
    child = subprocess.run([sys.executable, "-c", CHILD], check=True, capture_output=True, text=True)
    assert peak_memory_bytes() >= HELD
    assert int(child.stdout) < HELD / 2
