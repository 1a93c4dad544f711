"""Diagnose a stage from its losses: divergence, over-fitting, ignored images, collapsed answers.

Pure functions of logged figures. Each requires all evidence that separates its cause from the others; where the same
figures have another cause, the message names it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_MIN_WINDOW, _WINDOW_QUESTIONS = 5, 64
"""Fewest steps in a window of averaged losses, and the questions that a window should hold."""
_MAX_WINDOW = 64
"""Most steps in a window."""
_SPIKE_FACTOR, _SPIKE_MARGIN, _SPIKE_QUESTIONS = 4.0, 1.0, 8
"""A loss is a spike above this factor of the best mean plus this margin; it is averaged over the last steps that hold
this many questions: one hard question is no divergence."""
_DRIFT_FACTOR, _DRIFT_MARGIN = 2.0, 0.5
"""The mean of a window has drifted above this factor of the best mean plus this margin."""
_RISE, _CLEAR_RISE = 1.05, 1.15
"""A validation loss has risen above this factor of the best twice in a row, or once above the higher factor."""
_FALL = 0.9
"""A training loss has fallen below this fraction of the first."""
_MIN_GAIN = 0.01
"""Minimum effect of the images on a model that looks at them, as a fraction of its loss with images."""
_ALIKE_IN_A_ROW = 3
"""Validations in a row without a gain before the warning, if the stage has not ended."""
_MIN_SAMPLES = 3
"""Minimum number of sample answers that show whether a model always says the same."""


@dataclass
class LossTrend:
    """Follows the loss of each step and detects divergence."""

    window: int = _MIN_WINDOW
    spike: int = 1
    """Number of last steps whose mean shows a spike."""
    recent: list[float] = field(default_factory=list)
    """Losses of the last steps, at most a window."""
    best: float = math.inf
    """Lowest mean of a window, or of all steps while there are fewer."""

    @classmethod
    def over(cls, questions: Sequence[int]) -> LossTrend:
        """Choose the window from the number of questions in each step."""
        mean = max(1.0, sum(questions) / len(questions)) if questions else _WINDOW_QUESTIONS
        window, spike = math.ceil(_WINDOW_QUESTIONS / mean), math.ceil(_SPIKE_QUESTIONS / mean)
        return cls(min(_MAX_WINDOW, max(_MIN_WINDOW, window)), spike)

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs, ready for JSON."""
        return {"recent": list(self.recent), "best": self.best if self.recent else None}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state`; an empty one starts over."""
        self.recent = list(state.get("recent", ()))
        self.best = state["best"] if self.recent else math.inf

    def diverged(self, loss: float) -> float | None:
        """Record the loss of a step; return the best mean if the losses have risen far above it."""
        has_reference = len(self.recent) >= self.spike
        self.recent = [*self.recent, loss][-self.window :]
        mean, jump = (sum(losses) / len(losses) for losses in (self.recent, self.recent[-self.spike :]))
        is_whole = len(self.recent) == self.window
        if has_reference and (
            jump > _SPIKE_FACTOR * self.best + _SPIKE_MARGIN
            or (is_whole and mean > _DRIFT_FACTOR * self.best + _DRIFT_MARGIN)
        ):
            return self.best
        # The mean of few steps may be low by chance; do not use it as a reference yet.
        is_few = len(self.recent) < max(_MIN_WINDOW, 2 * self.spike)
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
    """How far `blind` is above the loss with images on the same records."""
    train_loss: float | None
    """Mean over the steps since the previous validation."""
    has_learned: bool = True
    """Whether the training loss is clearly lower than at the beginning."""
    samples: tuple[tuple[str, str], ...] = ()
    """Pairs of true answer and prediction."""

    @property
    def is_alike(self) -> bool:
        """Whether the loss is the same with and without images."""
        if self.gain is None or self.blind is None:
            return False
        return abs(self.gain) < _MIN_GAIN * (self.blind - self.gain)

    @property
    def repeated(self) -> str | None:
        """The answer given to all sample questions, if it is right for at most half of them."""
        truths, answers = [truth.strip().lower() for truth, _ in self.samples], {text for _, text in self.samples}
        if len(self.samples) < _MIN_SAMPLES or len(answers) > 1:
            return None
        [answer] = answers
        return answer if 2 * truths.count(answer.strip().lower()) <= len(truths) else None


def read_validations(history: Sequence[Mapping[str, Any]]) -> list[Validation]:
    """Read the validations of a stage from its log; a step's training loss comes before its validation."""
    validations: list[Validation] = []
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
            samples = tuple((sample["answer"], sample["prediction"]) for sample in row.get("samples") or ())
            mean = sum(count * loss for count, loss in before) / steps if steps else None
            figures = (row.get("eval_loss_blind"), row.get("image_gain"))
            validations.append(Validation(row["step"], row["eval_loss"], *figures, mean, has_fallen(losses), samples))
            before = []
    return validations


def diagnose(
    validations: Sequence[Validation], max_steps: int, *, keeps_best: bool, known: Collection[str] = ()
) -> dict[str, str]:
    """Return warnings about the last of the `validations`, by kind; `known`: kinds that were reported before.

    A stage that over-fits or has diverged may ignore images too, but that is then a consequence, not the cause.
    """
    warnings = {
        "over-fitting": _over_fitting(validations, keeps_best=keeps_best),
        "not looking": _not_looking(validations, max_steps),
        "collapsed": collapsed(validations, max_steps),
    }
    if warnings["over-fitting"] or {"over-fitting", "diverged"} & set(known):
        del warnings["not looking"]
    return {kind: text for kind, text in warnings.items() if text is not None}


def _over_fitting(validations: Sequence[Validation], *, keeps_best: bool) -> str | None:
    """Return a warning if the validation loss has risen from its best while the training loss kept falling."""
    best, last = min(validations, key=lambda validation: validation.loss), validations[-1]
    risen = [validation.loss > _RISE * best.loss for validation in validations[-2:]]
    has_risen = last.loss > _CLEAR_RISE * best.loss or (len(risen) == 2 and all(risen))
    if not has_risen or best.train_loss is None or last.train_loss is None or last.train_loss >= best.train_loss:
        return None
    rescue = f"keep: best {'keeps' if keeps_best else 'would keep'} step {best.step}"
    return (
        f"over-fitting: the validation loss rose from {best.loss:.4f} at step {best.step} to {last.loss:.4f}, while "
        f"the training loss fell from {best.train_loss:.4f} to {last.train_loss:.4f}. {rescue}; fewer epochs, a lower "
        "learning_rate or more records help"
    )


def _not_looking(validations: Sequence[Validation], max_steps: int) -> str | None:
    """Return a warning if images do not lower the loss: at the end of a stage, or three times in its second half.

    A model that has not learned anything yet ignores images too; that has another cause.
    """
    last = validations[-1]
    if not last.is_alike or not last.has_learned:
        return None
    late = [validation.is_alike for validation in validations if 2 * validation.step >= max_steps][-_ALIKE_IN_A_ROW:]
    if last.step < max_steps and not (len(late) == _ALIKE_IN_A_ROW and all(late)):
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
    """Return whether the last fifth of the losses is clearly below the first fifth."""
    count = max(1, len(losses) // 5)
    return len(losses) > 1 and sum(losses[-count:]) < _FALL * sum(losses[:count])


def collapsed(validations: Sequence[Validation], max_steps: int) -> str | None:
    """Return a warning if all sample answers are the same: at the end of a stage, or twice in its second half."""
    late = [validation.repeated for validation in validations if 2 * validation.step >= max_steps][-2:]
    if not late or late[-1] is None or (validations[-1].step < max_steps and late != [late[-1]] * 2):
        return None
    return (
        f"all {len(validations[-1].samples)} sample answers are {late[-1]!r}, though the true answers differ. Either "
        "training ruined the model (lower learning_rate), or it has learned the most frequent answer alone (balance "
        "the answers), or it is at its beginning (train longer)"
    )
