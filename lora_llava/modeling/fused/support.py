"""Which decoder layers can be fused: those whose every part is known. Anything else takes PEFT's path."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

_CHILDREN = {
    "": {"self_attn": LlamaAttention, "mlp": LlamaMLP}
    | dict.fromkeys(("input_layernorm", "post_attention_layernorm"), LlamaRMSNorm),
    "self_attn": dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), nn.Module),
    "mlp": dict.fromkeys(("gate_proj", "up_proj", "down_proj"), nn.Module) | {"act_fn": (nn.SiLU, SiLUActivation)},
}
"""Modules of a layer and their types, by parent. A module that transformers adds is not in the fused mathematics."""


def why_not_fused(layer: Any) -> str | None:
    """Return why a decoder layer cannot be fused, for the log; None if it can."""
    if type(layer) is not LlamaDecoderLayer:
        return f"layers of type {type(layer).__name__}"
    for parent, expected in _CHILDREN.items():
        children = dict(layer.get_submodule(parent).named_children())
        if unknown := children.keys() ^ expected.keys():
            return f"a {parent or 'layer'} with other modules than Llama's: {', '.join(sorted(unknown))}"
        for name, types in expected.items():
            if not isinstance(children[name], types):
                return f"{name} of type {type(children[name]).__name__}"
    dtype = layer.input_layernorm.weight.dtype
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"weights in {dtype}"
    if layer.self_attn.attention_dropout:
        return "dropout in attention"
    linears = [layer.self_attn.get_submodule(name) for name in _CHILDREN["self_attn"]]
    linears += [child for name, child in layer.mlp.named_children() if name != "act_fn"]
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    reasons = [_not_fused_linear(linear, dtype) for linear in linears] + [_not_frozen(norm, dtype) for norm in norms]
    return next(filter(None, reasons), None)


def _not_fused_linear(module: Any, dtype: torch.dtype) -> str | None:
    """Return why a linear layer, or PEFT's around one, cannot be fused."""
    if hasattr(module, "base_layer"):
        return _not_fused_adapter(module) or _not_fused_linear(module.base_layer, dtype)
    if type(module) not in (nn.Linear, Linear4bit):
        return f"linear layers of type {type(module).__name__}"
    if module.bias is not None:
        return "linear layers with a bias"
    if type(module) is Linear4bit:
        return None if module.compute_dtype == dtype else f"4-bit weights that compute in {module.compute_dtype}"
    return _not_frozen(module, dtype)


def _not_frozen(module: Any, dtype: torch.dtype) -> str | None:
    if module.weight.requires_grad:
        return "trained base weights"
    return None if module.weight.dtype == dtype else f"weights in {module.weight.dtype} and {dtype}"


def _not_fused_adapter(module: Any) -> str | None:
    """Return why a LoRA layer cannot be fused."""
    if type(module) not in (LoraLinear, LoraLinear4bit):
        return f"adapters of type {type(module).__name__}"
    if len(module.active_adapters) != 1 or module.active_adapters[0] not in module.lora_A:
        return "other than one adapter"
    [adapter] = module.active_adapters
    if module.lora_variant.get(adapter) is not None:
        # DoRA is one.
        return f"{type(module.lora_variant[adapter]).__name__} instead of plain LoRA"
    if type(module.lora_dropout[adapter]) not in (nn.Dropout, nn.Identity):
        return f"dropout of type {type(module.lora_dropout[adapter]).__name__}"
    if module.lora_bias.get(adapter) or module.fan_in_fan_out:
        return "LoRA with a bias or transposed weights"
    return None
