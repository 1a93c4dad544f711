"""Activation checkpointing of the decoder layers: none, selective or full.

From fastest to smallest: keep every activation; *selective*: keep the results of matmuls and attention, and recompute
the cheap rest; *full*: keep only the input of a layer. All give the same gradients, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from lora_llava.modeling.fused.layer import FusedLayer
from lora_llava.modeling.packed import llava_in
from lora_llava.modeling.structure import LANGUAGE_MODEL
from lora_llava.recipe.stages import GradientCheckpointing

_MATMULS = {"aten::mm", "aten::addmm", "aten::bmm", "bitsandbytes::gemm_4bit"}
_ATTENTION = "aten::_scaled_dot_product_"

_FUNCTION = "_gradient_checkpointing_func"
"""Attribute of transformers' layers: what checkpoints them."""
_NARROW_RATIO = 16
"""Matmuls more skewed than this are recomputed: LoRA's B has an output as large as the layer's at 1/30 of the cost."""


def set_recompute(model: Any, policy: GradientCheckpointing, full_layers: int = 0) -> None:
    """Set the policy of the language model's layers; with `selective`, the first `full_layers` are checkpointed fully.

    The vision tower needs none: it is frozen, so it keeps no activations. The last layer needs none: the backward pass
    starts with it, while all other activations still exist, so recomputing it would not lower the peak. Fused layers
    are checkpointed fully or not at all: they keep no more than the selective policy does.
    """
    *layers, last = llava_in(model).get_submodule(LANGUAGE_MODEL).layers
    last.gradient_checkpointing = False
    for number, layer in enumerate(layers):
        in_full = policy is True or (policy == "selective" and number < full_layers)
        in_part = policy == "selective" and not in_full and not isinstance(layer, FusedLayer)
        # The two attributes that transformers' GradientCheckpointingLayer reads.
        layer.gradient_checkpointing = in_full or in_part
        if in_full:
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        elif in_part:
            contexts = partial(create_selective_checkpoint_contexts, _keep_expensive)
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, context_fn=contexts)


@contextmanager
def recomputed_in_full(model: Any) -> Iterator[None]:
    """Checkpoint layers fully inside the `with` block."""
    layers = list(llava_in(model).get_submodule(LANGUAGE_MODEL).layers)
    before = [(layer.gradient_checkpointing, getattr(layer, _FUNCTION, None)) for layer in layers]
    set_recompute(model, True)
    try:
        yield
    finally:
        for layer, (is_on, function) in zip(layers, before, strict=True):
            layer.gradient_checkpointing = is_on
            setattr(layer, _FUNCTION, function)


def _keep_expensive(_context: Any, operator: Any, *args: Any, **_options: Any) -> CheckpointPolicy:
    name = operator.name().split(".")[0]
    if name.startswith(_ATTENTION) or (name in _MATMULS and not _is_narrow(name, args)):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _is_narrow(name: str, args: tuple[Any, ...]) -> bool:
    """Tell LoRA's matmuls from others by the shape (K, N) of the right factor."""
    if name == "bitsandbytes::gemm_4bit":
        return False
    right: torch.Tensor = args[2 if name == "aten::addmm" else 1]
    inner, outer = right.shape[-2:]
    return min(inner, outer) * _NARROW_RATIO <= max(inner, outer)
