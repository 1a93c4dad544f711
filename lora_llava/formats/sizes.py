"""Sizes in the config.json of any model: integers within bounds, before anything is built of them. Without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_MAX_LAYERS, _MAX_SIZE = 256, 100_000_000
"""The largest Llama has 126 layers. Of larger numbers, counting or building the tensors alone would take all memory."""
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
TEXT_SIZES = (*_SIZES, "vocab_size", "num_key_value_heads", "head_dim", "max_position_embeddings")
VISION_SIZES = (*_SIZES, "image_size", "patch_size", "num_channels")
_MAX_PIXELS_A_SIDE, _MAX_PATCHES_A_SIDE, _PATCH = 16_384, 512, 32
_MAY_BE_NULL = ("num_key_value_heads", "head_dim")
_LAYERS, _SIDES = ("num_hidden_layers",), ("image_size",)


def wrong_sizes(config: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    """Return the sizes that are no integer, not above 0, or absurd; a configuration may leave any of them out."""
    return [
        f"{name} {config[name]!r:.40}"
        for name in names
        if name in config and not (config[name] is None and name in _MAY_BE_NULL) and not _fits(name, config)
    ]


def check_sizes(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the sizes of a LLaVA's config.json, or of a part of one."""
    for part, names in (
        ("text_config", TEXT_SIZES),
        ("vision_config", VISION_SIZES),
        ("", (*TEXT_SIZES, *VISION_SIZES)),
    ):
        inner = config if not part else config.get(part)
        if inner is None:
            continue
        if not isinstance(inner, Mapping):
            yield f"{part} is {inner!r:.40}, must be a mapping"
            continue
        wrong = wrong_sizes(inner, names)
        yield from (f"{part}{'.' if part else ''}{size}" for size in wrong)
        side, patch = inner.get("image_size", 0), inner.get("patch_size", _PATCH)
        if not wrong and side > _MAX_PATCHES_A_SIDE * patch:
            yield f"{part}{'.' if part else ''}image_size {side} in patches of {patch}"


def _fits(name: str, config: Mapping[str, Any]) -> bool:
    largest = _MAX_LAYERS if name in _LAYERS else _MAX_PIXELS_A_SIDE if name in _SIDES else _MAX_SIZE
    value = config[name]
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= largest
