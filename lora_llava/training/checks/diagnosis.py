"""Name what is wrong with a stage from its losses: diverged, over-fitting, not looking at images, collapsed answers.

Pure functions of figures that are logged anyway. Each asks for all that sets its cause apart from the others; where the
same figures have another cause, the message names it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MIN_WINDOW, WINDOW_QUESTIONS = 5, 64
"""Steps in a window, over which losses are averaged: five, or as many as hold so many questions,"""
MAX_WINDOW = 64
"""but no more than this."""
SPIKE_FACTOR, SPIKE_MARGIN, SPIKE_QUESTIONS = 4.0, 1.0, 8
"""A loss is out of line above so many times the best mean, and so much; it is that of a step, or of the last steps that
hold so many questions together: one hard question is no divergence."""
DRIFT_FACTOR, DRIFT_MARGIN = 2.0, 0.5
"""The mean of a window is out of line above so many times the best mean, and so much."""
RISE, CLEAR_RISE = 1.05, 1.15
"""A validation loss has risen at so many times the best, twice in a row, or once at the higher factor."""
FALL = 0.9
"""A training loss has fallen at this share of the first."""
MIN_GAIN = 0.01
"""Share of its loss that a model which looks owes to the images."""
ALIKE_IN_A_ROW = 3
"""Validations without a gain after which a model is said not to look before its stage ends."""
MIN_SAMPLES = 3
"""Sample answers that tell whether a model always says the same."""


@dataclass
class LossTrend:
    """Follows the loss of each step and tells when it leaves its course."""

    window: int = MIN_WINDOW
    spike: int = 1
    """Last steps whose mean tells a jump."""
    recent: list[float] = field(default_factory=list)
    """Losses of the last steps, a window at most."""
    best: float = math.inf
    """Lowest mean of a window, or of all steps while there are fewer."""

    @classmethod
    def over(cls, questions: Sequence[int]) -> LossTrend:
        """Choose the steps of a mean by the questions of each step."""
        mean = max(1.0, sum(questions) / len(questions)) if questions else WINDOW_QUESTIONS
        window, spike = math.ceil(WINDOW_QUESTIONS / mean), math.ceil(SPIKE_QUESTIONS / mean)
        return cls(min(MAX_WINDOW, max(MIN_WINDOW, window)), spike)

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs; for JSON."""
        return {"recent": list(self.recent), "best": self.best if self.recent else None}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`; from none, begin."""
        self.recent = list(state.get("recent", ()))
        self.best = state["best"] if self.recent else math.inf

    def diverged(self, loss: float) -> float | None:
        """Take note of a step's loss; return the best mean if the losses have left it for a much higher one."""
        has_reference = len(self.recent) >= self.spike
        self.recent = [*self.recent, loss][-self.window :]
        mean, jump = (sum(losses) / len(losses) for losses in (self.recent, self.recent[-self.spike :]))
        is_whole = len(self.recent) == self.window
        if has_reference and (
            jump > SPIKE_FACTOR * self.best + SPIKE_MARGIN
            or (is_whole and mean > DRIFT_FACTOR * self.best + DRIFT_MARGIN)
        ):
            return self.best
        # A mean of few steps is no reference yet: it may be low by chance.
        is_few = len(self.recent) < max(MIN_WINDOW, 2 * self.spike)
        self.best = mean if is_few else min(self.best, mean)
        return None


@dataclass(frozen=True, slots=True)
class Validation:
    """One validation, and the training loss on the way to it."""

    step: int
    loss: float
    blind: float | None
    """Loss with the mean color in place of each image."""
    gain: float | None
    """What it is above the loss with the images, on the same records."""
    train_loss: float | None
    """Mean over the steps since the validation before."""
    has_learned: bool = True
    """Whether the training loss is clearly lower than at the beginning."""
    samples: tuple[tuple[str, str], ...] = ()
    """True answers, and those of the model."""

    @property
    def is_alike(self) -> bool:
        """Whether the images change nothing, for better or worse."""
        if self.gain is None or self.blind is None:
            return False
        return abs(self.gain) < MIN_GAIN * (self.blind - self.gain)

    @property
    def repeated(self) -> str | None:
        """The one answer to all sample questions, if it is right for half of them at most."""
        truths, answers = [truth.strip().lower() for truth, _ in self.samples], {text for _, text in self.samples}
        if len(self.samples) < MIN_SAMPLES or len(answers) > 1:
            return None
        [answer] = answers
        return answer if 2 * truths.count(answer.strip().lower()) <= len(truths) else None


def read_validations(history: Sequence[Mapping[str, Any]]) -> list[Validation]:
    """Read the validations of a stage from its log; rows of losses come before the validation of their step."""
    found: list[Validation] = []
    before: list[tuple[int, float]] = []
    losses: list[float] = []
    last_step = 0
    for row in history:
        if row.get("loss") is not None:
            before.append((row["step"] - last_step, row["loss"]))
            losses.append(row["loss"])
            last_step = row["step"]
        if row.get("eval_loss") is not None:
            steps = sum(count for count, _ in before)
            samples = tuple((one["answer"], one["prediction"]) for one in row.get("samples") or ())
            mean = sum(count * loss for count, loss in before) / steps if steps else None
            figures = (row.get("eval_loss_blind"), row.get("image_gain"))
            found.append(Validation(row["step"], row["eval_loss"], *figures, mean, has_fallen(losses), samples))
            before = []
    return found


def best_of(validations: Sequence[Validation]) -> Validation:
    """Return the validation of the lowest loss, the first of equals."""
    return min(validations, key=lambda one: one.loss)


def diagnose(
    validations: Sequence[Validation], max_steps: int, *, keeps_best: bool, known: Collection[str] = ()
) -> dict[str, str]:
    """Name what is wrong at the last of the `validations`, by the kind of the warning; `known`: what was named before.

    A stage that over-fits, or has diverged, may not look either; but its cause, and its cure, are the former.
    """
    found = {
        "over-fitting": over_fitting(validations, keeps_best=keeps_best),
        "not looking": not_looking(validations, max_steps),
        "collapsed": collapsed(validations, max_steps),
    }
    if found["over-fitting"] or {"over-fitting", "diverged"} & set(known):
        del found["not looking"]
    return {kind: text for kind, text in found.items() if text is not None}


def over_fitting(validations: Sequence[Validation], *, keeps_best: bool) -> str | None:
    """Say so if the validation loss has risen from its best while the training loss went on falling."""
    best, last = best_of(validations), validations[-1]
    risen = [one.loss > RISE * best.loss for one in validations[-2:]]
    has_risen = last.loss > CLEAR_RISE * best.loss or (len(risen) == 2 and all(risen))
    if not has_risen or best.train_loss is None or last.train_loss is None or last.train_loss >= best.train_loss:
        return None
    kept = f"keep: best keeps step {best.step}" if keeps_best else f"keep: best would keep step {best.step}"
    return (
        f"over-fitting: the validation loss rose from {best.loss:.4f} at step {best.step} to {last.loss:.4f}, while "
        f"the training loss fell from {best.train_loss:.4f} to {last.train_loss:.4f}. {kept}; fewer epochs, a lower "
        "learning_rate or more records help"
    )


def not_looking(validations: Sequence[Validation], max_steps: int) -> str | None:
    """Say so if images change nothing though the model learns: at a stage's end, or three times in its second half.

    A model that has not learned anything yet does not look either; that is another cause.
    """
    last = validations[-1]
    if not last.is_alike or not last.has_learned:
        return None
    late = [one.is_alike for one in validations if 2 * one.step >= max_steps][-ALIKE_IN_A_ROW:]
    if last.step < max_steps and not (len(late) == ALIKE_IN_A_ROW and all(late)):
        return None
    assert last.gain is not None
    assert last.blind is not None
    return (
        f"the model does not look at the images: its validation loss is {last.blind - last.gain:.4f} with them and "
        f"{last.blind:.4f} with the mean color in place of each. Either the answers do not depend on the images (check "
        "with lora-llava check whether images and questions belong together), or it has not learned to look yet: train "
        "longer, run the align stage first, or raise mm_projector_lr"
    )


def has_fallen(losses: Sequence[float]) -> bool:
    """Tell whether the last fifth of the losses is clearly below the first fifth."""
    count = max(1, len(losses) // 5)
    return len(losses) > 1 and sum(losses[-count:]) < FALL * sum(losses[:count])


def collapsed(validations: Sequence[Validation], max_steps: int) -> str | None:
    """Say so if a model gives one answer to different questions, at the end of a stage or twice in its second half."""
    late = [one.repeated for one in validations if 2 * one.step >= max_steps][-2:]
    if not late or late[-1] is None or (validations[-1].step < max_steps and late != [late[-1]] * 2):
        return None
    return (
        f"all {len(validations[-1].samples)} sample answers are {late[-1]!r}, though the true answers differ. Either "
        "training ruined the model (lower learning_rate), or it has learned the most frequent answer alone (balance "
        "the answers), or it is at its beginning (train longer)"
    )
