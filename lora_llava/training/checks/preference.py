"""Follow the preferences of a stage: they must start at zero, and chosen answers should not become unlikely."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import nn

from lora_llava.errors import TrainingError
from lora_llava.training.checks.check import Check, CompletedStep, ValidationPass
from lora_llava.training.objectives.preference import PairSums, PreferenceObjective

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-2}
"""Allowed mean margin of log-probabilities at the first step, relative to the log-probabilities of a pair, by dtype."""
_MIN_PAIRS = 64
"""Pairs over which the chosen answers are followed."""
_FALL_SHARE, _MIN_FALL = 0.1, 1.0
"""Warn if the mean log-probability of chosen answers has fallen by this share of what it was, and by this much."""


class PreferenceWatch(Check):
    """Logs rewards and log-probabilities; comes before the non-finite guard, so that it sees every step."""

    key: ClassVar[str] = "preference"

    def __init__(self, objective: PreferenceObjective, dtype: torch.dtype, *, starts_at_zero: bool = True) -> None:
        """`starts_at_zero`: whether the first step must have margins of 0, as without dropout."""
        self.objective = objective
        self.dtype = dtype
        self.starts_at_zero = starts_at_zero
        self.logged = PairSums()
        """Sums since the last line of the log."""
        self.recent = PairSums()
        """Sums over the pairs by which the chosen answers are judged next."""
        self.has_warned = False

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs to log the same figures as an uninterrupted one."""
        return {"logged": asdict(self.logged), "recent": asdict(self.recent), "has_warned": self.has_warned}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Continue from a `state`."""
        state = state or {}
        self.logged, self.recent = (PairSums(**state.get(name, {})) for name in ("logged", "recent"))
        self.has_warned = state.get("has_warned", False)

    def on_step(self, step: CompletedStep) -> str | None:
        """Add up the pairs of a step; return a warning if chosen answers have become less likely.

        Raises TrainingError if the first step does not start where the reference is.
        """
        sums = self.objective.take_sums(step.total.device)
        if step.number == 1 and self.starts_at_zero:
            self._check_start(sums, float(step.total))
        self.logged, self.recent = self.logged + sums, self.recent + sums
        if self.recent.pairs < _MIN_PAIRS:
            return None
        recent, self.recent = self.recent, PairSums()
        return self._falling(step.number, recent)

    def _check_start(self, sums: PairSums, loss: float) -> None:
        """Raise TrainingError unless the margins are 0, up to rounding."""
        margin = sums.margin_size / self.objective.settings.beta
        scale = sums.pairs + abs(sums.log_prob_chosen) + abs(sums.log_prob_rejected)
        if margin <= TOLERANCE[self.dtype] * scale:
            return
        raise TrainingError(
            f"stage prefer, step 1: the loss is {loss:.4f}, where margins of 0 would give "
            f"{self.objective.start_loss:.4f}: the log-probabilities of the answers differ from their reference "
            f"by {margin / sums.pairs:.2g} a pair, although the weights are the same. So a training step computes a "
            "row differently from the reference pass: report the versions that `lora-llava env` prints"
        )

    def _falling(self, step: int, sums: PairSums) -> str | None:
        """Return a warning, once, if chosen answers have become much less likely than at the start."""
        now = sums.log_prob_chosen / sums.pairs
        change = sums.reward_chosen / self.objective.settings.beta / sums.pairs
        if self.has_warned or -change < max(_MIN_FALL, _FALL_SHARE * abs(now - change)):
            return None
        self.has_warned = True
        return (
            f"step {step}: the chosen answers have become less likely: their log-probability was {now - change:.1f} at "
            f"the start and is {now:.1f} now, means of {sums.pairs:.0f} pairs. The margin grows only because the "
            "rejected ones fall faster; the probability goes to answers that are in no pair. Set sft_weight, such as "
            "0.2, a higher beta, or a lower learning_rate"
        )

    def on_log(self, step: int, model: nn.Module, row: dict[str, Any]) -> dict[str, Any]:
        """Add the means over the pairs since the last line."""
        row, self.logged = {**row, **self.logged.means()}, PairSums()
        return row

    def on_validation(self, validation: ValidationPass) -> None:
        """Add the means over the validation pairs."""
        device = next(validation.model.parameters()).device
        validation.metrics |= self.objective.take_sums(device).means("eval_")
