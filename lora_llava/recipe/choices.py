"""Values that a recipe and the command line both offer; light, so that help needs no pydantic."""

from __future__ import annotations

from typing import Literal

Metric = Literal["exact_match", "vqa_v2", "token_f1"]
"""How an answer is scored; see docs/evaluation.md."""
MetricSetting = Literal["auto", Metric]
