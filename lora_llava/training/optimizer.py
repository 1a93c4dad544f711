"""The optimizer, with a learning rate for each part of what is trained, and its schedule."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments

from lora_llava.errors import TrainingError
from lora_llava.recipe.schedule import rate_factor
from lora_llava.training.checks.trained_weights import LORA_PART, PROJECTOR_PART, part_of
from lora_llava.training.parallel.offload import OffloadedAdamW


def make_optimizer(
    model: nn.Module, args: TrainingArguments, mm_projector_lr: float | None, *, offloads: bool = False
) -> torch.optim.Optimizer:
    """Create the optimizer that `args.optim` names; None for `mm_projector_lr`: the learning rate of LoRA.

    `offloads`: with its state on the hosts of all processes, once it is divided; raises TrainingError if that is not
    AdamW with fp32 states.
    """
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    if offloads:
        if args.optim != "adamw_torch":
            raise TrainingError(
                f"the checkpoint's optimizer is {args.optim.value}, and distributed.engine: deepspeed updates weights "
                "with adamw_torch: resume without distributed.engine and distributed.offload"
            )
        optimizer_class = OffloadedAdamW
    if args.optim == "adamw_torch" and args.device.type == "cuda":
        # A few kernels instead of a dozen for each parameter; the state has the same names.
        options["fused"] = True
    rates = {LORA_PART: args.learning_rate, PROJECTOR_PART: mm_projector_lr or args.learning_rate}
    optimizer: torch.optim.Optimizer = optimizer_class(list(_groups(model, rates, args.weight_decay)), **options)
    return optimizer


def _groups(model: nn.Module, rates: dict[str, float], weight_decay: float) -> Iterator[dict[str, Any]]:
    """Yield the groups of LoRA, then of the projector; weight decay splits each at its biases, which do not decay."""
    trained = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
    # Split without sorting: every checkpoint stores the optimizer's state in this order.
    trained.sort(key=lambda pair: list(rates).index(part_of(pair[0])))
    for (part, decay), members in groupby(
        trained, key=lambda pair: (part_of(pair[0]), 0.0 if pair[0].endswith(".bias") else weight_decay)
    ):
        yield {"params": [one for _, one in members], "lr": rates[part], "weight_decay": decay, "name": part}


def groups_of(optimizer: torch.optim.Optimizer) -> dict[str, list[nn.Parameter]]:
    """Return the trained parameters by the name of their group, with and without weight decay together."""
    groups: dict[str, list[nn.Parameter]] = {}
    for group in optimizer.param_groups:
        groups.setdefault(group["name"], []).extend(group["params"])
    return groups


def make_scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
    """Create what scales the loss if the model computes in fp16, whose smallest number is 6e-8; else does nothing."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def make_schedule(optimizer: torch.optim.Optimizer, args: TrainingArguments) -> LambdaLR:
    """Create the schedule of `rate_factor`; no step has a rate of 0."""
    kind, warmup = args.lr_scheduler_type.value, args.get_warmup_steps(args.max_steps)
    return LambdaLR(optimizer, lambda taken: rate_factor(kind, taken + 1, args.max_steps, warmup))
