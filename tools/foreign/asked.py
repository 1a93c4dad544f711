"""What the asking scripts share: reading questions and writing answers. Runs in every environment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def read_questions(path: str) -> list[dict[str, Any]]:
    """Read the questions: `image` (absolute path), `question`, `prompt` as the kit writes it, `max_new_tokens`."""
    questions: list[dict[str, Any]] = json.loads(Path(path).read_text(encoding="utf-8"))
    return questions


def write_answers(path: str, answers: Sequence[str], logits: Sequence[Any] | None = None, **facts: Any) -> None:
    """Write answers, and the logits after each prompt, (vocabulary,), where the software gives them."""
    data = {"answers": [answer.strip() for answer in answers], **facts}
    if logits is not None:
        np.save(Path(path).with_suffix(".npy"), np.stack([np.asarray(row, dtype=np.float32) for row in logits]))
    Path(path).write_text(json.dumps(data), encoding="utf-8")
