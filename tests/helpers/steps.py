"""A trainer over a few rows made by hand, of which some can be spoilt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from lora_llava.conversation.encode import Encoded
from lora_llava.data.packing import Row
from lora_llava.data.record import ImageSource, Record
from lora_llava.data.rows import PackedRows
from lora_llava.training.checks.monitor import StageMonitor
from lora_llava.training.checks.non_finite import NonFiniteGuard
from lora_llava.training.trainer import PackedTrainer
from tests.helpers.runs import State, state_of
from tests.parity.test_packed import branches, build_model, image

STEPS = 6
IN_A_STEP = 4
"""Conversations of a step: two rows of two, each row about another image."""


class Pictures:
    """Reads images that are noise; those whose key is in `spoilt` are NaN."""

    def __init__(self, spoilt: Sequence[str] = ()) -> None:
        self.spoilt = set(spoilt)

    def __call__(self, record: Record) -> torch.Tensor:
        """Return the pixels of the image of `record`."""
        assert record.image is not None
        pixels = image(int(record.image.key), torch.float32)
        return pixels * float("nan") if record.image.key in self.spoilt else pixels


def record(number: int, key: str) -> Record:
    """A record about image `key`; its texts are elsewhere."""
    source = ImageSource(key, Path(f"/data/{key}.png"), None)
    return Record(str(number), source, (), f"train.json, record {number}", number)


def made_rows(steps: Sequence[int] = range(STEPS), spoilt: Sequence[str] = ()) -> PackedRows:
    """Rows of some of the steps; image k belongs to row k, and its first conversation is record 2 k."""
    encoded: list[Encoded] = branches(STEPS * IN_A_STEP)
    records = [record(number, str(number // 2)) for number in range(len(encoded))]
    rows: list[Row] = [((2 * row, 2 * row + 1),) for step in steps for row in (2 * step, 2 * step + 1)]
    return PackedRows(rows, records, encoded, Pictures(spoilt))


def made_trainer(
    directory: Path,
    rows: PackedRows,
    *,
    most_skipped: int = 0,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> PackedTrainer:
    """A trainer of a tiny model over `rows`, two to a step, at a constant learning rate.

    `dtype`: of the frozen weights.
    """
    arguments = TrainingArguments(
        output_dir=str(directory),
        **{
            "max_steps": len(rows) // 2,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "save_strategy": "no",
            "use_cpu": True,
            "report_to": "none",
            "remove_unused_columns": False,
            "label_names": ["labels"],
            "disable_tqdm": True,
            **settings,
        },
    )
    guard = NonFiniteGuard(rows, stage="instruct", most_skipped=most_skipped, dtype=dtype)
    checks = [guard, StageMonitor(skipped=guard.skipped)]
    model = build_model()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and "projector" not in name:
            parameter.data = parameter.data.to(dtype)
    return PackedTrainer(model, arguments, rows, None, mm_projector_lr=5e-4, checks=checks)


def guard_of(trainer: PackedTrainer) -> NonFiniteGuard:
    """The check that skips steps."""
    [guard] = [check for check in trainer.checks if isinstance(check, NonFiniteGuard)]
    return guard


def states_of_steps(trainer: PackedTrainer) -> list[State]:
    """Copies of the weights before each optimizer step; filled while the trainer trains."""
    states: list[State] = []
    checked = trainer._checked_loss

    def watched() -> Any:
        states.append(state_of(trainer.model))
        return checked()

    trainer._checked_loss = watched  # type: ignore[method-assign]
    return states


def same(one: State, other: State) -> bool:
    """Tell whether two states are equal to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
