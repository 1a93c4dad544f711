"""Fine-tune LLaVA-1.5-style vision-language models on one consumer GPU."""

from __future__ import annotations

__version__ = "0.1.0"
