"""Run a model larger than memory: each decoder layer is read before its forward pass and freed after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.initialization import no_init_weights
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

ReadParameter = Callable[[str, torch.Tensor], torch.Tensor]
"""Reads the values of a parameter, given its name in the model and the parameter itself (for its shape)."""


def empty_llava(config: LlavaConfig) -> LlavaForConditionalGeneration:
    """Build a LLaVA with parameters on the meta device; buffers are computed as usual."""
    config._attn_implementation = "sdpa"
    # To draw random values for parameters without memory takes most of the time.
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = LlavaForConditionalGeneration(config)
        # The initialization that was left out would have done this.
        model.tie_weights()
    return model.eval()


def stream_weights(model: Any, read: ReadParameter) -> None:
    """Make `model` (an empty LLaVA, or PEFT around one) compute with the weights that `read` returns, in fp32.

    A decoder layer is filled before its forward pass and emptied after it; everything else is filled now and stays.
    For inference only.
    """
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, LlamaDecoderLayer)}
    for name, block in blocks.items():
        block.register_forward_pre_hook(_filler(name, read))
        block.register_forward_hook(_empty)
    inside = tuple(f"{name}." for name in blocks)
    for name, module in model.named_modules():
        if not f"{name}.".startswith(inside):
            _fill(name, module, read)


def _fill(name: str, module: nn.Module, read: ReadParameter) -> None:
    """Fill the parameters of a module, without those of its children."""
    for key, parameter in module._parameters.items():
        if parameter is not None:
            values = read(f"{name}.{key}", parameter).float().reshape(parameter.shape)
            module._parameters[key] = nn.Parameter(values, requires_grad=False)


def _filler(name: str, read: ReadParameter) -> Callable[[nn.Module, Any], None]:
    def fill(block: nn.Module, _: Any) -> None:
        for path, module in block.named_modules():
            _fill(f"{name}.{path}" if path else name, module, read)

    return fill


def _empty(block: nn.Module, _inputs: Any, _output: Any) -> None:
    for module in block.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = nn.Parameter(parameter.to("meta"), requires_grad=False)
