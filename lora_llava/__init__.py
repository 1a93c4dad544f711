"""Fine-tune LLaVA-1.5-style vision-language models on one consumer GPU."""

from __future__ import annotations

from lora_llava.system.quiet import hold_back_advice

hold_back_advice()

__version__ = "0.1.0"
