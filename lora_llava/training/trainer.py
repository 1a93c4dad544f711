"""The training loop: for each step of the plan, for each of its rows; then checks, clipping, optimizer, schedule."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.trainer_utils import speed_metrics

from lora_llava.data.rows import Batch, PackedRows
from lora_llava.modeling.attention import attention_of, check_attention, to_device, with_block_lists
from lora_llava.modeling.fused.layer import graph_lengths
from lora_llava.modeling.packed import llava_in
from lora_llava.modeling.structure import FLEX
from lora_llava.system.device import autocast
from lora_llava.system.ranks import by_first, is_first, rank, world_size
from lora_llava.training.checkpoints.kept import has_lost_patience
from lora_llava.training.checkpoints.saver import CheckpointSaver
from lora_llava.training.checkpoints.signals import end_with_parent
from lora_llava.training.checks.check import Check, CompletedStep, ValidationPass
from lora_llava.training.checks.non_finite import forked_rng
from lora_llava.training.log import TrainingLog
from lora_llava.training.objectives.by_source import LossBySource
from lora_llava.training.objectives.objective import Objective, TokenLoss
from lora_llava.training.optimizer import groups_of, make_optimizer, make_scaler, make_schedule
from lora_llava.training.parallel.gradients import Gradients, WholeGradients, summed
from lora_llava.training.parallel.lockstep import idle_index, is_in_lockstep, own_indices
from lora_llava.training.parallel.offload import OffloadedAdamW, OffloadedGradients
from lora_llava.training.validation import HeldOutLoss, without

_CHECKS = "lora_llava_guards"
"""Key of the checks' state in `trainer_state.json`."""
_SOURCES = "lora_llava_loss_by_source"
"""Key of the sums of `LossBySource` there."""


