"""Configurations of real models, without weights."""

from __future__ import annotations

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig


def llava_7b(layers: int = 32) -> LlavaConfig:
    """LLaVA-1.5-7B's shapes."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    return LlavaConfig(vision_config=vision, text_config=LlamaConfig(num_hidden_layers=layers, vocab_size=32064))


def llava_13b() -> LlavaConfig:
    """LLaVA-1.5-13B's shapes."""
    config = llava_7b()
    config.text_config = LlamaConfig(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, vocab_size=32064
    )
    return config
