"""`transformers.Trainer`, through its documented hooks, over a plan of packed rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainingArguments

from lora_llava.data.batch import Batch, PackedRows
from lora_llava.errors import TrainingError
from lora_llava.modeling.attention import check_attention
from lora_llava.modeling.packed import llava_in, packed_loss
from lora_llava.training.interruption import end_with_parent
from lora_llava.training.resumable import ResumableTrainer


def only(rows: list[Batch]) -> Batch:
    """Return the row of a batch of one."""
    [row] = rows
    return row


SampleAnswers = Callable[[], list[dict[str, str]]]
"""Answers a few validation questions with the model as it is."""


class PackedTrainer(ResumableTrainer):
    """Trains on the rows of a plan, in its order; one epoch of the Trainer is the whole stage."""

    optimizer: torch.optim.Optimizer | None
    control: TrainerControl

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        rows: PackedRows,
        validation: PackedRows | None,
        *,
        mm_projector_lr: float | None,
        sample_answers: SampleAnswers | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        check_attention(llava_in(model))
        self.mm_projector_lr = mm_projector_lr
        self.sample_answers = sample_answers
        super().__init__(model=model, args=args, train_dataset=rows, eval_dataset=validation, callbacks=callbacks)
        self.remove_callback(PrinterCallback)
        # Makes the Trainer count the step's supervised tokens and pass the count to `compute_loss`, and leave
        # the division by it to us.
        self.model_accepts_loss_kwargs = True

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
        """Add a row's gradients to the step's; an empty row, which only fills up a step, adds nothing."""
        if inputs["input_ids"].numel() == 0:
            return torch.zeros((), device=self.args.device)
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

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

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer with a learning rate of its own for the projector."""
        if self.optimizer is None:
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(list(self._parameter_groups()), **kwargs)
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def _parameter_groups(self) -> Iterator[dict[str, Any]]:
        groups: dict[str, list[nn.Parameter]] = {"lora": [], "projector": []}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups["projector" if ".multi_modal_projector." in name else "lora"].append(parameter)
        rates = {"lora": self.args.learning_rate, "projector": self.mm_projector_lr or self.args.learning_rate}
        for name, parameters in groups.items():
            if parameters:
                yield {"params": parameters, "lr": rates[name], "weight_decay": self.args.weight_decay, "name": name}

    def evaluate(
        self,
        eval_dataset: PackedRows | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Compute the validation loss, mean over its supervised tokens, and log a few sample answers."""
        rows = eval_dataset if eval_dataset is not None else self.eval_dataset
        was_training = self.model.training
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64)
        count = 0
        # What is trained is in fp32, the rest in bf16: without autocast the two do not multiply.
        autocast = torch.autocast(self.args.device.type, dtype=torch.bfloat16, enabled=self.args.bf16)
        with torch.no_grad(), autocast:
            for row in self._rows_loader(rows):
                inputs = self._prepare_inputs(row)
                total += packed_loss(self.model, inputs, 1).double().cpu()
                count += inputs["shift_labels"].numel()
            metrics: dict[str, Any] = {f"{metric_key_prefix}_loss": float(total) / count}
            if self.sample_answers is not None:
                metrics["samples"] = self.sample_answers()
        self.model.train(was_training)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
