"""The shape of a LLaVA and of each of its tensors, from its config.json and the defaults of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from lora_llava.formats.names import EMBEDDINGS, HEAD, LAYERS_PREFIX, PROJECTOR_PREFIX

_TEXT_DEFAULTS: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
"""`LlamaConfig` of transformers; llava-hf's config.json leaves most of it out."""
_VISION_DEFAULTS: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
}
"""`CLIPVisionConfig` of transformers."""
_LLAVA_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
"""Sizes that `LlavaConfig` assumes without any `vision_config`."""
_LLAVA_DEFAULTS: dict[str, Any] = {
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
    "vision_feature_layer": -2,
    "multimodal_projector_bias": True,
    "tie_word_embeddings": False,
}

Shape = tuple[int, ...]
_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEAR_LAYERS = (*_ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
"""The linear layers of a Llama's decoder layer, by their names in it."""


@dataclass(frozen=True, slots=True)
class LlavaShape:
    """Configurations of a LLaVA and its parts, with every default filled in."""

    whole: dict[str, Any]
    text: SimpleNamespace
    """With attributes named as those of `LlamaConfig`."""
    vision: dict[str, Any]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> LlavaShape:
        """Read the config.json of a LLaVA."""
        vision = config.get("vision_config")
        whole = {**_LLAVA_DEFAULTS, **config}
        if "image_token_id" in config:
            whole["image_token_index"] = config["image_token_id"]
        return cls(
            whole, text_config(config.get("text_config")), vision_config(_LLAVA_VISION if vision is None else vision)
        )

    @property
    def tied(self) -> bool:
        """Whether the head is the embeddings; it is then not stored."""
        return bool(self.whole["tie_word_embeddings"] or self.text.tie_word_embeddings)

    @property
    def num_image_tokens(self) -> int:
        """Tokens that represent one image."""
        patches = (int(self.vision["image_size"]) // int(self.vision["patch_size"])) ** 2
        return patches + (1 if self.whole["vision_feature_select_strategy"] == "full" else 0)

    def tensors(self) -> Iterator[tuple[str, Shape]]:
        """Yield canonical name and shape of every tensor on disk."""
        for name, shape in text_tensors(self.text):
            if name != HEAD or not self.tied:
                yield name, shape
        yield from tower_tensors(self.vision)
        yield from self.projector()

    def projector(self) -> Iterator[tuple[str, Shape]]:
        """Yield canonical name and shape of the projector's tensors."""
        layers = self.whole["vision_feature_layer"]
        seen = int(self.vision["hidden_size"]) * (len(layers) if isinstance(layers, list) else 1)
        width = int(self.text.hidden_size)
        for name, inputs in (("linear_1", seen), ("linear_2", width)):
            yield f"{PROJECTOR_PREFIX}{name}.weight", (width, inputs)
            if self.whole["multimodal_projector_bias"]:
                yield f"{PROJECTOR_PREFIX}{name}.bias", (width,)


def hidden_state_index(layer: int, num_layers: int) -> int:
    """Return the index, from the front, of the hidden state that `vision_feature_layer` names in a tower.

    Hidden state 0 is that of the embeddings. An index from the front stays valid when later layers are dropped.
    """
    return layer if layer >= 0 else num_layers + 1 + layer


def used_layers(layer: int, num_layers: int) -> int:
    """Count the vision tower's layers up to the one whose output is projected; the layers after it are dropped."""
    # transformers reads 0 as "no hidden states".
    return hidden_state_index(layer, num_layers) or num_layers


def misfits(actual: Mapping[str, Shape], expected: Mapping[str, Shape]) -> Iterator[str]:
    """Yield which tensors are missing, unexpected, or of another shape; both by canonical name."""
    yield from (f"{name} is missing" for name in expected if name not in actual)
    yield from (f"{name} does not belong to it" for name in actual if name not in expected)
    for name, shape in expected.items():
        if actual.get(name, shape) != shape:
            yield f"{name} is {actual[name]}, must be {shape}"


def text_config(data: Mapping[str, Any] | None) -> SimpleNamespace:
    """Fill in the defaults of a language model's configuration."""
    config = {**_TEXT_DEFAULTS, **(data or {})}
    config["num_key_value_heads"] = config.get("num_key_value_heads") or config["num_attention_heads"]
    config["head_dim"] = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return SimpleNamespace(**config)


def vision_config(data: Mapping[str, Any] | None) -> dict[str, Any]:
    """Fill in the defaults of a vision tower's configuration; of a whole CLIP, use that of its tower."""
    data = data or {}
    return {**_VISION_DEFAULTS, **(data.get("vision_config") or data)}


def attention_widths(text: Any) -> tuple[int, int]:
    """Return the widths of a decoder layer's queries and of its keys (or values), summed over heads.

    `text`: a `LlamaConfig`, or the `text` of a `LlavaShape`.
    """
    return int(text.num_attention_heads) * int(text.head_dim), int(text.num_key_value_heads) * int(text.head_dim)


def linear_layers(text: Any) -> dict[str, tuple[int, int]]:
    """Map each linear layer of a decoder layer, by its name in it, to (outputs, inputs); `text` as above."""
    width, wide = int(text.hidden_size), int(text.intermediate_size)
    queries, keys = attention_widths(text)
    attention: list[tuple[int, int]] = [(queries, width), (keys, width), (keys, width), (width, queries)]
    return dict(zip(LINEAR_LAYERS, [*attention, (wide, width), (wide, width), (width, wide)], strict=True))


def text_tensors(text: SimpleNamespace) -> Iterator[tuple[str, Shape]]:
    """Yield canonical name and shape of the tensors of a Llama, its head included."""
    width, vocabulary = int(text.hidden_size), int(text.vocab_size)
    yield EMBEDDINGS, (vocabulary, width)
    yield HEAD, (vocabulary, width)
    yield "language_model.model.norm.weight", (width,)
    for number in range(int(text.num_hidden_layers)):
        layer = f"{LAYERS_PREFIX}{number}."
        yield f"{layer}input_layernorm.weight", (width,)
        yield f"{layer}post_attention_layernorm.weight", (width,)
        for name, shape in linear_layers(text).items():
            yield f"{layer}{name}.weight", shape
            if text.mlp_bias if name.startswith("mlp") else text.attention_bias:
                yield f"{layer}{name}.bias", shape[:1]


def tower_tensors(vision: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    """Yield canonical name and shape of the tensors of a CLIP vision tower."""
    tower = "vision_tower.vision_model."
    width, wide, patch = (int(vision[key]) for key in ("hidden_size", "intermediate_size", "patch_size"))
    patches = (int(vision["image_size"]) // patch) ** 2
    yield f"{tower}embeddings.class_embedding", (width,)
    yield f"{tower}embeddings.patch_embedding.weight", (width, int(vision["num_channels"]), patch, patch)
    yield f"{tower}embeddings.position_embedding.weight", (patches + 1, width)
    sizes: dict[str, Shape] = {"pre_layrnorm": (width,), "post_layernorm": (width,)}
    for number in range(int(vision["num_hidden_layers"])):
        layer = f"encoder.layers.{number}."
        sizes |= {f"{layer}layer_norm1": (width,), f"{layer}layer_norm2": (width,)}
        sizes |= {f"{layer}self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
        sizes |= {f"{layer}mlp.fc1": (wide, width), f"{layer}mlp.fc2": (width, wide)}
    for name, shape in sizes.items():
        yield f"{tower}{name}.weight", shape
        yield f"{tower}{name}.bias", shape[:1]
