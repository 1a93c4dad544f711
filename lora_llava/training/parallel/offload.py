"""Divide gradients and the optimizer's state between the processes, on their hosts: DeepSpeed's ZeRO-2 with offload.

After each backward pass DeepSpeed adds up the gradients of all processes, in buckets, and each process takes its part
of the sums to the host. There AdamW updates this part of the trained weights, which all processes then gather. A card
holds the trained weights, and of their gradients a bucket. DeepSpeed sees nothing but the trained weights and the
losses: the frozen weights, the loop, its checks and its checkpoints are the kit's.

DeepSpeed lines gradients up in the order in which the backward pass completes them, and expects the same ones in the
same order in all processes; else it adds up gradients of different weights. So it is handed all of them in one order:
those of the projector last, also for a row without an image; and a process without a row completes them without a
forward pass.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import AdamW

from lora_llava.errors import TrainingError
from lora_llava.system.ranks import gathered, is_first, rank, world_size
from lora_llava.training.checks.trained_weights import PROJECTOR_PART
from lora_llava.training.parallel.gradients import summed
from lora_llava.training.stage import Stage

_BUCKET_ELEMENTS = 2**24
"""Gradients that travel at one time, and weights that are gathered at one time."""
_MOMENTS = ("exp_avg", "exp_avg_sq")
"""State of AdamW for each weight."""


def offloads(stage: Stage) -> bool:
    """Tell whether the recipe has the optimizer of a stage divided between several processes."""
    return stage.recipe.distributed.offload and world_size() > 1


class OffloadedAdamW(AdamW):
    """AdamW over all trained weights, whose state and gradients are in parts on the hosts of the processes.

    Its groups are those of the whole weights, which schedules and checkpoints know. After `divide`, each group has a
    counterpart with this process's part of its weights in one flat tensor.
    """

    def __init__(self, groups: Any, **options: Any) -> None:
        super().__init__(groups, **options)
        self.reached: set[str] = set()
        """Names of the groups that have gradients in this step, in any process once it is complete; others are left
        alone, as AdamW leaves a weight without gradient."""
        self._parts: AdamW | None = None
        self.zero: Any = None
        """DeepSpeed's optimizer around the parts."""
        self.engine: Any = None

    def divide(self) -> None:
        """Hand the trained weights over to DeepSpeed: from here on they are views of one tensor for each group."""
        self._parts = AdamW([dict(group) for group in self.param_groups])
        trained = [weight for group in self.param_groups for weight in group["params"]]
        self.engine, self.zero = _initialized(_Losses(trained), self._parts)

    @property
    def part_groups(self) -> list[dict[str, Any]]:
        """The counterparts of `param_groups`, each with one flat tensor of the same size in every process."""
        assert self._parts is not None, "divided"
        return self._parts.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parts of the groups that have gradients, and gather the weights from all processes."""
        gradients = []
        for group, part in zip(self.param_groups, self.part_groups, strict=True):
            [flat] = part["params"]
            part["lr"] = group["lr"]
            gradients.append((flat, flat.grad))
            if part["name"] not in self.reached:
                flat.grad = None
        # Also a step without gradients ends the accumulation.
        self.zero.step()
        self.zero.zero_grad()
        for flat, gradient in gradients:
            # DeepSpeed writes the next ones to the same memory.
            flat.grad = gradient
        self.reached = set()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the whole optimizer, as that of AdamW: in the first process; in the others, settings."""
        content: dict[str, Any] = super().state_dict()
        if self._parts is None:
            return content
        for group, part, stored in zip(self.param_groups, self.part_groups, content["param_groups"], strict=True):
            [flat] = part["params"]
            if state := self._parts.state.get(flat):
                sizes = [weight.numel() for weight in group["params"]]
                moments = {name: _collected(state[name], sizes) for name in _MOMENTS}
                for position, (index, weight) in enumerate(zip(stored["params"], group["params"], strict=True)):
                    views = {name: parts[position].view_as(weight) for name, parts in moments.items() if parts}
                    content["state"] |= {index: {"step": state["step"].clone(), **views}} if views else {}
        return content

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this process's part of a state of AdamW, and all of its settings."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        if self._parts is None:
            return
        state, settings = state_dict["state"], state_dict["param_groups"]
        for group, part, stored in zip(self.param_groups, self.part_groups, settings, strict=True):
            [flat] = part["params"]
            part.update({key: value for key, value in group.items() if key != "params"})
            self._parts.state.pop(flat, None)
            if all(index in state for index in stored["params"]):
                whole = [state[index] for index in stored["params"]]
                moments = {name: _own_part([weight_state[name] for weight_state in whole], flat) for name in _MOMENTS}
                self._parts.state[flat] = {"step": whole[0]["step"].clone(), **moments}


