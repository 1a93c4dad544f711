"""`transformers.Trainer`, through its documented hooks, over a plan of packed rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainingArguments

from lora_llava.data.rows import Batch, PackedRows
from lora_llava.errors import TrainingError
from lora_llava.modeling.attention import check_attention
from lora_llava.modeling.packed import llava_in, packed_loss
from lora_llava.recipe.schedule import rate_factor
from lora_llava.system.text import counted, listed
from lora_llava.training.checkpoints.saver import ResumableTrainer, Saver
from lora_llava.training.checkpoints.signals import end_with_parent
from lora_llava.training.checks.blind import ImageCheck
from lora_llava.training.checks.diagnosis import diagnose, read_validations
from lora_llava.training.checks.frozen_weights import FrozenWeights
from lora_llava.training.checks.monitor import GuardsState, StageWatch
from lora_llava.training.checks.non_finite import NonFiniteGuard, forked_rng, non_finite_tensors
from lora_llava.training.checks.trained_weights import LORA_PART, PROJECTOR_PART, check_changed, part_checksums, part_of
from lora_llava.training.validation import HeldOutLoss, without


def only(rows: list[Batch]) -> Batch:
    """Return the row of a batch of one."""
    [row] = rows
    return row


SampleAnswers = Callable[[], list[dict[str, str]]]
"""Answers a few validation questions with the model as it is."""


@dataclass(frozen=True, slots=True)
class StageChecks:
    """What looks at a stage while it trains."""

    guard: NonFiniteGuard
    """Stops, or leaves out, a step whose loss or gradient is not finite."""
    watch: StageWatch = field(default_factory=StageWatch)
    """Logs the figures of the stage, and warns where one is out of line."""
    image_check: ImageCheck | None = None
    """Compares the validation loss with that without images; None without validation records that have one."""
    sample_answers: SampleAnswers | None = None
    """Answers logged at each validation; None for none."""
    keeps_best: bool = False
    """Whether the stage keeps the weights of its best validation, which a warning about over-fitting says."""


class PackedTrainer(ResumableTrainer):
    """Trains on the rows of a plan, in its order; one epoch of the Trainer is the whole stage."""

    optimizer: torch.optim.Optimizer | None
    lr_scheduler: LambdaLR | None
    control: TrainerControl

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        rows: PackedRows,
        validation: PackedRows | None,
        *,
        mm_projector_lr: float | None,
        checks: StageChecks | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        check_attention(llava_in(model))
        self.mm_projector_lr = mm_projector_lr
        checks = checks or StageChecks(NonFiniteGuard(rows, bf16=args.bf16))
        self.sample_answers = checks.sample_answers
        self.keeps_best = checks.keeps_best
        self.guard = checks.guard
        self.watch = checks.watch
        self.image_check = checks.image_check
        self.held_out = HeldOutLoss(self._row_loss)
        self.frozen: FrozenWeights | None = None
        self.losses: list[torch.Tensor] = []
        self.guards_state = GuardsState(self.guard, self.watch)
        callbacks = [*(callbacks or []), self.guards_state]
        super().__init__(model=model, args=args, train_dataset=rows, eval_dataset=validation, callbacks=callbacks)
        self.remove_callback(PrinterCallback)
        # Makes the Trainer count the step's supervised tokens and pass the count to `compute_loss`, and leave
        # the division by it to us.
        self.model_accepts_loss_kwargs = True

    def train_and_save(self, saver: Saver) -> None:
        """Train as `ResumableTrainer` does, with frozen weights hashed, and a guard that knows where to go back to."""
        self.frozen = FrozenWeights(self.model)
        self.guards_state.start = part_checksums(self.model)
        self.guard.last_checkpoint = saver.last_whole
        super().train_and_save(saver)

    def restore_guards(self) -> None:
        """Take up what the state of the training says of its guards."""
        self.guards_state.on_train_begin(self.args, self.state, self.control)

    def check_frozen(self) -> str:
        """Return a line that says that no frozen weight has changed; TrainingError names those that have."""
        return self.frozen.check(self.guard.stage) if self.frozen else ""

    def check_trained(self) -> str | None:
        """Return a line on a part whose weights did not change, if there is one; TrainingError if none did."""
        steps, skipped = self.state.global_step, self.guard.skipped
        start = self.guards_state.start
        return check_changed(self.model, start, stage=self.guard.stage, num_steps=steps, skipped=skipped)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # On resuming, the base would be as it was, and what was trained on another would pass for right.
        self.check_frozen()
        super()._save_checkpoint(model, trial)

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """Hand out the rows in the plan's order; each is a micro-batch already."""
        return self._rows_loader(self.train_dataset)

    def _rows_loader(self, rows: PackedRows) -> DataLoader[Batch]:
        workers = self.args.dataloader_num_workers
        # A batch of one row and not none: on resuming the Trainer passes over rows by their numbers, unread.
        return DataLoader(
            rows,
            batch_size=1,
            collate_fn=only,
            num_workers=workers,
            worker_init_fn=end_with_parent,
            # The loader seeds its workers, which draw nothing; the model's own draws must not depend on that.
            generator=torch.Generator(),
            pin_memory=self.args.device.type == "cuda",
            prefetch_factor=2 if workers else None,
            persistent_workers=bool(workers),
        )

    def training_step(
        self, model: nn.Module, inputs: Batch, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Add a row's gradients to the step's; an empty row, which only fills up a step, adds nothing.

        Returns the whole step's loss with its last row and 0 before: what is left out is not to be in the log either.
        """
        if inputs["input_ids"].numel() == 0:
            loss = torch.zeros((), device=self.args.device)
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses.append(loss)
        return self._judged() if self.accelerator.sync_gradients else torch.zeros_like(loss)

    def _judged(self) -> torch.Tensor:
        """Return the loss of a step that is complete; 0, with no gradient left, if the guard leaves it out."""
        losses = torch.stack(self.losses)
        self.losses.clear()
        assert self.optimizer is not None
        groups: dict[str, list[nn.Parameter]] = {}
        for group in self.optimizer.param_groups:
            groups.setdefault(group["name"], []).extend(group["params"])
        total = losses.sum()
        step = self.state.global_step + 1
        problem = self.guard.problem(self.model, groups, losses, self.accelerator.reduce(total, "sum"), step)
        if problem is None:
            self.watch.see_step(step, self.guard.norms)
            if (before := self.watch.see_loss(step, self.guard.loss)) is not None:
                self.log({"warning": self._diverged(step, before)})
            return total
        self.log({"warning": problem})
        return torch.zeros_like(total)

    def _diverged(self, step: int, before: float) -> str:
        return (
            f"step {step}: the loss rose from {before:.4f} to {self.guard.loss:.4f}: the training diverged, or these "
            f"records are unlike all before. If it stays there, stop, and go on from a checkpoint with a lower "
            f"learning_rate. Last good checkpoint: {self.guard.last_checkpoint() or 'none yet'}"
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Return the row's share of the step's loss; all shares add up to the mean over supervised tokens."""
        if num_items_in_batch is None:
            raise TrainingError("the number of supervised tokens of the step is unknown")
        loss = packed_loss(model, inputs, num_items_in_batch)
        # Data parallelism averages the ranks' gradients; the step's token count is over all ranks already.
        world_size: int = self.args.world_size
        return loss * world_size

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Log with the figures of the `watch`."""
        if "loss" in logs:
            logs = self.watch.figures(self.state.global_step, self.model, logs, self.guard.skipped)
        super().log(logs, start_time)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer with a learning rate of its own for the projector."""
        if self.optimizer is None:
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(list(self._parameter_groups()), **kwargs)
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def _parameter_groups(self) -> Iterator[dict[str, Any]]:
        """Yield LoRA, then the projector; with weight decay each is cut where a bias, which does not decay, begins."""
        trained = [(name, one) for name, one in self.model.named_parameters() if one.requires_grad]
        rates = {LORA_PART: self.args.learning_rate, PROJECTOR_PART: self.mm_projector_lr or self.args.learning_rate}
        decay = self.args.weight_decay
        decayed = set(self.get_decay_parameter_names(self.model)) if decay else set()
        # Cut, not sorted: the order is that of the optimizer's state in every checkpoint.
        ordered = sorted(trained, key=lambda pair: list(rates).index(part_of(pair[0])))
        for (part, decays), members in groupby(ordered, key=lambda pair: (part_of(pair[0]), pair[0] in decayed)):
            parameters = [one for _, one in members]
            yield {"params": parameters, "lr": rates[part], "weight_decay": decay if decays else 0.0, "name": part}

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """Build the schedule of `rate_factor`, in which the rate of no step is 0."""
        if self.lr_scheduler is None:
            kind, warmup = self.args.lr_scheduler_type.value, self.args.get_warmup_steps(num_training_steps)

            def factor(steps_taken: int) -> float:
                return rate_factor(kind, steps_taken + 1, num_training_steps, warmup)

            assert self.optimizer is not None
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def evaluate(
        self,
        eval_dataset: PackedRows | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Compute the validation loss, mean over its supervised tokens, and log a few sample answers.

        Training goes on as if nothing had been: neither its random numbers nor dropout are another.
        """
        rows = eval_dataset if eval_dataset is not None else self.eval_dataset
        was_training = self.model.training
        self.model.eval()
        # What is trained is in fp32, the rest in bf16: without autocast the two do not multiply.
        autocast = torch.autocast(self.args.device.type, dtype=torch.bfloat16, enabled=self.args.bf16)
        # A data loader draws a number for its workers, whether it has any or not.
        with forked_rng(self.args.device), torch.no_grad(), autocast:
            loss = self.held_out.mean(rows, self._rows_loader(rows))
            self._leave_out_unusable(rows)
            metrics: dict[str, Any] = {} if loss is None else {f"{metric_key_prefix}_loss": loss}
            if self.image_check is not None and loss is not None:
                metrics |= self.image_check.measure(self.held_out.mean, loss)
            if self.sample_answers is not None:
                metrics["samples"] = self.sample_answers()
        history = [*self.state.log_history, {"step": self.state.global_step, **metrics}]
        if loss is not None:
            validations = read_validations(history)
            steps, known = self.state.max_steps, self.watch.warned
            for kind, text in diagnose(validations, steps, keeps_best=self.keeps_best, known=known).items():
                self.watch.warn(kind, text)
        metrics |= self.watch.take_warnings()
        self.model.train(was_training)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _row_loss(self, batch: Batch) -> float:
        return float(packed_loss(self.model, self._prepare_inputs(batch), 1))

    def _leave_out_unusable(self, rows: PackedRows) -> None:
        """Warn of records whose validation loss is not finite; from now on they are left out.

        Raises TrainingError if the weights are the cause.
        """
        if not (found := self.held_out.unusable):
            return
        if broken := non_finite_tensors(self.model):
            raise TrainingError(
                f"stage {self.guard.stage}: not finite: {listed(broken)}. {self.guard.restart_advice()}"
            )
        named = [f"{rows.records[index].where} ({reason})" for index, reason in found.items()]
        self.watch.warn(
            "validation",
            f"{counted(len(found), 'record')} left out of the validation loss: {listed(named, separator='; ')}. "
            "Replace the image, or exclude the record",
        )
        self.eval_dataset = without(rows, found)
        self.image_check = self.image_check and self.image_check.without(found)
        self.held_out.unusable = {}
