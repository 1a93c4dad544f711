"""The language model as GGUF: architecture `llama` of llama.cpp.

Metadata keys and tensor names are those of the `gguf` library.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from gguf import MODEL_ARCH, Keys, TensorNameMap, get_tensor_name_map
from transformers import LlavaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lora_llava.errors import ModelError
from lora_llava.formats.llava_hf import expected_shapes
from lora_llava.formats.names import LANGUAGE_MODEL_PREFIX
from lora_llava.shipping.export.gguf.file import F32, Fields, OutType, Tensor, kind_of
from lora_llava.shipping.merge.stream import Read

ARCHITECTURE = "llama"

_AT_LEAST_8_BITS = ("token_embd.weight", "output.weight")


def gguf_name(canonical: str, config: LlavaConfig) -> str:
    """Return llama.cpp's name of a tensor of the language model; ModelError if it has none."""
    names = _names(int(config.text_config.num_hidden_layers))
    name = names.get_name(canonical.removeprefix(LANGUAGE_MODEL_PREFIX), try_suffixes=(".weight", ".bias"))
    if name is None:
        raise ModelError(f"{canonical}: llama.cpp's llama has no such tensor")
    return str(name)


@cache
def _names(blocks: int) -> TensorNameMap:
    return get_tensor_name_map(MODEL_ARCH.LLAMA, blocks)


def rotated_heads(canonical: str, config: LlavaConfig) -> int:
    """Return the number of heads of a query or key projection, whose rows ggml orders differently; else 0."""
    if ".self_attn.q_proj." in canonical:
        return int(config.text_config.num_attention_heads)
    return int(config.text_config.num_key_value_heads) if ".self_attn.k_proj." in canonical else 0


def text_fields(config: LlavaConfig) -> Fields:
    """Return the metadata of the language model's shape."""
    text = config.text_config
    rope = _rope(text)
    numbers = {
        Keys.LLM.VOCAB_SIZE: text.vocab_size,
        Keys.LLM.CONTEXT_LENGTH: text.max_position_embeddings,
        Keys.LLM.EMBEDDING_LENGTH: text.hidden_size,
        Keys.LLM.BLOCK_COUNT: text.num_hidden_layers,
        Keys.LLM.FEED_FORWARD_LENGTH: text.intermediate_size,
        Keys.Attention.HEAD_COUNT: text.num_attention_heads,
        Keys.Attention.HEAD_COUNT_KV: text.num_key_value_heads,
        Keys.Attention.KEY_LENGTH: _head_width(text),
        Keys.Attention.VALUE_LENGTH: _head_width(text),
        Keys.Rope.DIMENSION_COUNT: _head_width(text),
    }
    fields: Fields = {key: int(value) for key, value in numbers.items()}
    fields[Keys.Attention.LAYERNORM_RMS_EPS] = float(text.rms_norm_eps)
    fields[Keys.Rope.FREQ_BASE] = float(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        fields[Keys.Rope.SCALING_TYPE] = "linear"
        fields[Keys.Rope.SCALING_FACTOR] = float(rope["factor"])
    return {key.format(arch=ARCHITECTURE): value for key, value in fields.items()}


def _head_width(text: Any) -> int:
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _rope(text: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, **(text.rope_parameters or {})}


def _frequency_factors(text: Any) -> torch.Tensor:
    """Return the factor by which Llama 3.1 lowers each rotary frequency, (head width / 2,)."""
    lowered, _ = ROPE_INIT_FUNCTIONS["llama3"](text, torch.device("cpu"))
    width = _head_width(text)
    unscaled = 1.0 / _rope(text)["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    factors: torch.Tensor = unscaled / lowered
    return factors


def text_tensors(config: LlavaConfig, read: Read, outtype: OutType) -> list[Tensor]:
    """List the tensors of the language model; without a tied lm_head, as llama.cpp expects.

    `read`: reads a weight by its canonical name.
    """
    tensors = []
    for name, shape in expected_shapes(config).items():
        if not name.startswith(LANGUAGE_MODEL_PREFIX):
            continue
        stored_name = gguf_name(name, config)
        kind = kind_of(shape, outtype, keep_8_bits=stored_name in _AT_LEAST_8_BITS)
        tensors.append(Tensor(stored_name, shape, kind, partial(read, name), rotated_heads(name, config)))
    if _rope(config.text_config)["rope_type"] == "llama3":
        factors = _frequency_factors(config.text_config)
        tensors.append(Tensor("rope_freqs.weight", tuple(factors.shape), F32, lambda: factors))
    return tensors