class _InOrder:
    """Hands the gradients of a pass to DeepSpeed in one order, whatever the order in which they are completed."""

    def __init__(self, process: Callable[[nn.Parameter, int], None], order: Sequence[nn.Parameter]) -> None:
        self._process, self._order = process, order
        self._waiting: dict[nn.Parameter, int] = {}
        self._position = 0

    def __call__(self, parameter: nn.Parameter, group: int) -> None:
        """Take a weight whose gradient is complete; `group`: DeepSpeed's number of its group."""
        self._waiting[parameter] = group
        while self._position < len(self._order) and (following := self._order[self._position]) in self._waiting:
            self._process(following, self._waiting.pop(following))
            self._position += 1

    def end(self) -> None:
        """Begin the next pass."""
        assert not self._waiting and self._position == len(self._order), "a pass completes all gradients"
        self._position = 0


class OffloadedGradients:
    """The gradients of a step in the parts of an `OffloadedAdamW`, which are their sums over all processes."""

    def __init__(self, optimizer: OffloadedAdamW) -> None:
        """Divide an optimizer, and follow its gradients."""
        optimizer.divide()
        self.optimizer, groups = optimizer, optimizer.param_groups
        self.projector = [weight for group in groups if group["name"] == PROJECTOR_PART for weight in group["params"]]
        lora = [weight for group in groups if group["name"] != PROJECTOR_PART for weight in group["params"]]
        # Nearly that of the backward pass, so that few gradients wait.
        self.order = [*reversed(lora), *reversed(self.projector)]
        self._in_order = optimizer.zero.process_gradients = _InOrder(optimizer.zero.process_gradients, self.order)
        self._squares: dict[str, torch.Tensor] = {}

    def before_row(self) -> torch.Tensor:
        """Return 0 from the projector's weights, so that their gradients are completed without an image, too."""
        return _zero_of(self.projector)

    def backward(self, loss: torch.Tensor, *, has_image: bool) -> None:
        """Add the gradients of a row to the parts of all processes."""
        names = {group["name"] for group in self.optimizer.param_groups}
        self.optimizer.reached |= names if has_image else names - {PROJECTOR_PART}
        self._backward(loss)

    def idle(self) -> None:
        """Add nothing, as often as other processes have rows."""
        self._backward(_zero_of(self.order))

    def _backward(self, loss: torch.Tensor) -> None:
        engine = self.optimizer.engine
        # DeepSpeed divides sums by the number of processes.
        engine.backward(engine(loss * world_size()))
        self._in_order.end()

    def complete(self) -> None:
        """Agree on which groups have gradients, take the sums to the parts, and compute their norms."""
        optimizer, squares = self.optimizer, dict[str, torch.Tensor]()
        optimizer.reached = set().union(*gathered(optimizer.reached))
        optimizer.zero.finalize_gradient_accumulation_boundary()
        for part in optimizer.part_groups:
            [flat] = part["params"]
            square = flat.grad.norm().square() if part["name"] in optimizer.reached else flat.new_zeros(())
            squares[part["name"]] = squares.get(part["name"], 0.0) + square
        sums = summed(torch.stack(list(squares.values())))
        self._squares = dict(zip(squares, sums, strict=True))

    def norms(self) -> Mapping[str, torch.Tensor]:
        """Return the norm of each group's gradients, on the host."""
        return {name: square.sqrt() for name, square in self._squares.items()}

    def clip(self, max_norm: float) -> torch.Tensor:
        """Scale the parts as PyTorch scales gradients; return the norm of all before."""
        norm = torch.stack(list(self._squares.values())).sum().sqrt()
        if max_norm:
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            for part in self.optimizer.part_groups:
                part["params"][0].grad.mul_(factor)
        return norm

    def drop(self) -> None:
        """Have the next update leave every group alone."""
        self.optimizer.reached = set()
        self._squares = {name: torch.zeros_like(square) for name, square in self._squares.items()}


