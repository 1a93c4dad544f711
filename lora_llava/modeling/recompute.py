"""What the backward pass of a decoder layer finds kept, and what it computes again.

Three ways, from fast to small: keep everything; *selective*, keep what is dear to compute (matrix products, attention)
and compute the cheap rest again; *full*, keep a layer's input alone. The gradients are the same to the bit.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from lora_llava.modeling.packed import llava_in
from lora_llava.modeling.structure import LANGUAGE_MODEL
from lora_llava.recipe.stages import GradientCheckpointing

_PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "bitsandbytes::gemm_4bit"}
_ATTENTION = "aten::_scaled_dot_product_"

NARROW = 16
"""A product with one dimension so many times smaller than the other is computed again: LoRA's A and B, of which the
second's output is as large as the layer's own at a thirtieth of its price."""


def set_recompute(model: Any, policy: GradientCheckpointing, full_layers: int = 0) -> None:
    """Set the policy on the language model's layers; with `selective`, the first `full_layers` are done in full.

    The vision tower needs none: it is frozen, so nothing of it is kept. The last layer has none: its backward pass
    comes first, when all that is kept is still there, so computing it again would save nothing.
    """
    *layers, last = llava_in(model).get_submodule(LANGUAGE_MODEL).layers
    last.gradient_checkpointing = False
    for number, layer in enumerate(layers):
        # How transformers' GradientCheckpointingLayer is switched on.
        layer.gradient_checkpointing = policy is not False
        if policy is True or (policy == "selective" and number < full_layers):
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        elif policy == "selective":
            contexts = partial(create_selective_checkpoint_contexts, _keep_what_is_dear)
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, context_fn=contexts)


def _keep_what_is_dear(_context: Any, operator: Any, *args: Any, **_options: Any) -> CheckpointPolicy:
    name = operator.name().split(".")[0]
    if name.startswith(_ATTENTION) or (name in _PRODUCTS and not _is_narrow(name, args)):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _is_narrow(name: str, args: tuple[Any, ...]) -> bool:
    """Tell LoRA's products by the shape (K, N) of the right factor."""
    if name == "bitsandbytes::gemm_4bit":
        return False
    right: torch.Tensor = args[2 if name == "aten::addmm" else 1]
    inner, outer = right.shape[-2:]
    return min(inner, outer) * NARROW <= max(inner, outer)
