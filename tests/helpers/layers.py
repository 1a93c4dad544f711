"""Random LLaVAs of any width, in training mode on a stage: what the decoder layers compute is compared on them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from lora_llava.data.rows import Batch
from lora_llava.modeling.attention import set_attention
from lora_llava.modeling.base import dequantize, disable_cpu_repacking
from lora_llava.modeling.packed import llava_in
from lora_llava.modeling.stages import build_stage
from lora_llava.modeling.structure import LANGUAGE_MODEL, TREES
from lora_llava.recipe.settings import AdapterSettings
from lora_llava.recipe.stages import StageName
from tests.helpers.tiny import IMAGE_ID, NUM_IMAGE_TOKENS, VOCAB_SIZE, tiny_config
from tests.parity.test_packed import branches, row_of

RANK = 4


@dataclass(frozen=True, slots=True)
class Layers:
    """Decoder layers and how they are trained."""

    layers: int = 3
    width: int = 64
    intermediate: int = 176
    heads: int = 4
    key_value_heads: int = 4
    stage: StageName = "instruct"
    quantization: str = "nf4"
    """`nf4`, `dequantized` or `none`."""
    adapter: AdapterSettings = field(default_factory=lambda: AdapterSettings(r=RANK, lora_alpha=2.0 * RANK))
    dtype: torch.dtype = torch.float32
    text: dict[str, Any] = field(default_factory=dict)
    """More settings of the language model."""


def config_of(shapes: Layers) -> LlavaConfig:
    """Return the configuration of the model."""
    text = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=shapes.width,
        intermediate_size=shapes.intermediate,
        num_hidden_layers=shapes.layers,
        num_attention_heads=shapes.heads,
        num_key_value_heads=shapes.key_value_heads,
        **shapes.text,
    )
    return LlavaConfig(
        vision_config=tiny_config().vision_config,
        text_config=text,
        image_token_index=IMAGE_ID,
        image_seq_length=NUM_IMAGE_TOKENS,
        attn_implementation="sdpa",
    )


def training_model(shapes: Layers) -> Any:
    """Build the model of a stage, with PEFT's and transformers' layers; LoRA's B is not zero, no norm's weight is 1."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = LlavaForConditionalGeneration(config_of(shapes)).to(shapes.dtype)
    model.config.use_cache = False
    for name, parameter in model.get_submodule(LANGUAGE_MODEL).named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.8, 1.2, generator=generator)
    if shapes.quantization != "none":
        _quantize(model, shapes.dtype)
    if shapes.quantization == "dequantized":
        dequantize(model)
    wrapped = build_stage(model, shapes.stage, shapes.adapter)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=generator)
    set_attention(llava_in(wrapped), TREES)
    return wrapped.train()


def _quantize(model: Any, dtype: torch.dtype) -> None:
    """Replace the linear layers of the language model by NF4 ones with double quantization, as bitsandbytes does."""
    for name, module in list(model.get_submodule(LANGUAGE_MODEL).named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        packed = Linear4bit(
            module.in_features, module.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
        )
        packed.weight = Params4bit(
            module.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=packed
        ).to("cpu")
        model.set_submodule(f"{LANGUAGE_MODEL}.{name}", packed)
    disable_cpu_repacking(model)


def two_trees(dtype: torch.dtype = torch.float32) -> Batch:
    """Return a row of two images with several questions each."""
    return row_of([branches(3), branches(2, 3)], dtype)


def one_tree(dtype: torch.dtype = torch.float32) -> Batch:
    """Return a row of one conversation, whose attention is one causal call."""
    return row_of([branches(1)], dtype)
