"""The language model as GGUF: `llama` of llama.cpp.

Keys and tensor names: the GGUF specification, and `llama-arch.cpp` of llama.cpp.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlavaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lora_llava.errors import ModelError
from lora_llava.formats.llava_hf import WeightFiles, expected_shapes
from lora_llava.shipping.export.gguf.file import F32, Fields, OutType, Tensor, integer, kind_of, real, string

ARCHITECTURE = "llama"

_LANGUAGE = "language_model."
_LAYER = "language_model.model.layers."
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_SPARED = ("token_embd.weight", "output.weight")


def gguf_name(canonical: str) -> str:
    """Spell the canonical name of a tensor of the language model as llama.cpp does; ModelError if it has no place."""
    module, _, kind = canonical.rpartition(".")
    if module.startswith(_LAYER):
        number, _, part = module.removeprefix(_LAYER).partition(".")
        if part in _IN_LAYER:
            return f"blk.{number}.{_IN_LAYER[part]}.{kind}"
    elif (part := module.removeprefix(_LANGUAGE)) in _WHOLE:
        return f"{_WHOLE[part]}.{kind}"
    raise ModelError(f"{canonical}: llama.cpp's llama has no such tensor")


def rotated_heads(canonical: str, config: LlavaConfig) -> int:
    """Return the number of heads of a query or key projection, whose rows ggml wants in another order; else 0."""
    if ".self_attn.q_proj." in canonical:
        return int(config.text_config.num_attention_heads)
    return int(config.text_config.num_key_value_heads) if ".self_attn.k_proj." in canonical else 0


def text_fields(config: LlavaConfig) -> Fields:
    """Metadata of the language model's shape. Raises ModelError for what llama.cpp's llama does not compute."""
    text = config.text_config
    if text.hidden_act != "silu":
        raise ModelError(f"hidden_act {text.hidden_act!r}: llama.cpp's llama knows silu alone")
    rope = _rope(text)
    numbers = {
        "vocab_size": text.vocab_size,
        "context_length": text.max_position_embeddings,
        "embedding_length": text.hidden_size,
        "block_count": text.num_hidden_layers,
        "feed_forward_length": text.intermediate_size,
        "attention.head_count": text.num_attention_heads,
        "attention.head_count_kv": text.num_key_value_heads,
        "attention.key_length": _head_width(text),
        "attention.value_length": _head_width(text),
        "rope.dimension_count": _head_width(text),
    }
    fields: Fields = {f"{ARCHITECTURE}.{key}": integer(value) for key, value in numbers.items()}
    fields[f"{ARCHITECTURE}.attention.layer_norm_rms_epsilon"] = real(text.rms_norm_eps)
    fields[f"{ARCHITECTURE}.rope.freq_base"] = real(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        fields[f"{ARCHITECTURE}.rope.scaling.type"] = string("linear")
        fields[f"{ARCHITECTURE}.rope.scaling.factor"] = real(rope["factor"])
    return fields


def _head_width(text: Any) -> int:
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _rope(text: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, **(text.rope_parameters or {})}
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise ModelError(f"rope_type {rope['rope_type']!r}: GGUF is written for default, linear and llama3 alone")
    return rope


def _slower_frequencies(text: Any) -> torch.Tensor:
    """By how much Llama 3.1 slows each rotary frequency, (head width / 2,)."""
    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](text, torch.device("cpu"))
    width = _head_width(text)
    plain = 1.0 / _rope(text)["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    factors: torch.Tensor = plain / slowed
    return factors


def text_tensors(config: LlavaConfig, files: WeightFiles, outtype: OutType) -> list[Tensor]:
    """List the tensors of the language model; a head that is tied to the embeddings is left out, as llama.cpp does."""
    tensors = []
    for name, shape in expected_shapes(config).items():
        if not name.startswith(_LANGUAGE):
            continue
        place = gguf_name(name)
        kind = kind_of(shape, outtype, keep_8_bits=place in _SPARED)
        tensors.append(Tensor(place, shape, kind, _reader(files, name), rotated_heads(name, config)))
    if _rope(config.text_config)["rope_type"] == "llama3":
        factors = _slower_frequencies(config.text_config)
        tensors.append(Tensor("rope_freqs.weight", tuple(factors.shape), F32, lambda: factors))
    return tensors


def _reader(files: WeightFiles, name: str) -> Any:
    return lambda: files.read(name)
