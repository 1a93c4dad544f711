"""Fold an adapter into the weights of its base, to answer many questions with it.

W x + s B A x becomes (W + s B A) x, which differs by rounding alone: in fp32 by about 1e-7, as a merged model does. In
bf16 the sum would round away small changes, so there the adapter stays separate.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from lora_llava.modeling.packed import llava_in
from lora_llava.modeling.structure import LANGUAGE_MODEL


def can_fold(model: Any) -> bool:
    """Tell whether `model` has plain LoRA on linear layers in fp32: no DoRA, no bias of its own, not in 4 bits."""
    layers = _adapted_layers(model)
    bases = [layer.get_base_layer() for layer in layers]
    return (
        bool(layers)
        and all(type(base) is nn.Linear and base.weight.dtype == torch.float32 for base in bases)
        and not any(layer.lora_variant or any(layer.lora_bias.values()) for layer in layers)
    )


@contextmanager
def folded(model: Any) -> Iterator[None]:
    """Compute with the active adapter in the weights inside the `with` block, if `can_fold`; else change nothing.

    The weights are restored up to rounding. LoRA outside of the decoder layers stays separate: an embedding and a head
    may share one weight.
    """
    layers = _adapted_layers(model) if can_fold(model) else []
    for layer in layers:
        layer.merge()
    try:
        yield
    finally:
        for layer in layers:
            layer.unmerge()


def _adapted_layers(model: Any) -> list[Any]:
    """Return the layers with LoRA in the decoder layers of a LLaVA, or of a PeftModel around one."""
    decoder = llava_in(model).get_submodule(LANGUAGE_MODEL).layers
    return [module for module in decoder.modules() if isinstance(module, LoraLayer)]
