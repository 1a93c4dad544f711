"""How long a stage is and how fast it learns: batch, steps, warm-up, and the learning rate of every step.

Pure arithmetic over the settings of a stage and the number of its records; needs no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lora_llava.recipe.stages import LLAVA_BATCH_SIZE, StageName, StageSettings
from lora_llava.system.text import counted

MIN_AUTO_STEPS = 30
"""Optimizer steps that `batch_size: auto` aims at.

Adam moves a weight by about its learning rate a step, so a stage of a few steps ends where it began, whatever the data
say. Below 1 / warmup_ratio = 33 steps even one step of warm-up is more than the share that LLaVA gives to it.
"""
FEW_STEPS = 20
"""Below so many optimizer steps a longer stage is proposed,"""
PROPOSED_STEPS = 50
"""with at least so many,"""
PROPOSED_EPOCHS, MAX_PROPOSED_EPOCHS = 3, 10
"""in so many epochs: three, as is usual for fine-tuning on small data, or more where even batches of 1 need them."""
VALIDATIONS = 10
"""Validations that `eval_steps: auto` aims at, the one at the end included,"""
MAX_VALIDATION_SHARE = 0.1
"""as long as they take no more than this share of the training's time;"""
FORWARD_SHARE = 1 / 3
"""a validated conversation costs a forward pass, a trained one about three times as much;"""
MAX_BLIND = 64
"""this many at most are computed once more without their images."""
LOG_LINES = 10
"""Lines that the log of a stage has at least, if it has as many steps."""


def count_steps(num_items: int, batch_size: int, num_train_epochs: float, max_steps: int = -1) -> int:
    """Return the optimizer steps of a stage; the last step of an epoch may have fewer conversations."""
    if max_steps > 0:
        return max_steps
    # Rounded, so that 1.1 epochs of 10 steps are 11 steps and not 12.
    return max(1, math.ceil(round(num_train_epochs * math.ceil(num_items / batch_size), 6)))


def count_warmup_steps(num_steps: int, settings: StageSettings) -> int:
    """Return the steps of the warm-up: `warmup_ratio` of all, rounded up, but never all of them."""
    if settings.lr_scheduler_type == "constant":
        return 0
    return min(math.ceil(round(settings.warmup_ratio * num_steps, 6)), num_steps - 1)