class PackedTrainer:
    """Trains on the rows of a plan, in order; one pass over them is the whole stage."""

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        rows: PackedRows,
        validation: PackedRows | None,
        *,
        mm_projector_lr: float | None,
        checks: Sequence[Check] = (),
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        check_attention(llava_in(model))
        # What was drawn while the model was built must not decide what dropout draws, in each process other masks.
        set_seed(args.seed + rank())
        self.args, self.device = args, args.device
        self.dtype: torch.dtype = llava_in(model).get_input_embeddings().weight.dtype
        """What the frozen weights compute in."""
        self.model = model.to(self.device)
        # The forward pass takes two operations per parameter and token, the backward pass four.
        self.flops_per_token = 6.0 * model.num_parameters(exclude_embeddings=True)
        self.train_dataset, self.eval_dataset = rows, validation
        self.mm_projector_lr = mm_projector_lr
        self.checks = checks
        """Asked in this order; `training.checks.check` says when."""
        self.callbacks = list(callbacks)
        """The log and the trackers, which are told what happens and decide nothing."""
        self.saver: CheckpointSaver | None = None
        self.last_checkpoint: Callable[[], str | None] = lambda: None
        """Names the newest usable checkpoint, for warnings."""
        self.objective: Objective = TokenLoss()
        """What a step minimizes; set before training for a stage with another loss."""
        self.by_source = LossBySource(rows.sources, self.device)
        self.offloads = False
        """Whether the optimizer's state and the gradients are divided between the hosts of the processes."""
        self.held_out = HeldOutLoss(self._row_loss, lambda row: self.objective.count(row))
        self.state = TrainerState(train_batch_size=1)
        self._tell("on_init_end")

    def train_and_save(self, saver: CheckpointSaver) -> None:
        """Train to the end, from the saver's checkpoint if it has one.

        Raises RunInterruptedError after SIGINT or SIGTERM, once the step is complete and saved.
        """
        for check in self.checks:
            check.before_training(self.model)
        self.saver, self.last_checkpoint = saver, lambda: by_first(saver.last_whole)
        saver.restore_weights(self)
        if has_lost_patience(self.state.log_history, saver.settings.early_stopping_patience):
            self.restore_checks()
            return
        with saver.interruption, saver.background:
            self.train()
        saver.stop_if_asked(self.state.global_step)

    def train(self) -> None:
        """Train from the first step, or that of the saver's checkpoint, to the last, or until the saver stops it."""
        self._begin()
        started, first_step = time.time(), self.state.global_step
        for rows in self._steps():
            self._tell("on_step_begin")
            num_items, num_tokens = self._sizes(rows)
            for row in rows:
                self.losses.append(self.training_step(row, num_items))
                self._tell("on_substep_end")
            self.gradients.complete()
            loss, step = self._checked_loss()
            self.by_source.end_step(counts=not step.is_skipped or step.has_overflowed)
            self.loss_sum += loss
            self.state.total_flos += self.flops_per_token * float(num_tokens)

            norm = self.gradients.clip(self.args.max_grad_norm)
            self._tell("on_pre_optimizer_step")
            self.optimizer.step()
            rate = float(self.lr_scheduler.get_last_lr()[0])
            if not step.has_overflowed:
                self.lr_scheduler.step()
            # What is not due to the scale leaves it.
            self.scaler.update(self.scaler.get_scale() if step.is_skipped and not step.has_overflowed else None)
            self.model.zero_grad()
            if self._finish_step(norm, rate):
                break
        self._end(started, first_step)

    def _sizes(self, rows: Sequence[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        """Count a step's items, which its loss is divided by, and its tokens, over all processes: two scalars.

        The items on the device, since CUDA divides less exactly by a number of the host: filled there, as a copy would
        wait. The tokens on the host, where they are read.
        """
        items = sum(self.objective.count(row) for row in rows)
        tokens = sum(row["input_ids"].numel() for row in rows)
        num_items = torch.full((), float(items), device=self.device)
        return summed(num_items), summed(torch.tensor(float(tokens)))

    def create_optimizer(self) -> None:
        """Create the optimizer, with a separate learning rate for the projector."""
        self.optimizer = make_optimizer(self.model, self.args, self.mm_projector_lr, offloads=self.offloads)

    def _begin(self) -> None:
        """Prepare model, optimizer and schedule, restore the checkpoint if there is one, and start log and trackers."""
        self.create_optimizer()
        self.gradients: Gradients = (
            OffloadedGradients(self.optimizer)
            if isinstance(self.optimizer, OffloadedAdamW)
            else WholeGradients(self.model, groups_of(self.optimizer))
        )
        self.lr_scheduler = make_schedule(self.optimizer, self.args)
        self.scaler = make_scaler(self.device, self.dtype)
        self.model.train()
        self.model.zero_grad()
        self.losses: list[torch.Tensor] = []
        """Losses of the rows of this step so far, scalars."""
        self.loss_sum = torch.zeros((), device=self.device)
        self.loss_total, self.last_logged_step = 0.0, 0
        if self.saver is None:
            self.state = TrainerState(train_batch_size=1)
        self.state.max_steps, self.state.num_train_epochs = self.args.max_steps, 1
        self.state.compute_steps(self.args, self.args.max_steps)
        self._tell("on_train_begin")
        self.restore_checks()
        self.by_source.restore(self.state.stateful_callbacks.get(_SOURCES))
        if self.saver is not None:
            # Last, since trackers may draw random numbers.
            self.saver.restore(self)

    def _steps(self) -> Iterator[list[Batch]]:
        """Yield the rows of each step that is left to train."""
        per_step, done = self.args.gradient_accumulation_steps, self.state.global_step
        rows = iter(self.rows_loader(self.train_dataset, range(done * per_step, len(self.train_dataset))))
        for _ in range(done, self.state.max_steps):
            yield list(islice(rows, per_step))

    def rows_loader(self, rows: Any, indices: range | None = None) -> DataLoader[Batch]:
        """Load the rows at `indices`, or all, in order; each is a micro-batch."""
        workers = self.args.dataloader_num_workers
        if workers and self.saver is not None:
            # A process must not be forked while a thread may hold a lock.
            self.saver.background.wait()
        lists = partial(with_block_lists, lengths=graph_lengths(self.model))
        collate: Any = lists if attention_of(llava_in(self.model)) == FLEX else None
        return DataLoader(
            rows,
            batch_size=None,
            sampler=range(len(rows)) if indices is None else indices,
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=end_with_parent,
            # The loader draws a seed for its workers; with its own generator that leaves the model's RNG alone.
            generator=torch.Generator(),
            pin_memory=self.device.type == "cuda",
            persistent_workers=bool(workers),
        )

    def training_step(self, row: Batch, num_items: torch.Tensor) -> torch.Tensor:
        """Add the gradients of a row, and return its share of the step's loss, a scalar.

        All shares add up to the mean over the step's items, such as its supervised tokens. An empty row, which pads a
        step, adds nothing.
        """
        if row["input_ids"].numel() == 0:
            if is_in_lockstep():
                self._pass_idly()
            self.gradients.idle()
            # Scaled, since the scaler is ready with the first loss.
            return self.scaler.scale(torch.zeros((), device=self.device))
        zero = self.gradients.before_row()
        loss = self._loss(row, num_items, self.by_source if self.by_source.sources else None)
        scaled = self.scaler.scale(loss)
        has_image = row.get("pixel_values") is not None
        self.gradients.backward(scaled if zero is None else scaled + zero, has_image=has_image)
        return loss.detach()

    def _loss(self, row: Batch, num_items: torch.Tensor | int, by_source: LossBySource | None = None) -> torch.Tensor:
        row = to_device(row, self.device)
        with autocast(self.device, self.dtype):
            if by_source is None:
                return self.objective.loss(self.model, row, num_items)
            loss, losses = self.objective.loss_by_item(self.model, row, num_items)
        by_source.add(row["sources"], losses)
        return loss

    def _pass_idly(self) -> None:
        """Run a forward and a backward pass for nothing, with those that other processes run for their rows."""
        rows = self.train_dataset
        idle = PackedRows([((idle_index(rows),),)], rows.records, rows.encoded, rows.read_image)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        with forked_rng(self.device):
            torch.autograd.grad(self._loss(idle[0], 1), trained, allow_unused=True)

    def _checked_loss(self) -> tuple[torch.Tensor, CompletedStep]:
        """Return the loss of a complete step over all processes, and the step.

        0, with its gradients cleared, if a check skips it. A step whose scaled gradients overflowed has its gradients
        cleared, too, but its loss is as good as any.
        """
        self.scaler.unscale_(self.optimizer)
        losses = torch.stack(self.losses)
        self.losses.clear()
        total, groups = summed(losses.sum()), groups_of(self.optimizer)
        number, scale = self.state.global_step + 1, self.scaler.get_scale
        step = CompletedStep(
            number, self.model, groups, losses, total, self.gradients, self.last_checkpoint, loss_scale=scale
        )
        for check in self.checks:
            if (warning := check.on_step(step)) is not None:
                self.log({"warning": warning}, step.number)
            if step.is_skipped:
                return total if step.has_overflowed else torch.zeros_like(total), step
        return total, step

    def _finish_step(self, norm: torch.Tensor, rate: float) -> bool:
        """Count a step; log, validate and save as far as they are due; return whether the saver stops the training.

        `norm`: of all gradients before clipping, a scalar; `rate`: the first group's learning rate.
        """
        state, args = self.state, self.args
        state.global_step += 1
        state.epoch = state.global_step * args.gradient_accumulation_steps / len(self.train_dataset)
        is_last = state.global_step >= state.max_steps
        validates = args.eval_strategy != "no" and (is_last or state.global_step % args.eval_steps == 0)
        self._tell("on_step_end")

        # A validation is judged with the training loss up to it, so the loss comes first.
        if is_last or validates or state.global_step % args.logging_steps == 0:
            self._log_loss(norm, rate)
        loss = self.evaluate().get("eval_loss") if validates else None

        state.stateful_callbacks[_CHECKS] = {check.key: check.state() for check in self.checks if check.key}
        if self.saver is None:
            return False
        if self.saver.is_due(self, loss):
            self.before_save()
            if sums := self.by_source.state():
                state.stateful_callbacks[_SOURCES] = sums
            self.saver.save(self)
            self._tell("on_save")
        return self.saver.should_stop

    def _log_loss(self, norm: torch.Tensor, rate: float) -> None:
        """Log the mean loss of the steps since the last line."""
        step = self.state.global_step
        loss_sum = float(self.loss_sum)
        loss = loss_sum / (step - self.last_logged_step)
        self.loss_sum.zero_()
        self.loss_total, self.last_logged_step = self.loss_total + loss_sum, step
        self.log({"loss": loss, **self.by_source.take(), "grad_norm": float(norm), "learning_rate": rate})

    def _end(self, started: float, first_step: int) -> None:
        """Report the whole session to the trackers, and end them and the log's display."""
        steps = self.state.global_step - first_step
        num_rows = steps * self.args.gradient_accumulation_steps * world_size()
        metrics = speed_metrics("train", started, num_samples=num_rows, num_steps=steps)
        loss_total = self.loss_total + float(self.loss_sum)
        metrics |= {"total_flos": self.state.total_flos, "train_loss": loss_total / max(self.state.global_step, 1)}
        self.log(metrics)
        self._tell("on_train_end")

    def log(self, row: dict[str, Any], step: int | None = None) -> None:
        """Add a line to the history, the log and the trackers, with the figures of the checks if it has a loss.

        `step`: the step that it is about; None: the last one that was applied.
        """
        step = self.state.global_step if step is None else step
        if "loss" in row:
            for check in self.checks:
                row = check.on_log(step, self.model, row)
        row["epoch"] = self.state.epoch
        self.state.log_history.append({**row, "step": step})
        self._tell("on_log", logs=row, step=step)

    def _tell(self, event: str, **values: Any) -> None:
        """Call the log and the trackers, as callbacks of transformers."""
        for callback in self.callbacks if is_first() else ():
            getattr(callback, event)(self.args, self.state, TrainerControl(), model=self.model, **values)

    @property
    def log_file(self) -> TrainingLog:
        """The callback that writes the run's log."""
        [log] = [one for one in self.callbacks if isinstance(one, TrainingLog)]
        return log

    def restore_checks(self) -> None:
        """Give the checks back their part of the training's state, or reset them."""
        saved = self.state.stateful_callbacks.get(_CHECKS)
        for check in self.checks:
            if check.key:
                check.restore(saved.get(check.key, {}) if saved else None)

    def before_save(self) -> list[str | None]:
        """Ask each check before something is written; return their lines for the console."""
        return [check.on_save() for check in self.checks]

    def after_training(self) -> list[str | None]:
        """Ask each check to judge the trained model; return their lines for the console."""
        return [check.after_training(self.model, self.state.global_step) for check in self.checks]

    def evaluate(self) -> dict[str, Any]:
        """Compute and log the validation loss, a mean as in a step, and what the checks add to it.

        Training is not affected: RNG state and dropout mode are restored. Records whose loss is not finite are left
        out from the next validation on.
        """
        rows = self.eval_dataset
        assert rows is not None
        was_training = self.model.training
        self.model.eval()
        # Trained weights are fp32, the others half: without autocast they cannot be multiplied. A data loader draws
        # from the RNG even without workers.
        with forked_rng(self.device), torch.no_grad(), autocast(self.device, self.dtype):
            loss = self.held_out.mean(rows, self.rows_loader(rows, own_indices(len(rows))))
            metrics: dict[str, Any] = {} if loss is None else {"eval_loss": loss, **self.held_out.by_source(rows)}
            validation = ValidationPass(
                step=self.state.global_step,
                max_steps=self.state.max_steps,
                model=self.model,
                rows=rows,
                mean_loss=self.held_out.mean,
                loss=loss,
                unusable=self.held_out.unusable,
                history=self.state.log_history,
                metrics=metrics,
            )
            for check in self.checks:
                check.on_validation(validation)
        if self.held_out.unusable:
            self.eval_dataset = without(rows, self.held_out.unusable)
            self.held_out.unusable = {}
        self.model.train(was_training)
        self.log(metrics)
        self._tell("on_evaluate", metrics=metrics)
        return metrics

    def _row_loss(self, row: Batch) -> torch.Tensor:
        return self.objective.loss(self.model, to_device(row, self.device), 1)
