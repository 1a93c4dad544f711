"""Save verified checkpoints, and resume from one exactly."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState

from lora_llava.errors import RunInterruptedError, TrainingError
from lora_llava.planning.memory_plan import MemoryPlan
from lora_llava.run_directory.claim import place
from lora_llava.run_directory.output import resume_command, writing_named
from lora_llava.run_directory.written import is_pending
from lora_llava.system.ranks import by_first, gathered
from lora_llava.system.text import counted
from lora_llava.training.checkpoints import state as training_state
from lora_llava.training.checkpoints.background import BackgroundWriter
from lora_llava.training.checkpoints.files import (
    Checkpoint,
    Progress,
    best_loss,
    find_latest,
    prune,
    remove_later,
    write_checkpoint,
)
from lora_llava.training.checkpoints.held import HeldWeights
from lora_llava.training.checkpoints.kept import has_lost_patience
from lora_llava.training.checkpoints.signals import Interruption
from lora_llava.training.checkpoints.stage_artifact import StageArtifact
from lora_llava.training.log import TrainingLog

_MIN_SAVE_INTERVAL_SECONDS = 300.0
"""With `save_steps: auto`, minimum time from one checkpoint to the next."""
_MAX_SAVING_SHARE = 0.02
"""With `save_steps: auto`, maximum share of the time that saving may take."""
MAX_BEST_SHARE = 0.05
"""Share of the stage's time that saving may take before the best weights wait for the next checkpoint."""


class ResumableTrainer(Protocol):
    """What a checkpoint holds of a trainer, and restores."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: LambdaLR
    scaler: torch.amp.GradScaler
    state: TrainerState
    loss_sum: torch.Tensor
    loss_total: float
    last_logged_step: int

    @property
    def log_file(self) -> TrainingLog:
        """The run's log."""