def rate_factor(scheduler: str, step: int, num_steps: int, num_warmup_steps: int) -> float:
    """Return what the learning rate of `step`, counted from 1, is multiplied by: above 0 in each of `num_steps`.

    With W warm-up steps of T:

    - step k <= W: k / (W + 1)
    - step k > W: cosine (1 + cos(pi p)) / 2, linear 1 - p, with p = (k - 1 - W) / (T - W); constant_with_warmup 1
    - constant: 1 in each step

    After the warm-up these are the rates of `transformers.get_scheduler`, with which LLaVA trains. Its warm-up starts
    at (k - 1) / W, so its first step has rate 0, and half of a stage of two steps is lost.
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
    """Say how many steps a stage has, and how many of them are warm-up."""
    return f"{counted(num_steps, 'optimizer step')}, {num_warmup_steps or 'none'} of them warm-up"


@dataclass(frozen=True, slots=True)
class StageLength:
    """How long a stage is."""

    batch_size: int
    """Conversations in one optimizer step; with `auto` chosen by the number of records."""
    num_steps: int
    num_warmup_steps: int
    num_records: int

    def steps_line(self) -> str:
        """Say how many steps there are, and how many of them are warm-up."""
        return steps_line(self.num_steps, self.num_warmup_steps)

    def batch_line(self, stage: StageName, settings: StageSettings) -> str | None:
        """Say which batch was chosen, and why; None if the recipe names one."""
        if settings.batch_size != "auto":
            return None
        records, largest = counted(self.num_records, "record"), LLAVA_BATCH_SIZE[stage]
        if self.batch_size == largest:
            return f"batch_size: {self.batch_size} (auto: {records}; LLaVA's own)"
        steps = count_steps(self.num_records, largest, settings.num_train_epochs)
        return f"batch_size: {self.batch_size} (auto: {records}; LLaVA's {largest} would give {counted(steps, 'step')})"

    def proposal(self, stage: StageName, settings: StageSettings) -> str | None:
        """Propose a batch and epochs where the steps are so few that little is learned; None if they are not.

        A recipe that sets `max_steps` asks for few.
        """
        if self.num_steps >= FEW_STEPS or settings.max_steps > 0:
            return None
        epochs: float = max(settings.num_train_epochs, PROPOSED_EPOCHS)
        batch = _largest_batch(self.num_records, epochs, PROPOSED_STEPS, self.batch_size)
        if (steps := count_steps(self.num_records, batch, epochs)) < PROPOSED_STEPS:
            # Even one record a step is too few steps.
            epochs = max(epochs, min(math.ceil(PROPOSED_STEPS / self.num_records), MAX_PROPOSED_EPOCHS))
            steps = count_steps(self.num_records, batch, epochs)
        if steps <= self.num_steps:
            return None
        more = "" if steps >= FEW_STEPS else "; more records are the better way"
        longer = f"stages.{stage}.batch_size={batch} stages.{stage}.num_train_epochs={epochs:g}"
        return (
            f"{counted(self.num_steps, 'optimizer step')} can teach the model little; with {longer}: "
            f"{counted(steps, 'step')}{more}"
        )


def stage_length(stage: StageName, settings: StageSettings, num_records: int) -> StageLength:
    """Work out batch and steps of a stage that trains on `num_records` conversations."""
    batch = settings.batch_size
    if batch == "auto":
        # By epochs even where max_steps ends the stage: a test of a few steps has the batch of the whole run.
        batch = _largest_batch(num_records, settings.num_train_epochs, MIN_AUTO_STEPS, LLAVA_BATCH_SIZE[stage])
    steps = count_steps(num_records, batch, settings.num_train_epochs, settings.max_steps)
    return StageLength(batch, steps, count_warmup_steps(steps, settings), num_records)


def _largest_batch(num_records: int, num_train_epochs: float, num_steps: int, largest: int) -> int:
    """Return the largest power of two, `largest` at most, that gives at least `num_steps` steps; 1 if none does."""
    batch = 1 << (largest.bit_length() - 1)
    while batch > 1 and count_steps(num_records, batch, num_train_epochs) < num_steps:
        batch //= 2
    return batch


def logging_interval(settings: StageSettings, num_steps: int) -> int:
    """Return `logging_steps`, or less where a stage is so short that its log would have fewer than ten lines."""
    return max(1, min(settings.logging_steps, num_steps // LOG_LINES))


def eval_interval(settings: StageSettings, num_steps: int, num_trained: int, num_validation: int) -> int | None:
    """Return the optimizer steps from one validation to the next; None without validation records.

    `num_trained`: conversations that the stage trains on, those of a second epoch counted again.
    """
    if not num_validation:
        return None
    if settings.eval_steps is None:
        return num_steps
    if settings.eval_steps != "auto":
        return settings.eval_steps
    cost = FORWARD_SHARE * (num_validation + min(num_validation, MAX_BLIND))
    count = max(1, min(VALIDATIONS, int(MAX_VALIDATION_SHARE * num_trained / cost)))
    return math.ceil(num_steps / count)


def validation_line(settings: StageSettings, num_steps: int, interval: int) -> str:
    """Say how often a stage is validated, and which weights it keeps."""
    patience, number = settings.early_stopping_patience, max(1, math.ceil(num_steps / interval))
    # The first validation sets the best, and the last one ends the stage anyway.
    stop = "" if patience is None else f"; stops after {counted(patience, 'validation')} without improvement"
    if patience is not None and number < patience + 2:
        stop = (
            f"; early_stopping_patience: {patience} has no effect, it needs at least {patience + 2} validations: lower "
            "eval_steps, or leave it out"
        )
    if interval >= num_steps:
        when = f"validation at the end only (eval_steps: {settings.eval_steps or 'null'})"
        return f"{when}, so the last weights are kept{stop}"
    count = counted(number, "time")
    auto = ", auto" if settings.eval_steps == "auto" else ""
    return f"validation every {counted(interval, 'step')}, {count}{auto}; keep: {settings.keep}{stop}"
