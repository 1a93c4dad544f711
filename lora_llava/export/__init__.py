"""What was trained, in the layouts of others.

Each format is a function in FORMATS; what is heavy is imported when it is called.
"""

from __future__ import annotations

from lora_llava.export.options import Exporter

FORMATS: dict[str, Exporter] = {}
"""Every format by its name on the command line."""
