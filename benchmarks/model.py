"""The model that every peer trains: a LLaVA with random weights, its language model in 4 bits if asked."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
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
    """Build the model on `device`; the trained weights, LoRA and projector, are fp32."""
    torch.manual_seed(seed)
    # The same weights for each trainer, in the dtype that it computes in: in fp32 a 7B takes 27 GB.
    with torch.device(device), _default_dtype(dtype):
        model = LlavaForConditionalGeneration(make_config(shapes))
    model.config.use_cache = False
    if nf4:
        quantize(model, double_quant=True, dtype=dtype)
        if dequantized:
            dequantize(model)
        model.is_loaded_in_4bit = not dequantized
    wrapped = build_stage(model, stage, AdapterSettings(r=shapes.rank, lora_alpha=2.0 * shapes.rank))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        # Not zero: otherwise the gradients of A would be zero, and a trainer that forgets them would go unnoticed.
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).mul_(0.02).to(device)
    return wrapped.to(device)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class ReusedModel:
    """Builds the model of a process once, and resets its trained weights for each trainer that uses it."""

    def __init__(self) -> None:
        self.key: Hashable = None
        self.model: Any = None
        self.start: dict[str, torch.Tensor] = {}

    def get(self, key: Hashable, build: Callable[[], Any]) -> Any:
        """Return the model that `build` makes; `key`: all that it depends on."""
        if self.key != key:
            self.key = self.model = None
            self.start.clear()
            release_memory()
            self.model, self.key = build(), key
            self.start = {name: weight.detach().cpu().clone() for name, weight in self._trained()}
        with torch.no_grad():
            for name, parameter in self._trained():
                parameter.copy_(self.start[name])
                parameter.grad = None
        return self.model

    def _trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return ((name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad)


def release_memory() -> None:
    """Free the memory that no tensor uses."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
