"""Log figures of a stage next to its loss, and warn when one of them is unusual."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from statistics import median
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.utils import get_total_norm

from lora_llava.data.stage import StepCounts
from lora_llava.modeling.packed import llava_in
from lora_llava.modeling.structure import PROJECTOR
from lora_llava.system.text import counted, listed
from lora_llava.training.checks.check import Check, CompletedStep, ValidationPass
from lora_llava.training.checks.diagnosis import LossTrend, diagnose, read_validations

_HISTORY, _MIN_HISTORY = 50, 10
"""Maximum and minimum number of recent steps that a gradient norm is compared with."""
_ALARM_FACTOR = 10.0
"""Warn if a gradient norm exceeds its running median, or the projector norm its initial value, by this factor."""
_ZERO_STEPS = 5
"""Warn after this many steps in a row without a gradient; a single step may hold only text."""
_MIN_SUPERVISED_SHARE = 1e-3
"""Warn if fewer of the computed tokens are supervised."""
_ZERO_NORM = 1e-3
"""Initial norm below which a projector counts as zero, so that later norms cannot be compared with it."""
_NO_GRADIENT = {
    "projector": "no record with an image was in them, or the images' tokens have no part in the answers",
    "lora": "no supervised token was in them, or the base does not use the layers that LoRA adapts",
}
"""Other causes of a zero gradient, by group."""


class StageMonitor(Check):
    """Follows a stage step by step, and gives each kind of warning once; comes last at a validation."""

    key: ClassVar[str] = "watch"

    def __init__(
        self,
        counts: Sequence[StepCounts] = (),
        max_grad_norm: float = 1.0,
        skipped: Sequence[int] = (),
        *,
        keeps_best: bool = False,
    ) -> None:
        """`counts`: of each step of the stage; `skipped`: the steps that were skipped, to which the guard adds."""
        self.skipped = skipped
        self.keeps_best = keeps_best
        self.supervised = [0, *accumulate(step.supervised_tokens for step in counts)]
        self.computed = [0, *accumulate(step.computed_tokens for step in counts)]
        self.max_grad_norm = max_grad_norm
        self.last_logged = 0
        self.norms: dict[str, list[float]] = {}
        """Gradient norms of the last steps, before clipping, by group."""
        self.trend = LossTrend.over([step.questions for step in counts])
        self.warned: list[str] = []
        self.pending: list[str] = []

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs to log the same figures as an uninterrupted one."""
        return {
            "last_logged": self.last_logged,
            "norms": {name: list(values) for name, values in self.norms.items()},
            "trend": self.trend.state(),
            "warned": list(self.warned),
            "pending": list(self.pending),
        }

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Continue from a `state`."""
        state = state or StageMonitor().state()
        self.last_logged = state["last_logged"]
        self.norms = {name: list(values) for name, values in state["norms"].items()}
        self.trend.restore(state.get("trend", {}))
        self.warned, self.pending = list(state["warned"]), list(state["pending"])

    def on_step(self, step: CompletedStep) -> str | None:
        """Record a step that is about to be applied; return a warning if the training diverged."""
        self.see_step(step.number, step.norms)
        if (before := self.see_loss(step.loss)) is None:
            return None
        return (
            f"step {step.number}: the loss rose from {before:.4f} to {step.loss:.4f}: the training diverged, or these "
            f"records are unlike all before. If it stays high, stop, and resume from a checkpoint with a lower "
            f"learning_rate. Last good checkpoint: {step.last_checkpoint() or 'none yet'}"
        )

    def on_validation(self, validation: ValidationPass) -> None:
        """Warn of records whose loss is not finite, and of what the losses reveal."""
        if validation.unusable:
            records = validation.rows.records
            named = [f"{records[index].where} ({reason})" for index, reason in validation.unusable.items()]
            self.warn(
                "validation",
                f"{counted(len(named), 'record')} left out of the validation loss: {listed(named, separator='; ')}. "
                "Replace the image, or exclude the record",
            )
        if validation.loss is not None:
            history = [*validation.history, {"step": validation.step, **validation.metrics}]
            warnings = diagnose(
                read_validations(history), validation.max_steps, keeps_best=self.keeps_best, known=self.warned
            )
            for kind, text in warnings.items():
                self.warn(kind, text)
        validation.metrics |= self.take_warnings()

    def see_loss(self, loss: float) -> float | None:
        """Record the loss of a step; return the best mean before it if it has just diverged, for the first time."""
        before = self.trend.diverged(loss)
        if before is None or "diverged" in self.warned:
            return None
        self.warned.append("diverged")
        return before

    def see_step(self, step: int, norms: Mapping[str, float]) -> None:
        """Record the gradient norms of a step."""
        for name, norm in norms.items():
            before = self.norms.setdefault(name, [])
            usual = median(before) if len(before) >= _MIN_HISTORY else 0.0
            # Late in a stage norms are small; a norm below the clipping threshold is harmless.
            if usual and norm > _ALARM_FACTOR * max(usual, self.max_grad_norm):
                self.warn(
                    f"large gradient, {name}",
                    f"step {step}: the gradient norm of {name}, {norm:.3g}, is {norm / usual:.0f} times its median of "
                    f"the last {len(before)} steps, {usual:.3g}. It is clipped to max_grad_norm "
                    f"{self.max_grad_norm:g}. One record unlike the others, or with a wrong answer, does this; if the "
                    "loss rises after it, lower learning_rate",
                )
            before.append(norm)
            del before[:-_HISTORY]
            if len(before) >= _ZERO_STEPS and not any(before[-_ZERO_STEPS:]):
                self.warn(
                    f"no gradient, {name}",
                    f"step {step}: no gradient has reached {name} for {_ZERO_STEPS} steps, so it does not learn: "
                    f"{_NO_GRADIENT.get(name, 'the loss does not depend on it')}",
                )

    def on_log(self, step: int, model: nn.Module, row: dict[str, Any]) -> dict[str, Any]:
        """Add the figures of the steps since the last line, and warnings.

        The loss in `row` is a mean over all these steps and counts skipped ones as 0: correct it, or remove it if every
        step was skipped.
        """
        row = dict(row)
        steps = step - self.last_logged
        taken = steps - sum(self.last_logged < skipped_step <= step for skipped_step in self.skipped)
        if taken < steps:
            row["skipped_steps"] = len(self.skipped)
            row["loss"] = row["loss"] * steps / max(taken, 1)
        if not taken:
            del row["loss"]
        if step in self.skipped:
            row.pop("grad_norm", None)
        row |= {f"grad_norm_{name}": norms[-1] for name, norms in self.norms.items() if norms}
        row |= self._projector(model) | self._share(step)
        self.last_logged = step
        return row | self.take_warnings()

    def _share(self, step: int) -> dict[str, float]:
        if not self.last_logged < step < len(self.computed):
            return {}
        supervised, computed = (sums[step] - sums[self.last_logged] for sums in (self.supervised, self.computed))
        share = supervised / max(computed, 1)
        if share < _MIN_SUPERVISED_SHARE:
            self.warn(
                "share",
                f"of the tokens computed since step {self.last_logged} only {share:.2%} are supervised: answers are "
                "short next to images and questions, or template and data do not fit; lora-llava inspect shows which",
            )
        return {"supervised_share": round(share, 6)}

    def _projector(self, model: nn.Module) -> dict[str, float]:
        norms = projector_norms(model)
        if norms is None:
            return {}
        now, first, difference = norms
        if first < _ZERO_NORM:
            return {"projector_norm": now}
        if now > _ALARM_FACTOR * first or now < first / _ALARM_FACTOR:
            self.warn(
                "projector",
                f"the projector's norm went from {first:.3g} to {now:.3g}. Its learning rate is too high, or, if the "
                "norm fell, weight_decay is; a projector that was started from very small weights may grow so and be "
                "sound: look at the validation loss",
            )
        return {"projector_norm": now, "projector_change": difference / first}

    def warn(self, kind: str, text: str) -> None:
        """Add a warning to the next log line, unless the stage has had one of this kind."""
        if kind not in self.warned:
            self.warned.append(kind)
            self.pending.append(text)

    def take_warnings(self) -> dict[str, str]:
        """Return and clear the pending warnings, as part of a log line."""
        texts, self.pending = self.pending, []
        return {"warning": "; ".join(texts)} if texts else {}


@torch.no_grad()
def projector_norms(model: nn.Module) -> tuple[float, float, float] | None:
    """Return the norms of the trained projector, of the initial one, and of their difference.

    PEFT stores the initial projector as `original_module`: that of the stage's start, or, if the LoRA of `start_from`
    is trained further, that of the base. None if no projector is trained.
    """
    weights = dict(llava_in(model).get_submodule(PROJECTOR).named_parameters())
    copies = {name: parameter for name, parameter in weights.items() if name.startswith("modules_to_save.default.")}
    pairs = [
        (parameter, weights[name.replace("modules_to_save.default.", "original_module.")])
        for name, parameter in copies.items()
    ]
    if not pairs:
        return None
    now, first = (get_total_norm([pair[index] for pair in pairs]) for index in (0, 1))
    difference = get_total_norm([parameter - other for parameter, other in pairs])
    a, b, c = torch.stack([now, first, difference]).tolist()
    return a, b, c
