"""A fresh LLaVA from its parts: a Llama-family language model, a CLIP vision tower and a new projector."""

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
from lora_llava.modeling.metadata import hub_errors, part_configs, vision_tower_source
from lora_llava.modeling.structure import LANGUAGE_MODEL, LM_HEAD, PROJECTOR, VISION_TOWER
from lora_llava.recipe.settings import BaseModelSettings


def assemble(settings: BaseModelSettings, directory: Path, seed: int) -> None:
    """Write a LLaVA with a fresh projector to `directory`, in the llava-hf layout, with tokenizer and processor.

    Raises ModelError if a part cannot be had or is of another architecture.
    """
    assert settings.language_model and settings.vision_tower
    # Before any weight is read: transformers would load a tower of another architecture, and make up what is missing.
    config, tokenizer = part_configs(settings)
    tower_source = vision_tower_source(settings.vision_tower)
    with hub_errors("language model", settings.language_model):
        language_model = AutoModelForCausalLM.from_pretrained(
            settings.language_model,
            gguf_file=settings.gguf_file,
            dtype=torch.float32 if settings.gguf_file else "auto",
            quantization_config=GgufConfig(dequantize=True) if settings.gguf_file else None,
        )
    with hub_errors("vision tower", settings.vision_tower):
        tower = CLIPVisionModel.from_pretrained(tower_source)
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
    """Write config.json and generation_config.json of a model whose weights are of `dtype`.

    `ends` are the tokens that end an answer; without any, those of `config`.
    """
    config.architectures = ["LlavaForConditionalGeneration"]
    config.dtype = dtype
    config.save_pretrained(directory)
    generation = GenerationConfig.from_model_config(config)
    if ends:
        generation.eos_token_id = list(ends) if len(ends) > 1 else ends[0]
    generation.save_pretrained(directory)


def _ends(language_model: Any, tokenizer: Any) -> list[int]:
    """Return the end tokens of a language model: those it states, and its tokenizer's."""
    stated = language_model.generation_config.eos_token_id
    ends = stated if isinstance(stated, list) else [stated]
    # A configuration that states none has 2 by default, in some vocabularies a word.
    special = [one for one in ends if one in tokenizer.added_tokens_decoder]
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys([*special, *own]))


def pad_rows(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Add rows (vocabulary, width) up to `size`: the mean of those there are, which no output prefers."""
    if rows.shape[0] >= size:
        return rows
    mean = rows.float().mean(dim=0, keepdim=True).to(rows.dtype)
    return torch.cat([rows, mean.expand(size - rows.shape[0], -1)])


def _language_model_state(language_model: nn.Module, vocabulary: int) -> dict[str, torch.Tensor]:
    """Rename the language model's weights to their place in LLaVA, the vocabulary padded with the mean row."""
    state: dict[str, torch.Tensor] = {}
    for name, tensor in language_model.state_dict().items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensor = pad_rows(tensor, vocabulary)
        place = name if name.startswith(LM_HEAD) else f"{LANGUAGE_MODEL}.{name.removeprefix('model.')}"
        state[place] = tensor
    state.setdefault("lm_head.weight", state[f"{LANGUAGE_MODEL}.embed_tokens.weight"])
    return state


def _fresh_projector(
    shapes: nn.Module, config: LlavaConfig, seed: int, embeddings: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Initialise the projector as LLaVA-1.5 does (`nn.Linear`'s own initialisation).

    With `embeddings` (vocabulary, hidden size) its last layer is then moved: see `_move_among`.

    For `linear`, linear_2 is the identity and stays frozen: one trained linear map in a layout that every
    reader of LLaVA knows.
    """
    generator = torch.random.fork_rng(devices=[])
    with generator:
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
        _move_among(embeddings.float(), fresh, config, seed)
    return {f"{name}.{key}": value for name, layer in fresh.items() for key, value in layer.state_dict().items()}


def _move_among(embeddings: torch.Tensor, fresh: dict[str, nn.Linear], config: LlavaConfig, seed: int) -> None:
    """Give the outputs of a fresh projector the mean and the spread of the language model's word embeddings.

    What comes in is taken to have unit spread. Far from the words, a small language model reads an image token but
    does not work on it: it learns to name what it sees and not to compare it with what it is asked.
    """
    inputs = torch.randn(4096, fresh["linear_1"].in_features, generator=torch.Generator().manual_seed(seed))
    linear = config.projector_hidden_act == "linear"
    last = fresh["linear_1" if linear else "linear_2"]
    with torch.no_grad():
        hidden = inputs if linear else nn.functional.gelu(fresh["linear_1"](inputs))
        last.weight.mul_(embeddings.std(dim=0).mean() / last(hidden).std(dim=0).mean())
        if last.bias is not None:
            last.bias.copy_(embeddings.mean(dim=0) - last.weight @ hidden.mean(dim=0))
