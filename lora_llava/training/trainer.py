"""`transformers.Trainer` over a plan of packed rows, with the checks of a stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, cast

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_llava.data.rows import Batch, PackedRows
from lora_llava.errors import TrainingError
from lora_llava.modeling.attention import check_attention
from lora_llava.modeling.packed import llava_in, packed_loss
from lora_llava.recipe.schedule import rate_factor
from lora_llava.training.checkpoints.saver import CheckpointSaver, ResumableTrainer
from lora_llava.training.checkpoints.signals import end_with_parent
from lora_llava.training.checks.check import Check, CompletedStep, ValidationPass
from lora_llava.training.checks.non_finite import forked_rng
from lora_llava.training.checks.trained_weights import LORA_PART, PROJECTOR_PART, part_of
from lora_llava.training.validation import HeldOutLoss, without


def _unwrap_single(rows: list[Batch]) -> Batch:
    """Return the only row of a batch; the Trainer counts supervised tokens only if there are `labels`."""
    [row] = rows
    return {**row, "labels": row["shift_labels"]}


class PackedTrainer(ResumableTrainer):
    """Trains on the rows of a plan, in order; one epoch of the Trainer is the whole stage."""

    eval_dataset: PackedRows | None
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
        checks: Sequence[Check] = (),
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        check_attention(llava_in(model))
        self.mm_projector_lr = mm_projector_lr
        self.checks = checks
        """Asked in this order; `training.checks.check` says when."""
        self.last_checkpoint: Callable[[], str | None] = lambda: None
        """Names the newest usable checkpoint, for warnings."""
        self.held_out = HeldOutLoss(self._row_loss)
        self.losses: list[torch.Tensor] = []
        self.checks_state = _ChecksState(checks)
        callbacks = [*(callbacks or []), self.checks_state]
        super().__init__(model=model, args=args, train_dataset=rows, eval_dataset=validation, callbacks=callbacks)
        self.remove_callback(PrinterCallback)
        # Makes the Trainer count the step's supervised tokens and pass the count to `compute_loss`, which divides
        # by it.
        self.model_accepts_loss_kwargs = True

    def train_and_save(self, saver: CheckpointSaver) -> None:
        """Run the checks that come before training, then train as `ResumableTrainer` does."""
        for check in self.checks:
            check.before_training(self.model)
        self.last_checkpoint = saver.last_whole
        super().train_and_save(saver)

    def restore_checks(self) -> None:
        """Give the checks back their part of the training's state."""
        self.checks_state.on_train_begin(self.args, self.state, self.control)

    def before_save(self) -> list[str | None]:
        """Ask each check before something is written; return their lines for the console."""
        return [check.on_save() for check in self.checks]

    def after_training(self) -> list[str | None]:
        """Ask each check to judge the trained model; return their lines for the console."""
        return [check.after_training(self.model, self.state.global_step) for check in self.checks]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.before_save()
        super()._save_checkpoint(model, trial)

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """Load the rows in the plan's order; each row is a micro-batch."""
        return self._rows_loader(self.train_dataset)

    def _rows_loader(self, rows: PackedRows) -> DataLoader[Batch]:
        workers = self.args.dataloader_num_workers
        # batch_size=1, not None: with it the Trainer skips rows by index when it resumes, without reading them.
        return DataLoader(
            cast("Dataset[Batch]", rows),
            batch_size=1,
            collate_fn=_unwrap_single,
            num_workers=workers,
            worker_init_fn=end_with_parent,
            # The loader draws a seed for its workers; with its own generator that leaves the model's RNG alone.
            generator=torch.Generator(),
            pin_memory=self.args.device.type == "cuda",
            prefetch_factor=2 if workers else None,
            persistent_workers=bool(workers),
        )

    def training_step(
        self, model: nn.Module, inputs: Batch, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Accumulate the gradients of a row; an empty row, which pads a step, adds nothing.

        Returns the loss of the whole step with its last row and 0 before, so that a skipped step is not logged.
        """
        if inputs["input_ids"].numel() == 0:
            loss = torch.zeros((), device=self.args.device)
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses.append(loss)
        return self._checked_loss() if self.accelerator.sync_gradients else torch.zeros_like(loss)

    def _checked_loss(self) -> torch.Tensor:
        """Return the loss of a complete step; 0, with its gradients cleared, if a check skips it."""
        losses = torch.stack(self.losses)
        self.losses.clear()
        assert self.optimizer is not None
        groups: dict[str, list[nn.Parameter]] = {}
        for group in self.optimizer.param_groups:
            groups.setdefault(group["name"], []).extend(group["params"])
        total = losses.sum()
        total_of_all = self.accelerator.reduce(total, "sum")
        step = CompletedStep(self.state.global_step + 1, self.model, groups, losses, total_of_all, self.last_checkpoint)
        for check in self.checks:
            if (warning := check.on_step(step)) is not None:
                self.log({"warning": warning})
            if step.is_skipped:
                return torch.zeros_like(total)
        return total

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
        # Data parallelism averages gradients over the ranks, but the token count is already the sum over all ranks.
        world_size: int = self.args.world_size
        return loss * world_size

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Log with the figures of the checks."""
        if "loss" in logs:
            for check in self.checks:
                logs = check.on_log(self.state.global_step, self.model, logs)
        super().log(logs, start_time)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer, with a separate learning rate for the projector."""
        if self.optimizer is None:
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(list(self._parameter_groups()), **kwargs)
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def _parameter_groups(self) -> Iterator[dict[str, Any]]:
        """Yield the groups of LoRA, then of the projector; weight decay splits each at parameters that do not decay."""
        trained = [(name, one) for name, one in self.model.named_parameters() if one.requires_grad]
        rates = {LORA_PART: self.args.learning_rate, PROJECTOR_PART: self.mm_projector_lr or self.args.learning_rate}
        decay = self.args.weight_decay
        decayed = set(self.get_decay_parameter_names(self.model)) if decay else set()
        # Split without sorting: every checkpoint stores the optimizer's state in this order.
        ordered = sorted(trained, key=lambda pair: list(rates).index(part_of(pair[0])))
        for (part, decays), members in groupby(ordered, key=lambda pair: (part_of(pair[0]), pair[0] in decayed)):
            parameters = [one for _, one in members]
            yield {"params": parameters, "lr": rates[part], "weight_decay": decay if decays else 0.0, "name": part}

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """Create the schedule of `rate_factor`; no step has a rate of 0."""
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
        """Compute and log the validation loss, the mean over supervised tokens, and what the checks add to it.

        Training is not affected: RNG state and dropout mode are restored. Records whose loss is not finite are left
        out from the next validation on.
        """
        rows = eval_dataset if eval_dataset is not None else self.eval_dataset
        assert rows is not None
        was_training = self.model.training
        self.model.eval()
        # Trained weights are fp32, the others bf16: without autocast they cannot be multiplied.
        autocast = torch.autocast(self.args.device.type, dtype=torch.bfloat16, enabled=self.args.bf16)
        # A data loader draws from the RNG even without workers.
        with forked_rng(self.args.device), torch.no_grad(), autocast:
            loss = self.held_out.mean(rows, self._rows_loader(rows))
            metrics: dict[str, Any] = {} if loss is None else {f"{metric_key_prefix}_loss": loss}
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
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _row_loss(self, batch: Batch) -> float:
        return float(packed_loss(self.model, self._prepare_inputs(batch), 1))


class _ChecksState(TrainerCallback):  # type: ignore[misc]
    """Copies the state of the checks into the Trainer's state, which checkpoints save and load."""

    KEY = "lora_llava_guards"

    def __init__(self, checks: Sequence[Check]) -> None:
        self.checks = [check for check in checks if check.key]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the checks from a checkpoint, or reset them."""
        saved = state.stateful_callbacks.get(self.KEY)
        for check in self.checks:
            check.restore(saved.get(check.key, {}) if saved else None)
        self._keep(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Update the state before the step is saved."""
        self._keep(state)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Update the state after a log line; the step may be saved next."""
        self._keep(state)

    def _keep(self, state: TrainerState) -> None:
        state.stateful_callbacks[self.KEY] = {check.key: check.state() for check in self.checks}