class CheckpointSaver:
    """Decides when to save, and saves; tracks the time that the stage took over all sessions."""

    def __init__(
        self,
        artifact: StageArtifact,
        memory_plan: MemoryPlan,
        facts: dict[str, Any],
        started: float,
        resumed: Checkpoint | None = None,
        *,
        exact: bool = True,
    ) -> None:
        self.artifact = artifact
        self.memory_plan = asdict(memory_plan)
        self.facts = facts
        self.started = started
        self.resumed = resumed
        self.exact = exact
        """Whether the recipe's settings are those of the checkpoint, so that optimizer and scheduler restore them."""
        self.stage = artifact.stage
        self.settings = self.stage.settings
        self.parent = self.stage.checkpoints
        self.newest = resumed.progress.step if resumed else 0
        """Step of the newest checkpoint that belongs to this training."""
        self.best = best_loss(self.parent, resumed.progress.step) if resumed else None
        before = resumed.progress if resumed else None
        self.seconds_before = before.seconds if before else 0.0
        self.saving_seconds = before.saving_seconds if before else 0.0
        self.num_saved = before.num_saved if before else 0
        self.last_saved = time.monotonic()
        self.last_duration = 0.0
        self.last_loss: tuple[int, float] | None = None
        self.should_stop = False
        """Whether the training ends with the step that `is_due` or `save` was last called for."""
        self.held: HeldWeights | None = None
        """Weights better than the best checkpoint, not written yet."""
        self.saves_held = False
        """Whether only the held weights are to be saved, not the state of the training."""
        self.background = BackgroundWriter()
        self.interruption = Interruption()

    @property
    def run_directory(self) -> Path:
        """Directory of the run."""
        return self.stage.run_directory

    @property
    def seconds(self) -> float:
        """Seconds spent on the stage over all sessions, without steps that were lost when a session was killed."""
        return self.seconds_before + time.monotonic() - self.started

    def is_due(self, trainer: ResumableTrainer, loss: float | None) -> bool:
        """Tell whether to save the step that was just taken; `loss`: its validation loss, if it was measured.

        A step that is saved for its loss alone is saved without the state of the training, unless it is the first. Sets
        `should_stop` after a signal, or if the validations have lost patience: such a step is saved, too. Raises the
        error that ended the write of an earlier step. Of several processes, the first decides for all.
        """
        self.interruption.agree()
        is_due, self.should_stop, self.saves_held = by_first(
            lambda: (self._is_due(trainer, loss), self.should_stop, self.saves_held)
        )
        return is_due

    def _is_due(self, trainer: ResumableTrainer, loss: float | None) -> bool:
        self.background.check()
        self.saves_held = False
        state, every = trainer.state, self.settings.save_steps
        if every == "auto":
            waited = time.monotonic() - self.last_saved
            due = waited >= max(_MIN_SAVE_INTERVAL_SECONDS, self.last_duration / _MAX_SAVING_SHARE)
        else:
            due = state.global_step % every == 0
        due = due or state.global_step >= state.max_steps
        if loss is not None:
            self.last_loss = (state.global_step, loss)
            if not due and (self.best is None or loss < self.best):
                due = self.num_saved == 0
                if not due:
                    self._hold(trainer, loss)
                    self.saves_held = self._has_time() and not self.background.is_busy
            self.should_stop = has_lost_patience(state.log_history, self.settings.early_stopping_patience)
        self.should_stop = self.should_stop or self.interruption.received is not None
        self.saves_held = self.saves_held and not self.should_stop
        return due or self.should_stop or self.saves_held

    def _has_time(self) -> bool:
        """Tell whether saving has taken less than its share of the time."""
        return self.saving_seconds + self.last_duration <= MAX_BEST_SHARE * self.seconds

    def _hold(self, trainer: ResumableTrainer, loss: float) -> None:
        """Copy the weights of this step, to be written while the training continues or with the next checkpoint.

        A kill before that loses them together with the steps since the last checkpoint; a resumed run repeats those.
        """
        progress = self._progress(trainer, trainer.state.global_step, loss)
        self.best, self.held = loss, HeldWeights.of(trainer.model, progress)

    def save(self, trainer: ResumableTrainer) -> None:
        """Copy the checkpoint of this step, or the held weights, and start to write it, after the one before.

        Waits for the write of the last step, of one that the training stops after, and of a run's first checkpoint,
        which replaces an earlier run. Sets `should_stop` if a signal comes meanwhile, unless only weights are saved. Of
        several processes, the first writes, and the others hand over the states of their RNGs.
        """
        generators = gathered(training_state.torch_random_state())
        # All processes take part, since each may hold a part of it.
        optimizer = {} if self.saves_held else trainer.optimizer.state_dict()
        by_first(lambda: self._save(trainer, optimizer, generators))
        # Held weights are not enough to resume from: after them, a signal ends the training with the next step.
        if not self.saves_held:
            self.should_stop = self.interruption.agree() is not None or self.should_stop

    def _save(
        self, trainer: ResumableTrainer, optimizer: dict[str, Any], generators: Sequence[training_state.Tensors]
    ) -> None:
        clock = time.monotonic()
        self.background.wait()
        held, self.held = self.held, None
        if self.saves_held:
            assert held is not None, "set with the weights"
            self.background.start(lambda: self._write_weights(held))
        else:
            self._save_whole(trainer, held, optimizer, generators)
            self.last_saved = time.monotonic()
            self.last_duration = self.last_saved - clock
        self.num_saved += 1
        self.saving_seconds += time.monotonic() - clock

    def _save_whole(
        self,
        trainer: ResumableTrainer,
        better: HeldWeights | None,
        optimizer: dict[str, Any],
        generators: Sequence[training_state.Tensors],
    ) -> None:
        """Copy weights and state of this step, and start to write them after `better`, weights that are held."""
        step = trainer.state.global_step
        loss = self.last_loss[1] if self.last_loss and self.last_loss[0] == step else None
        # While weights are held, theirs is the best loss.
        is_best = loss is not None and (self.best is None or loss < self.best)
        if better is not None and (is_best or better.progress.step == step):
            better = None
        if better is not None:
            self.num_saved += 1
        weights = HeldWeights.of(trainer.model, self._progress(trainer, step, loss))
        state = training_state.HeldState.of(optimizer, trainer.lr_scheduler, trainer.state, trainer.scaler, generators)

        def write() -> None:
            if better is not None:
                self._write_weights(better)
            with writing_named(f"the checkpoint of step {step}", self.run_directory):
                self._write(weights, state)
                prune(self.parent, step, self.settings.save_total_limit)

        # The first checkpoint moves the log, to which the training would write.
        waits = is_pending(self.run_directory) or self.should_stop or step >= trainer.state.max_steps
        self.background.start(write)
        if waits:
            self.background.wait()
        if is_best:
            self.best = loss

    def _write_weights(self, held: HeldWeights) -> None:
        """Write a checkpoint without the state of the training."""
        with writing_named(f"the weights of step {held.progress.step}", self.run_directory):
            self._write(held, None)

    def _write(self, held: HeldWeights, state: training_state.HeldState | None) -> None:
        """Write a checkpoint; reads nothing that training changes."""
        step, loss = held.progress.step, held.progress.eval_loss

        def write(staging: Path, directory: Path) -> None:
            self.artifact.write(staging, directory, step, {} if loss is None else {"eval_loss": loss}, held.weights)
            if state is not None:
                state.write(staging)

        # Until its first checkpoint is whole, a run that overwrites an earlier one leaves it unchanged.
        if not is_pending(self.run_directory):
            remove_later(self.parent, self.newest)
        resumable = state is not None
        write_checkpoint(
            self.parent, held.progress, self.memory_plan, self.facts, write, self._place, resumable=resumable
        )
        self.newest = step

    def _place(self, staging: Path, directory: Path, hashes: Mapping[str, str]) -> None:
        place(self.run_directory, staging, directory, hashes, first=True)

    def _progress(self, trainer: ResumableTrainer, step: int, loss: float | None) -> Progress:
        return Progress(
            stage=self.stage.name,
            step=step,
            eval_loss=loss,
            loss_sum=trainer.loss_sum.item(),
            loss_total=trainer.loss_total,
            last_logged_step=trainer.last_logged_step,
            log_bytes=trainer.log_file.flushed(),
            log_seconds=trainer.log_file.seconds,
            seconds=self.seconds,
            saving_seconds=self.saving_seconds,
            num_saved=self.num_saved + 1,
        )

    def last_whole(self) -> str | None:
        """Name the newest undamaged checkpoint of the stage, relative to the run's directory; None if there is none."""
        self.background.settle()
        # Until this run has written a checkpoint, the directory holds those of an earlier run.
        if is_pending(self.run_directory):
            return None
        try:
            newest = find_latest(self.parent, lambda _: None)
        except TrainingError:
            return None
        return None if newest is None else newest.directory.relative_to(self.run_directory).as_posix()

    def stopped_early(self, step: int, num_steps: int) -> str | None:
        """Return a line for the console if the stage stopped early."""
        if step >= num_steps:
            return None
        patience = counted(self.settings.early_stopping_patience or 0, "validation")
        return f"stopped after step {step:,} of {num_steps:,}: {patience} without improvement"

    @property
    def keeps_optimizer(self) -> bool:
        """Whether the optimizer is of the same kind as in the checkpoint."""
        key = f"{self.stage.key}.optim"
        return self.resumed is not None and self.resumed.facts.get(key) == self.facts[key]

    def cost(self) -> dict[str, float]:
        """Return the number of checkpoints and the time they took, for the summary."""
        return {"checkpoints_saved": self.num_saved, "saving_seconds": round(self.saving_seconds, 2)}

    def __str__(self) -> str:
        """Return the number of checkpoints and the time they took, for the console."""
        share = self.saving_seconds / max(self.seconds, 1e-9)
        saved = counted(self.num_saved, "checkpoint")
        return f"{saved} saved in {self.saving_seconds:.1f} s, {share:.1%} of the stage's time"

    def stop_if_asked(self, step: int) -> None:
        """Raise RunInterruptedError if a signal came; the step is saved by now."""
        if (received := self.interruption.agree()) is not None:
            raise RunInterruptedError(
                f"stopped by {received.name} after step {step:,} of stage {self.stage.name}, which is saved. "
                f"Continue with: {resume_command(self.run_directory)}",
                received,
            )

    def restore_weights(self, trainer: ResumableTrainer) -> None:
        """Load the weights of the checkpoint, if there is one, the steps and the log up to it."""
        if self.resumed is not None:
            training_state.load_weights(self.resumed.directory, trainer.model)
            trainer.state = TrainerState.load_from_json(str(self.resumed.directory / training_state.TRAINER))
            trainer.log_file.seconds_before = self.resumed.progress.log_seconds

    def restore(self, trainer: ResumableTrainer) -> None:
        """Restore optimizer, schedule, running loss and random state from the checkpoint, if there is one."""
        if self.resumed is not None:
            directory, progress = self.resumed.directory, self.resumed.progress
            if self.keeps_optimizer:
                training_state.load_optimizer(directory, trainer.optimizer, settings=self.exact)
            training_state.load_scheduler(directory, trainer.lr_scheduler, settings=self.exact)
            training_state.load_scaler(directory, trainer.scaler)
            trainer.loss_sum += progress.loss_sum
            trainer.loss_total, trainer.last_logged_step = progress.loss_total, progress.last_logged_step
            training_state.load_random_state(directory)
