"""The work of one of several processes: compares a model with the same model sharded."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

from lora_llava.modeling.fused.layer import fuse_layers
from lora_llava.modeling.packed import llava_in, packed_loss
from lora_llava.modeling.recompute import set_recompute
from lora_llava.modeling.structure import LANGUAGE_MODEL
from lora_llava.system.ranks import connected, rank
from lora_llava.training.checks.frozen_weights import FrozenWeights
from lora_llava.training.checks.non_finite import non_finite_tensors
from lora_llava.training.parallel.lockstep import in_lockstep
from lora_llava.training.parallel.sharding import shard_frozen
from tests.helpers.layers import Layers, one_tree, training_model, two_trees

CASES = [
    ("nf4", True, True, "instruct"),
    ("nf4", True, True, "align"),
    ("nf4", False, "selective", "instruct"),
    ("none", True, False, "instruct"),
]
"""Quantization, whether layers are fused, what is recomputed, stage."""


def gradients(model: Any, row: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss of a row and the gradients."""
    model.zero_grad(set_to_none=True)
    loss = packed_loss(model, row, 10)
    loss.backward()
    return loss.item(), {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


class Gathered:
    """Counts the bytes that this process receives from the others to gather weights."""

    def __init__(self) -> None:
        self.bytes = 0
        # Newer versions of torch call it by the first name.
        name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
        gather = getattr(dist, name)

        def counted(output_tensor: torch.Tensor, input_tensor: torch.Tensor, *others: Any, **options: Any) -> Any:
            self.bytes += output_tensor.nbytes - input_tensor.nbytes
            return gather(output_tensor, input_tensor, *others, **options)

        setattr(dist, name, counted)


def frozen_bytes(model: Any) -> int:
    """Count the bytes that this process holds of the decoder layers' frozen linear layers."""
    layers = llava_in(model).get_submodule(LANGUAGE_MODEL).layers
    linear = [one for name, one in layers.named_parameters() if "_proj" in name and not one.requires_grad]
    return sum((one.to_local() if hasattr(one, "to_local") else one).nbytes for one in linear)


def compare(quantization: str, fused: bool, recompute: Any, stage: Any, counter: Gathered) -> dict[str, Any]:
    """Compare loss and gradients of a row with those of the sharded model; each process has its own row."""
    model = training_model(Layers(quantization=quantization, stage=stage))
    reason = fuse_layers(model) if fused else None
    set_recompute(model, recompute)
    row = one_tree() if rank() and stage == "instruct" else two_trees()
    loss, whole = gradients(model, row)
    held = frozen_bytes(model)
    shard_frozen(model)
    check = FrozenWeights("instruct")
    check.before_training(model)
    first, _ = gradients(model, row)
    before = counter.bytes
    again, sharded = gradients(model, row)
    received = counter.bytes - before
    model.eval()
    with torch.no_grad():
        packed_loss(model, row, 10)
    return {
        "reason": reason,
        "losses": [loss, first, again],
        "gradients": whole.keys() == sharded.keys() and all(torch.equal(whole[name], sharded[name]) for name in whole),
        "held": [held, frozen_bytes(model)],
        "received": received,
        "frozen": (check.on_save() or "").partition(" (")[0],
        "checked": len(check.sums),
    }


def spoiled() -> list[str]:
    """Put NaN into the part of a weight that the last process holds; return what each process is told."""
    model = training_model(Layers(quantization="none"))
    weight = llava_in(model).get_submodule(LANGUAGE_MODEL).layers[1].mlp.down_proj.base_layer.weight
    weight.data[-1, -1] = float("nan")
    shard_frozen(model)
    with in_lockstep(True):
        return non_finite_tensors(model)


def idle() -> bool:
    """Train a row in the first process, and run a pass for nothing in the others; tell whether gradients are right."""
    model = training_model(Layers())
    fuse_layers(model)
    _, whole = gradients(model, two_trees())
    model.zero_grad(set_to_none=True)
    shard_frozen(model)
    loss = packed_loss(model, one_tree() if rank() else two_trees(), 10)
    if rank():
        trained = [one for one in model.parameters() if one.requires_grad]
        torch.autograd.grad(loss, trained, allow_unused=True)
        return all(one.grad is None for one in model.parameters())
    loss.backward()
    return all(torch.equal(one.grad, whole[name]) for name, one in model.named_parameters() if one.grad is not None)


def main() -> None:
    """Print the findings of this process as JSON."""
    torch.set_num_threads(1)
    with connected():
        counter = Gathered()
        cases = [compare(*case, counter=counter) for case in CASES]
        print(json.dumps({"cases": cases, "spoiled": spoiled(), "idle": idle()}))  # noqa: T201 - the tests read it
