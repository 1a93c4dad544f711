"""Keep non-finite losses and gradients away from the weights: stop the run, or skip the step.

One NaN in the weights or in Adam's moments soon spreads to all of them. So losses and gradients are checked after the
last backward pass of a step and before clipping: clipping by a norm of NaN or infinity ruins every gradient.

In fp16 the loss is scaled, and gradients that overflow at a finite loss are how the scale is found, often in the first
steps. Such a step is left out and counted apart; at a scale of 1 or less it is as bad as any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.utils import get_total_norm

from lora_llava.data.rows import PackedRows
from lora_llava.errors import TrainingError
from lora_llava.modeling.attention import to_device
from lora_llava.modeling.fused.layer import without_graphs
from lora_llava.modeling.packed import packed_loss
from lora_llava.recipe.stages import StageName, StageSettings
from lora_llava.system.device import autocast
from lora_llava.system.ranks import gathered
from lora_llava.system.text import counted, listed
from lora_llava.training.checks.check import Check, CompletedStep, ValidationPass
from lora_llava.training.checks.frozen_weights import frozen_tensors, held_part
from lora_llava.training.parallel.lockstep import idle_index, is_in_lockstep, num_passes


def skip_limit(settings: StageSettings) -> int:
    """Return how many non-finite steps a stage may skip."""
    return settings.max_non_finite_steps if settings.on_non_finite == "skip" else 0


class NonFiniteGuard(Check):
    """Judges each optimizer step before it is applied; comes first, since it computes the loss and the norms."""

    key: ClassVar[str] = "skipped"

    def __init__(
        self, rows: PackedRows, *, stage: str = "training", most_skipped: int = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        """Guard the steps over `rows`, those of this process; at most `most_skipped` of them may be skipped.

        `dtype`: what the model computes in.
        """
        self.rows = rows
        self.stage = stage
        self.most_skipped = most_skipped
        self.dtype = dtype
        self.skipped: list[int] = []
        """Steps that were skipped, counted from 1; other checks read this very list."""
        self.overflowed: list[int] = []
        """Steps that were left out because the loss scale was too large; other checks read this list, too."""
        self.fix = ""
        """Advice about the last step that was not finite."""

    @classmethod
    def by_settings(
        cls, rows: PackedRows, stage: StageName, settings: StageSettings, dtype: torch.dtype
    ) -> NonFiniteGuard:
        """Create the guard from `on_non_finite` and `max_non_finite_steps`."""
        return cls(rows, stage=stage, most_skipped=skip_limit(settings), dtype=dtype)

    def state(self) -> list[int] | dict[str, list[int]]:
        """Return the steps that were skipped; apart from them those that overflowed, if there are any."""
        if not self.overflowed:
            return list(self.skipped)
        return {"skipped": list(self.skipped), "overflowed": list(self.overflowed)}

    def restore(self, state: Sequence[int] | Mapping[str, Sequence[int]] | None) -> None:
        """Continue with the skipped steps of a checkpoint."""
        lists = state if isinstance(state, Mapping) else {"skipped": state or ()}
        self.skipped[:], self.overflowed[:] = lists.get("skipped", ()), lists.get("overflowed", ())

    def on_step(self, step: CompletedStep) -> str | None:
        """Compute loss and gradient norms; skip the step, and say why, if one of them is not finite.

        Raises TrainingError, with the weights unchanged, if the step may not be skipped.
        """
        norms = step.gradients.norms()
        # The only synchronization with the device in a step.
        values: list[float] = torch.stack([step.total, *(one.to(step.total.device) for one in norms.values())]).tolist()
        step.loss, step.norms = values[0], dict(zip(norms, values[1:], strict=True))
        if all(map(math.isfinite, values)):
            return None
        # Frees memory for the passes that look for the culprit; and a step without gradients changes neither weights
        # nor the optimizer's state.
        step.gradients.drop()
        step.is_skipped = True
        if math.isfinite(step.loss) and step.loss_scale() > 1:
            step.has_overflowed = True
            self.overflowed.append(step.number)
            return None
        problem = self._describe(step)
        self.skipped.append(step.number)
        if len(self.skipped) > self.most_skipped:
            raise TrainingError(f"{problem} {self._advice(step.last_checkpoint)}")
        return f"{problem} The step was left out, {len(self.skipped)} of at most {self.most_skipped}."

    def on_log(self, step: int, model: nn.Module, row: dict[str, Any]) -> dict[str, Any]:
        """Add the number of steps that overflowed; a step without gradients has no norm."""
        if not self.overflowed:
            return row
        without_norm = {"grad_norm"} if step in self.overflowed else set()
        return {key: one for key, one in row.items() if key not in without_norm} | {
            "overflowed_steps": len(self.overflowed)
        }

    def on_save(self) -> str | None:
        """Return a line about the steps that overflowed, if there are any."""
        if not self.overflowed:
            return None
        steps = counted(len(self.overflowed), "step")
        return f"fp16: {steps} left out, whose gradients overflowed while the loss scale was found"

    def on_validation(self, validation: ValidationPass) -> None:
        """Raise TrainingError if a validation loss is not finite because a weight is not."""
        if validation.unusable and (broken := non_finite_tensors(validation.model)):
            raise TrainingError(f"stage {self.stage}: not finite: {listed(broken)}. {self.restart_advice()}")

    def _advice(self, last_checkpoint: Callable[[], str | None]) -> str:
        checkpoint = f"Last good checkpoint: {last_checkpoint() or 'none yet'}."
        if self.most_skipped:
            steps = ", ".join(map(str, self.skipped))
            return (
                f"More than max_non_finite_steps {self.most_skipped} steps ({steps}) were like this. {self.fix} "
                f"{checkpoint}"
            )
        return f"{self.fix} Or set on_non_finite: skip to leave out a few such steps. {checkpoint}"

    def restart_advice(self) -> str:
        """Return the advice about weights that are not finite."""
        return (
            "A frozen weight came so from the base, or from a fault of memory; a trained one from start_from, or from "
            "a step before. Replace the file it came from, or resume from an earlier checkpoint with a lower "
            "learning_rate."
        )

    def _describe(self, step: CompletedStep) -> str:
        """Describe a non-finite step over all processes: what is not finite, the records, the gradient norms."""
        losses: list[float] = step.losses.tolist()
        trained = [parameter for parameters in step.groups.values() for parameter in parameters]
        rows = self.rows.rows[(step.number - 1) * len(losses) : step.number * len(losses)]
        bad = [row for row, loss in zip(rows, losses, strict=True) if not math.isfinite(loss)]
        num_rows, num_bad = (sum(gathered(len(some))) for some in (rows, bad))
        what = f"the loss of {num_bad} of {num_rows} micro-batches" if num_bad else "the gradient"
        own = [index for row in (bad if num_bad else rows) for tree in row for index in tree]
        broken = non_finite_tensors(step.model)
        own_guilty = [] if broken else self._guilty(step.model, trained, own)
        suspects, guilty = (list(chain(*gathered(self._wheres(some)))) for some in (own, own_guilty))
        if broken:
            why = f"Not finite before the step already: {listed(broken)}. The records: {_named(suspects)}."
            self.fix = self.restart_advice()
        elif guilty:
            why = f"Not finite by themselves are {len(guilty)} of {counted(len(suspects), 'record')}: "
            why += f"{_named(guilty)}."
            self.fix = "Repair these records, or exclude them (data.exclude)."
        else:
            why = f"Each record by itself is finite; together they were {_named(suspects)}."
            self.fix = "Lower learning_rate: weights that have grown too large overflow with some records only."
        norms = ", ".join(f"{name} {norm:g}" for name, norm in step.norms.items())
        return (
            f"stage {self.stage}, step {step.number}: {what} is not finite; the weights are as they were before "
            f"the step. {why} Gradient norms: {norms}."
        )

    def _guilty(self, model: nn.Module, trained: list[nn.Parameter], suspects: Sequence[int]) -> list[int]:
        """Return the conversations that are not finite by themselves, among those of this process."""
        # Agreed on before the first pass, which waits for the others.
        num_idle = num_passes(len(suspects)) - len(suspects)
        guilty = [index for index in suspects if not self._is_finite_alone(model, trained, index)]
        for _ in range(num_idle):
            self._is_finite_alone(model, trained, idle_index(self.rows))
        return guilty

    def _wheres(self, indices: Sequence[int]) -> list[str]:
        return [self.rows.records[index].where for index in indices]

    def _is_finite_alone(self, model: nn.Module, trained: list[nn.Parameter], index: int) -> bool:
        """Run one conversation forward and backward; gradients and RNG state do not change."""
        device = trained[0].device
        alone = PackedRows([((index,),)], self.rows.records, self.rows.encoded, self.rows.read_image)
        batch = to_device(alone[0], device)
        with forked_rng(device), without_graphs(model):
            with autocast(device, self.dtype):
                loss = packed_loss(model, batch, max(1, batch["shift_labels"].numel()))
            gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        norm = get_total_norm([gradient for gradient in gradients if gradient is not None])
        return math.isfinite(loss.item()) and math.isfinite(norm.item())


def _named(wheres: Sequence[str]) -> str:
    return listed(wheres, separator="; ")


def non_finite_tensors(model: nn.Module) -> list[str]:
    """List the weights, buffers and 4-bit scales that hold NaN or infinity; of a sharded model those of all parts."""
    trained = ((name, tensor) for name, tensor in model.named_parameters() if tensor.requires_grad)
    names = [name for name, tensor in (*trained, *frozen_tensors(model)) if not _is_finite(held_part(tensor))]
    return list(dict.fromkeys(chain.from_iterable(gathered(names)))) if is_in_lockstep() else names


def _is_finite(tensor: torch.Tensor) -> bool:
    """Return whether no element is NaN or infinite; integers, such as 4-bit weights, are always finite."""
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def forked_rng(device: torch.device) -> Any:
    """Fork torch's RNG (CPU and `device`); its state is restored when the `with` block ends."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda")
