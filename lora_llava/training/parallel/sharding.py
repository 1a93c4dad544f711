"""Shard the frozen weights of the decoder layers over the processes of a run, with FSDP2.

Each process keeps its part of every frozen linear layer. Before a decoder layer computes, forward or backward, the
parts are gathered from all processes; after it, the gathered weight is freed. So a card holds its share of the base,
and two layers whole at most. What is trained stays whole in every process: LoRA, projector, gradients, optimizer and
all that reads them are as without sharding.

Gathering is collective: every process must run the same forward and backward passes, in the same order.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bitsandbytes.nn import Linear4bit
from torch import nn

from lora_llava.modeling.fused.layer import FusedLayer
from lora_llava.modeling.packed import llava_in
from lora_llava.modeling.structure import LANGUAGE_MODEL
from lora_llava.system.ranks import world_size
from lora_llava.training.parallel.lockstep import in_lockstep
from lora_llava.training.stage import Stage


def sharding_line(stage: Stage) -> str | None:
    """Return a line for the console that says what sharding means for a stage; None if the recipe does not shard."""
    if not stage.recipe.distributed.shard:
        return None
    if world_size() == 1:
        return "distributed.shard: no effect in a single process; start several with --gpus"
    return "distributed.shard: every process computes all of the validation; no sample answers"


@contextmanager
def sharded(model: Any, processes: int) -> Iterator[None]:
    """Shard a model over `processes`, which run the same passes inside the `with` block; 1 changes nothing."""
    if processes > 1:
        shard_frozen(model)
    with in_lockstep(processes > 1):
        yield


def shard_frozen(model: Any) -> None:
    """Keep only this process's part of each frozen linear layer in the decoder layers.

    Call it when the model is on its device, adapted and fused; weights must not be read by name after it.
    """
    # A second to import, for nothing in a single process.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # The hidden states that a layer returns are a view, on which nothing writes.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    device = next(model.parameters()).device
    language_model = llava_in(model).get_submodule(LANGUAGE_MODEL)
    mesh = init_device_mesh(device.type, (world_size(),))
    for layer in language_model.layers:
        linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        frozen = {linear.weight for linear in linears if not linear.weight.requires_grad}
        # The scales of 4-bit layers stay whole.
        states = {linear: linear.weight.quant_state for linear in linears if isinstance(linear, Linear4bit)}
        if isinstance(layer, FusedLayer):
            layer.parts.read_weights_anew()
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=set(layer.parameters()) - frozen)
        for linear, state in states.items():
            # Where checks look for it; bitsandbytes finds it in the module while the weight is gathered.
            linear.quant_state = linear.weight.quant_state = state
    fully_shard(language_model, mesh=mesh, ignored_params=set(language_model.parameters()))
