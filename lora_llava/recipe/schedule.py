"""Length and learning rate schedule of a stage: batch size, steps, warmup, validation and logging intervals.

Pure arithmetic over the settings of a stage and the number of its records; needs no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lora_llava.recipe.stages import StageName, StageSettings
from lora_llava.system.text import counted

MIN_AUTO_STEPS = 30
"""Minimum optimizer steps that `batch_size: auto` aims for.

Adam moves a weight by about the learning rate per step, so a stage of a few steps changes little, whatever the data.
Below 1 / warmup_ratio = 33 steps, even one warmup step is a larger fraction than LLaVA uses.
"""
FEW_STEPS = 20
"""A stage with fewer optimizer steps gets a proposal for a longer one."""
PROPOSED_STEPS = 50
"""Minimum optimizer steps of the proposed stage."""
_PROPOSED_EPOCHS, _MAX_PROPOSED_EPOCHS = 3, 10
"""Epochs of the proposed stage: three, as is usual for small data, or more if even batches of 1 give too few steps."""
_NUM_VALIDATIONS = 10
"""Validations that `eval_steps: auto` aims for, including the one at the end."""
_MAX_VALIDATION_SHARE = 0.1
"""Maximum fraction of the training time that validations with `eval_steps: auto` may take."""
_FORWARD_SHARE = 1 / 3
"""Cost of validating a conversation (a forward pass) relative to training on it."""
_MAX_BLIND = 64
"""Maximum validation conversations that are computed again without their images."""
_MIN_LOG_LINES = 10
"""Minimum log lines of a stage, if it has that many steps."""


def count_steps(num_items: int, batch_size: int, num_train_epochs: float, max_steps: int = -1) -> int:
    """Return the number of optimizer steps of a stage; the last step of an epoch may be smaller."""
    if max_steps > 0:
        return max_steps
    # Round first, so that 1.1 epochs of 10 steps are 11 steps and not 12.
    return max(1, math.ceil(round(num_train_epochs * math.ceil(num_items / batch_size), 6)))


def count_warmup_steps(num_steps: int, settings: StageSettings) -> int:
    """Return the number of warmup steps: `warmup_ratio` of all steps, rounded up, but never all of them."""
    if settings.lr_scheduler_type == "constant":
        return 0
    return min(math.ceil(round(settings.warmup_ratio * num_steps, 6)), num_steps - 1)


def rate_factor(scheduler: str, step: int, num_steps: int, num_warmup_steps: int) -> float:
    """Return the learning rate multiplier of `step`, counted from 1; it is positive in all `num_steps` steps.

    With W warmup steps of T:

    - step k <= W: k / (W + 1)
    - step k > W: cosine (1 + cos(pi p)) / 2, linear 1 - p, with p = (k - 1 - W) / (T - W); constant_with_warmup 1
    - constant: 1 in each step

    After warmup the rates equal those of `transformers.get_scheduler`, which LLaVA uses. Its warmup is (k - 1) / W
    instead, so its first step has rate 0, which wastes half of a two-step stage.
    """
    if scheduler == "constant":
        return 1.0
    if step <= num_warmup_steps:
        return step / (num_warmup_steps + 1)
    if scheduler == "constant_with_warmup":
        return 1.0
    progress = min(1.0, (step - 1 - num_warmup_steps) / (num_steps - num_warmup_steps))
    return 1.0 - progress if scheduler == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def steps_line(num_steps: int, num_warmup_steps: int) -> str:
    """Return a line with the number of steps and warmup steps of a stage."""
    return f"{counted(num_steps, 'optimizer step')}, {num_warmup_steps or 'none'} of them warmup"


@dataclass(frozen=True, slots=True)
class StageLength:
    """Length of a stage."""

    batch_size: int
    """Conversations per optimizer step; `auto` is resolved."""
    num_steps: int
    num_warmup_steps: int
    num_records: int

    def batch_line(self, settings: StageSettings) -> str | None:
        """Return a line with the batch size that `auto` chose, and why; None if the recipe sets one."""
        if settings.batch_size != "auto":
            return None
        records, largest = counted(self.num_records, "record"), settings.llava_batch_size
        whose = settings.batch_size_of
        if self.batch_size == largest:
            return f"batch_size: {self.batch_size} (auto: {records}; {whose}'s own)"
        steps = count_steps(self.num_records, largest, settings.num_train_epochs)
        reason = f"{records}; {whose}'s {largest} would give {counted(steps, 'step')}"
        return f"batch_size: {self.batch_size} (auto: {reason})"

    def proposal(self, stage: StageName, settings: StageSettings) -> str | None:
        """Propose a batch size and epochs if the stage has too few steps; None if it does not, or sets `max_steps`."""
        if self.num_steps >= FEW_STEPS or settings.max_steps > 0:
            return None
        epochs: float = max(settings.num_train_epochs, _PROPOSED_EPOCHS)
        batch = _largest_batch(self.num_records, epochs, PROPOSED_STEPS, self.batch_size)
        if (steps := count_steps(self.num_records, batch, epochs)) < PROPOSED_STEPS:
            # Even one record per step gives too few steps.
            epochs = max(epochs, min(math.ceil(PROPOSED_STEPS / self.num_records), _MAX_PROPOSED_EPOCHS))
            steps = count_steps(self.num_records, batch, epochs)
        if steps <= self.num_steps:
            return None
        more = "" if steps >= FEW_STEPS else "; more records would help more"
        longer = f"stages.{stage}.batch_size={batch} stages.{stage}.num_train_epochs={epochs:g}"
        return (
            f"{counted(self.num_steps, 'optimizer step')} can change the model only a little; with {longer}: "
            f"{counted(steps, 'step')}{more}"
        )


def stage_length(settings: StageSettings, num_records: int) -> StageLength:
    """Compute batch size and steps of a stage that trains on `num_records` conversations."""
    batch = settings.batch_size
    if batch == "auto":
        # Ignore max_steps, so that a short test has the same batch size as the whole run.
        batch = _largest_batch(num_records, settings.num_train_epochs, MIN_AUTO_STEPS, settings.llava_batch_size)
    steps = count_steps(num_records, batch, settings.num_train_epochs, settings.max_steps)
    return StageLength(batch, steps, count_warmup_steps(steps, settings), num_records)


def _largest_batch(num_records: int, num_train_epochs: float, num_steps: int, largest: int) -> int:
    """Return the largest power of two up to `largest` that gives at least `num_steps` steps; 1 if none does."""
    batch = 1 << (largest.bit_length() - 1)
    while batch > 1 and count_steps(num_records, batch, num_train_epochs) < num_steps:
        batch //= 2
    return batch


def logging_interval(settings: StageSettings, num_steps: int) -> int:
    """Return `logging_steps`, or fewer if a short stage would otherwise log fewer than ten lines."""
    return max(1, min(settings.logging_steps, num_steps // _MIN_LOG_LINES))


def eval_interval(settings: StageSettings, num_steps: int, num_trained: int, num_validation: int) -> int | None:
    """Return the optimizer steps between validations; None without validation records.

    `num_trained`: conversations that the stage trains on, counted once per epoch.
    """
    if not num_validation:
        return None
    if settings.eval_steps is None:
        return num_steps
    if settings.eval_steps != "auto":
        return settings.eval_steps
    cost = _FORWARD_SHARE * (num_validation + min(num_validation, _MAX_BLIND))
    count = max(1, min(_NUM_VALIDATIONS, int(_MAX_VALIDATION_SHARE * num_trained / cost)))
    return math.ceil(num_steps / count)


def validation_line(settings: StageSettings, num_steps: int, interval: int) -> str:
    """Return a line that says how often a stage is validated and which weights it keeps."""
    patience, count = settings.early_stopping_patience, math.ceil(num_steps / interval)
    # The first validation sets the best loss, and the last one ends the stage anyway.
    stop = "" if patience is None else f"; stops after {counted(patience, 'validation')} without improvement"
    if patience is not None and count < patience + 2:
        stop = (
            f"; early_stopping_patience: {patience} has no effect: it needs at least {patience + 2} validations; lower "
            "eval_steps, or remove it"
        )
    if interval >= num_steps:
        when = f"validation at the end only (eval_steps: {settings.eval_steps or 'null'})"
        return f"{when}, so the last weights are kept{stop}"
    times = counted(count, "time")
    auto = ", auto" if settings.eval_steps == "auto" else ""
    return f"validation every {counted(interval, 'step')}, {times}{auto}; keep: {settings.keep}{stop}"