def check_offload(stage: Stage, dtype: torch.dtype) -> None:
    """Raise TrainingError if the recipe offloads the optimizer of a run in fp16."""
    if offloads(stage) and dtype == torch.float16:
        raise TrainingError(
            "distributed.engine: deepspeed is for bf16 and fp32, and precision is fp16 here; the loss scale is not "
            "applied to its gradients. Remove distributed.engine and distributed.offload"
        )


def offload_line(stage: Stage) -> str | None:
    """Return a line for the console if offloading has no effect."""
    if stage.recipe.distributed.offload and world_size() == 1:
        return "distributed.offload: no effect in a single process; start several with --gpus"
    return None


def _zero_of(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """Return 0, a scalar, that depends on all `parameters`."""
    total = parameters[0].new_zeros(())
    for weight in parameters:
        total = total + 0.0 * weight.view(-1)[0]
    return total


class _Losses(nn.Module):
    """What DeepSpeed takes for the model: it has the trained weights, and returns the loss that it is given."""

    def __init__(self, trained: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.trained = nn.ParameterList(trained)

    def forward(self, loss: torch.Tensor) -> torch.Tensor:
        return loss


def _initialized(model: nn.Module, parts: AdamW) -> tuple[Any, Any]:
    """Return DeepSpeed's engine and its optimizer around `parts`, whose groups then hold the parts."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Seconds to import, for nothing in a run without it.
    import deepspeed
    import deepspeed.ops

    # It would be compiled at the first use on a CPU, in minutes, behind a lock that outlives a process that is killed.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.* is deprecated", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # The loop says when the gradients of a step are complete, and clips them.
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0,
        # Its own AdamW would be compiled, too.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": 2,
            "offload_optimizer": {"device": "cpu"},
            "overlap_comm": False,
            # Each part of the sums goes to its process alone.
            "use_multi_rank_bucket_allreduce": False,
            "reduce_bucket_size": _BUCKET_ELEMENTS,
            "allgather_bucket_size": _BUCKET_ELEMENTS,
        },
    }
    engine, zero, _, _ = deepspeed.initialize(model=model, optimizer=parts, config=config, dist_init_required=False)
    return engine, zero


def _collected(part: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Return the first of all processes' parts together, cut into `sizes`, in the first process; [] in the others."""
    parts = [torch.empty_like(part) for _ in range(world_size())] if is_first() else None
    dist.gather(part, parts)
    return [] if parts is None else list(torch.cat(parts)[: sum(sizes)].split(list(sizes)))


def _own_part(tensors: Sequence[torch.Tensor], flat: torch.Tensor) -> torch.Tensor:
    """Return this process's part of `tensors`, of the size of `flat`; the last part is filled up with 0."""
    whole = flat.new_zeros(world_size() * flat.numel())
    torch.cat([tensor.flatten() for tensor in tensors], out=whole[: sum(tensor.numel() for tensor in tensors)])
    return whole[rank() * flat.numel() :][: flat.numel()].clone()
