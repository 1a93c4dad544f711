"""Choose the weights that a stage keeps, best or last, and decide when it stops early."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Keep = Literal["best", "last"]
Row = Mapping[str, Any]

_MEASURED = ("eval_loss", "eval_loss_blind", "image_gain")


@dataclass(frozen=True, slots=True)
class KeptStep:
    """The step whose weights are kept, and the validation losses that decided it."""

    step: int
    last_step: int
    metrics: dict[str, float]
    """Metrics of the kept step and, with validations, `best_step`, `best_eval_loss`, `last_step`, `last_eval_loss`."""

    def __str__(self) -> str:
        """Name the best, the last and the kept step in one line."""
        if "best_step" not in self.metrics:
            return f"kept: step {self.step:,}, the last; no validation loss was measured"
        best, last = self.metrics["best_eval_loss"], self.metrics["last_eval_loss"]
        if self.metrics["best_step"] == self.last_step:
            return f"best validation loss {best:.4f} at the last step, {self.last_step:,}, which is kept"
        name = "the last" if self.step == self.last_step else "the best"
        return (
            f"best validation loss {best:.4f} at step {self.metrics['best_step']:,}, last {last:.4f} at step "
            f"{self.metrics['last_step']:,}; kept: step {self.step:,}, {name}"
        )


def choose_kept(history: Sequence[Row], last_step: int, keep: Keep) -> KeptStep:
    """Choose the step whose weights a finished stage keeps, from its log."""
    validations = [row for row in history if row.get("eval_loss") is not None]
    best = min(validations, key=lambda row: float(row["eval_loss"]), default=None)
    step = int(best["step"]) if best is not None and keep == "best" else last_step
    losses = [row["loss"] for row in history if row.get("loss") is not None and row["step"] <= step]
    metrics = {"train_loss": float(losses[-1])} if losses else {}
    if best is not None:
        last = validations[-1]
        measured = next((row for row in validations if row["step"] == step), {})
        metrics |= {key: measured[key] for key in _MEASURED if key in measured}
        metrics |= {"best_step": best["step"], "best_eval_loss": best["eval_loss"]}
        metrics |= {"last_step": last["step"], "last_eval_loss": last["eval_loss"]}
    return KeptStep(step, last_step, metrics)


def has_lost_patience(history: Sequence[Row], patience: int | None) -> bool:
    """Tell whether none of the last `patience` validations improved on the best before them."""
    losses = [float(row["eval_loss"]) for row in history if row.get("eval_loss") is not None]
    return patience is not None and bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= patience
