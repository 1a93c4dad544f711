"""`Check`: what the trainer asks of each check, and what it shows them.

A new check is one file in this folder: a class that inherits `Check` and overrides the hooks it needs. Add it to the
list in `training/build.py`; the trainer does not change. Order matters: the trainer asks the checks one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from lora_llava.data.rows import PackedRows
from lora_llava.training.parallel.gradients import Gradients

Groups = Mapping[str, Sequence[nn.Parameter]]
"""Trained parameters by the name of their optimizer group, such as lora and projector."""
MeanLoss = Callable[[PackedRows], float | None]
"""Computes the mean loss over the supervised tokens of rows; None if none of them is finite."""


@dataclass(slots=True)
class CompletedStep:
    """An optimizer step whose gradients are complete, before they are clipped and applied."""

    number: int
    """Counts from 1."""
    model: nn.Module
    groups: Groups
    losses: torch.Tensor
    """(rows of the step,) of this process."""
    total: torch.Tensor
    """Sum of the losses over all processes, a scalar; the gradients are sums over them, too."""
    gradients: Gradients
    last_checkpoint: Callable[[], str | None]
    """Names the newest usable checkpoint."""
    loss: float = 0.0
    """`total` on the host; set by the non-finite guard, which comes first."""
    norms: Mapping[str, float] = field(default_factory=dict)
    """Gradient norm of each group before clipping; set with `loss`."""
    loss_scale: Callable[[], float] = lambda: 1.0
    """Returns what the losses were multiplied by for the backward pass; the gradients are divided by it already."""
    is_skipped: bool = False
    """Whether a check has dropped the step; its gradients are then gone, and the checks that follow are not asked."""
    has_overflowed: bool = False
    """Whether it was dropped because `loss_scale` was too large; the step is then not one of the schedule's."""


@dataclass(slots=True)
class ValidationPass:
    """A validation whose loss is known; checks add to `metrics`, which become a line of the log."""

    step: int
    max_steps: int
    model: nn.Module
    rows: PackedRows
    mean_loss: MeanLoss
    loss: float | None
    """Mean over the supervised tokens of `rows`; None if no record has a finite loss."""
    unusable: Mapping[int, str]
    """What is wrong with records whose loss is not finite, by their index in `rows.records`."""
    history: Sequence[Mapping[str, Any]]
    """Lines of the stage's log so far."""
    metrics: dict[str, Any]


class Check:
    """One check around and during training. Every hook does nothing unless a check overrides it."""

    key: ClassVar[str] = ""
    """Name of the check's state in a checkpoint; "" for a check without state."""

    def before_training(self, model: nn.Module) -> None:
        """Look at the model before the first step, or before the state of a checkpoint is loaded."""

    def on_step(self, step: CompletedStep) -> str | None:
        """Judge a step before it is applied; return a warning for the log. May set `step.is_skipped`, or raise."""
        return None

    def on_log(self, step: int, model: nn.Module, row: dict[str, Any]) -> dict[str, Any]:
        """Return `row`, a line of the log with the training loss, with the figures of the check added."""
        return row

    def on_validation(self, validation: ValidationPass) -> None:
        """Add figures to `validation.metrics`; runs without gradients, and with torch's RNG forked."""

    def on_save(self) -> str | None:
        """Look once more before a checkpoint or the artifact is written; return a line for the console, or raise."""
        return None

    def after_training(self, model: nn.Module, num_steps: int) -> str | None:
        """Judge the trained model; return a line for the console, or raise."""
        return None

    def state(self) -> Any:
        """Return what a resumed run needs, ready for JSON."""
        return None

    def restore(self, state: Any) -> None:
        """Continue from a `state`, which is empty in a checkpoint without one; None: the stage begins."""
