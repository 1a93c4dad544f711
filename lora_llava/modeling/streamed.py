"""A model larger than the memory: each block of the language model is read for its own pass and then let go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

ReadParameter = Callable[[str, torch.Tensor], torch.Tensor]
"""Gives the values of a parameter by its name in the model, and the parameter (for its shape)."""


def empty_llava(config: LlavaConfig) -> LlavaForConditionalGeneration:
    """Build a LLaVA whose parameters have shapes but no memory; buffers are computed as usual."""
    config._attn_implementation = "sdpa"
    with init_empty_weights(include_buffers=False):
        model = LlavaForConditionalGeneration(config)
    return model.eval()


def stream_weights(model: Any, read: ReadParameter) -> None:
    """Fill `model` (a LLaVA, or PEFT around one, made empty) with what `read` gives, in fp32.

    Everything but the language model's blocks is filled now and stays; a block is filled before its forward
    pass and emptied after it. For inference only.
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
    """Fill a module's own parameters."""
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
