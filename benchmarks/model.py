"""The model that every peer trains: a LLaVA with random weights, its language model in 4 bits if asked."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from benchmarks.work import IMAGE_ID, Shapes
from lora_llava.modeling.base import dequantize, quantize
from lora_llava.modeling.stages import build_stage
from lora_llava.recipe.settings import AdapterSettings
from lora_llava.recipe.stages import StageName


def make_config(shapes: Shapes) -> LlavaConfig:
    """Write the configuration of a LLaVA of these shapes."""
    vision = CLIPVisionConfig(
        hidden_size=shapes.vision_hidden_size,
        intermediate_size=4 * shapes.vision_hidden_size,
        num_hidden_layers=shapes.vision_layers,
        num_attention_heads=max(1, shapes.vision_hidden_size // 64),
        image_size=shapes.image_size,
        patch_size=shapes.patch_size,
    )
    text = LlamaConfig(
        hidden_size=shapes.hidden_size,
        intermediate_size=shapes.intermediate_size,
        num_hidden_layers=shapes.num_layers,
        num_attention_heads=shapes.num_heads,
        num_key_value_heads=shapes.num_heads,
        vocab_size=shapes.vocab_size,
    )
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_ID, attn_implementation="sdpa")


def build_model(
    shapes: Shapes,
    stage: StageName,
    device: torch.device,
    dtype: torch.dtype,
    *,
    nf4: bool,
    dequantized: bool = False,
    seed: int = 0,
) -> Any:
    """Build it on `device`, its LoRA and its projector to train; what is trained is in fp32."""
    torch.manual_seed(seed)
    # On the CPU the numbers are the same for all; a large model is made where it is needed, each peer by the same seed.
    with torch.device(device):
        model = LlavaForConditionalGeneration(make_config(shapes)).to(dtype)
    model.config.use_cache = False
    if nf4:
        quantize(model, double_quant=True, dtype=dtype)
        if dequantized:
            dequantize(model)
        model.is_loaded_in_4bit = not dequantized
    wrapped = build_stage(model, stage, AdapterSettings(r=shapes.rank, lora_alpha=2.0 * shapes.rank))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        # Not zero: else the gradients of A would be, and a peer that forgot them would not be noticed.
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).mul_(0.02).to(device)
    return wrapped.to(device)
