"""Assemble a LLaVA from a Llama-family language model, a CLIP vision tower and a new projector."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionModel,
    GenerationConfig,
    GgufConfig,
    LlavaConfig,
)
from transformers.image_processing_base import ImageProcessingMixin

from lora_llava.formats.llava_hf import WeightFiles, expected_shapes, meta_model, write_weights
from lora_llava.formats.names import canonical_name
from lora_llava.formats.processor import save_processor
from lora_llava.formats.transformers_4 import add_old_names
from lora_llava.modeling.metadata import hub_errors, part_configs, vision_tower_source
from lora_llava.modeling.structure import LANGUAGE_MODEL, LM_HEAD, PROJECTOR, VISION_TOWER
from lora_llava.recipe.settings import BaseModelSettings


def assemble(settings: BaseModelSettings, directory: Path, seed: int) -> None:
    """Write a LLaVA with a new projector to `directory`, in the llava-hf layout, with tokenizer and processor.

    Raises ModelError if a part cannot be loaded or has another architecture.
    """
    assert settings.language_model and settings.vision_tower
    # Before any weight is read: transformers would load a tower of another architecture and initialize what is missing.
    config, tokenizer, own_config = part_configs(settings)
    tower_source = vision_tower_source(settings.vision_tower)
    with hub_errors("language model", settings.language_model):
        language_model = AutoModelForCausalLM.from_pretrained(
            settings.language_model,
            # From a GGUF file, transformers would read it a second time, in several seconds.
            config=own_config,
            gguf_file=settings.gguf_file,
            dtype=torch.float32 if settings.gguf_file else "auto",
            quantization_config=GgufConfig(dequantize=True) if settings.gguf_file else None,
            trust_remote_code=False,
        )
    with hub_errors("vision tower", settings.vision_tower):
        tower = CLIPVisionModel.from_pretrained(tower_source, trust_remote_code=False)
        pixels, _ = ImageProcessingMixin.get_image_processor_dict(tower_source)
    state = _language_model_state(language_model, int(config.text_config.vocab_size))
    dtype = state[f"{LANGUAGE_MODEL}.embed_tokens.weight"].dtype
    for name, tensor in tower.state_dict().items():
        state[f"{VISION_TOWER}.{name}"] = tensor.to(dtype)
    projector = meta_model(config).get_submodule(PROJECTOR)
    embeddings = state[f"{LANGUAGE_MODEL}.embed_tokens.weight"] if settings.projector_init == "embeddings" else None
    for name, tensor in _fresh_projector(projector, config, seed, embeddings).items():
        state[f"{PROJECTOR}.{name}"] = tensor.to(dtype)
    directory.mkdir(parents=True, exist_ok=True)
    canonical = {canonical_name(name): tensor for name, tensor in state.items()}
    write_weights(directory, ((name, canonical[name]) for name in sorted(expected_shapes(config))))
    WeightFiles(directory).check(config)
    save_processor(directory, tokenizer, config, pixels)
    save_config(directory, config, dtype, _ends(language_model, tokenizer))


def save_config(directory: Path, config: LlavaConfig, dtype: torch.dtype, ends: Sequence[int] = ()) -> None:
    """Write config.json and generation_config.json of a model with weights in `dtype`.

    `ends`: ids of the tokens that end an answer; empty: those of `config`.
    """
    config.architectures = ["LlavaForConditionalGeneration"]
    config.dtype = dtype
    config.save_pretrained(directory)
    add_old_names(directory / "config.json")
    generation = GenerationConfig.from_model_config(config)
    if ends:
        generation.eos_token_id = list(ends) if len(ends) > 1 else ends[0]
    generation.save_pretrained(directory)


def _ends(language_model: Any, tokenizer: Any) -> list[int]:
    """Return the ids of the tokens that end an answer: the language model's and its tokenizer's."""
    stated = language_model.generation_config.eos_token_id
    ends = stated if isinstance(stated, list) else [stated]
    # A configuration without one defaults to id 2, which is a word in some vocabularies.
    special = [token for token in ends if token in tokenizer.added_tokens_decoder]
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys([*special, *own]))


def pad_rows(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Pad rows (vocabulary, width) to (`size`, width) with their mean, which makes no new token likely."""
    if rows.shape[0] >= size:
        return rows
    mean = rows.float().mean(dim=0, keepdim=True).to(rows.dtype)
    return torch.cat([rows, mean.expand(size - rows.shape[0], -1)])


def _language_model_state(language_model: nn.Module, vocabulary: int) -> dict[str, torch.Tensor]:
    """Return the language model's weights by their names in LLaVA, the vocabulary padded with the mean row."""
    state: dict[str, torch.Tensor] = {}
    for name, tensor in language_model.state_dict().items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensor = pad_rows(tensor, vocabulary)
        key = name if name.startswith(LM_HEAD) else f"{LANGUAGE_MODEL}.{name.removeprefix('model.')}"
        state[key] = tensor
    state.setdefault("lm_head.weight", state[f"{LANGUAGE_MODEL}.embed_tokens.weight"])
    return state


def _fresh_projector(
    shapes: nn.Module, config: LlavaConfig, seed: int, embeddings: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Initialize the projector as LLaVA-1.5 does, with `nn.Linear`'s default initialization.

    With `embeddings` (vocabulary, hidden size), `_match_embedding_statistics` then rescales its last layer. For
    `linear`, linear_2 is the identity and stays frozen: one trained linear map, in the layout of every LLaVA reader.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = {}
        for name in ("linear_1", "linear_2"):
            part = getattr(shapes, name)
            fresh[name] = nn.Linear(part.in_features, part.out_features, bias=part.bias is not None)
    if config.projector_hidden_act == "linear":
        nn.init.eye_(fresh["linear_2"].weight)
        if fresh["linear_2"].bias is not None:
            nn.init.zeros_(fresh["linear_2"].bias)
    if embeddings is not None:
        _match_embedding_statistics(embeddings.float(), fresh, config, seed)
    return {f"{name}.{key}": value for name, layer in fresh.items() for key, value in layer.state_dict().items()}


def _match_embedding_statistics(
    embeddings: torch.Tensor, fresh: dict[str, nn.Linear], config: LlavaConfig, seed: int
) -> None:
    """Rescale a new projector so that its outputs have the mean and spread of the word embeddings.

    Assumes inputs of unit variance. With image tokens far from the words, a small language model learns to name what
    the image shows, but not to relate it to the question.
    """
    inputs = torch.randn(4096, fresh["linear_1"].in_features, generator=torch.Generator().manual_seed(seed))
    linear = config.projector_hidden_act == "linear"
    last = fresh["linear_1" if linear else "linear_2"]
    with torch.no_grad():
        hidden = inputs if linear else nn.functional.gelu(fresh["linear_1"](inputs))
        last.weight.mul_(embeddings.std(dim=0).mean() / last(hidden).std(dim=0).mean())
        if last.bias is not None:
            last.bias.copy_(embeddings.mean(dim=0) - last.weight @ hidden.mean(dim=0))
