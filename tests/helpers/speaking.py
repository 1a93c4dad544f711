"""Models that say what a test tells them to: each token is followed by one that was chosen for it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from lora_llava.artifact import save_artifact
from lora_llava.conversation.encode import ImageTokens, Turn, encode_prompt
from lora_llava.conversation.templates import Template
from lora_llava.formats.processor import save_processor
from lora_llava.modeling.base import BaseIdentity, hash_weights, load_base
from lora_llava.modeling.stages import build_stage
from lora_llava.recipe.settings import AdapterSettings
from tests.helpers.artifacts import CPU, facts
from tests.helpers.tiny import IMAGE_MEAN, IMAGE_STD, NUM_IMAGE_TOKENS, tiny_config

QUESTION = "What is it?"


def prompt_of(template: Template, tokenizer: Any, *, with_image: bool = True) -> list[int]:
    """Encode the question as a user asks it."""
    turns = [Turn("user", f"<image>\n{QUESTION}" if with_image else QUESTION)]
    image = tokenizer.convert_tokens_to_ids("<image>")
    sizes: dict[str, Any] = {"image_tokens": ImageTokens(image, NUM_IMAGE_TOKENS), "where": "a question"}
    return encode_prompt(turns, template, tokenizer, **sizes).input_ids


def chain_of(template: Template, tokenizer: Any, end: int) -> list[int]:
    """Tokens that the model says one after the other: an answer, its end, and what must not be said."""
    words = [index for index in range(20, 280) if tokenizer.decode([index]).isalpha()][:5]
    return [prompt_of(template, tokenizer)[-1], words[0], words[1], end, words[2], words[3], words[4]]


def write_base(directory: Path, tokenizer: Any, own_end: int) -> Path:
    """A LLaVA whose layers add nothing, so that each token is followed by the one whose row of the head is its own."""
    config = tiny_config()
    config.text_config.vocab_size = -(-len(tokenizer) // 64) * 64
    config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")
    config.text_config.eos_token_id = own_end
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
        words = model.get_input_embeddings().weight
        words.data = torch.nn.functional.normalize(torch.randn_like(words), dim=1)
    for name, parameter in model.named_parameters():
        if "o_proj" in name or "down_proj" in name or "linear_2" in name:
            parameter.data.zero_()
    model.model.multi_modal_projector.linear_2.bias.data = words.data[config.image_token_index].clone()
    model.save_pretrained(directory)
    save_processor(directory, tokenizer, config, {"image_mean": IMAGE_MEAN, "image_std": IMAGE_STD})
    return directory


def say(base: Path, chain: list[int]) -> None:
    """Give the head the rows that make the base say this."""
    state = load_file(base / "model.safetensors")
    [words] = [tensor for name, tensor in state.items() if name.endswith("embed_tokens.weight")]
    head = torch.zeros_like(words)
    for token, after in pairwise(chain):
        head[after] = words[token]
    [name] = [name for name in state if name.endswith("lm_head.weight")]
    save_file({**state, name: head}, base / "model.safetensors", metadata={"format": "pt"})


def write_artifact(base: Path, directory: Path, template: str) -> Path:
    """Save an artifact that changes nothing of what its base says."""
    identity = BaseIdentity("base", None, hash_weights(base))
    loaded = load_base(base, identity, nf4=False, double_quant=True, dtype=torch.float32, device=CPU)
    loaded.model = build_stage(loaded.model, "instruct", AdapterSettings(r=4, lora_alpha=8.0))
    made = facts("instruct", nf4=False) | {"template": {"name": template, "system": None}}
    save_artifact(directory, loaded, made, "version: 1\n")
    return directory
