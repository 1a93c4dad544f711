"""Names of the tensors of a LLaVA: as llava-hf publishes them, and as they are in memory; without torch."""

from __future__ import annotations

import re

from lora_llava.errors import ModelError

HEAD = "language_model.lm_head.weight"
EMBEDDINGS = "language_model.model.embed_tokens.weight"
PROJECTOR_PREFIX = "multi_modal_projector."

_IN_MEMORY = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", PROJECTOR_PREFIX),
    ("lm_head.", "language_model.lm_head."),
)
_SHORT_TOWER = re.compile(r"^vision_tower\.(?!vision_model\.)")
_CANONICAL = re.compile(r"^(language_model\.(model|lm_head)|vision_tower\.vision_model|multi_modal_projector)\.")
BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")
"""Tensors of old files that are computed, not learned."""


def canonical_name(name: str) -> str:
    """Spell the name of a tensor, as in memory or in any file of transformers, as llava-hf does.

    Raises ModelError for a name of no part of LLaVA.
    """
    for prefix, replacement in _IN_MEMORY:
        if name.startswith(prefix):
            name = replacement + name.removeprefix(prefix)
            break
    name = _SHORT_TOWER.sub("vision_tower.vision_model.", name)
    if not _CANONICAL.match(name):
        raise ModelError(f"a tensor {name!r} belongs to no part of a LLaVA model")
    return name


def memory_name(name: str) -> str:
    """Spell a canonical name as the parameter is called in memory."""
    name = name.replace("vision_tower.vision_model.", "vision_tower.", 1)
    for replacement, prefix in _IN_MEMORY:
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    raise ModelError(f"a tensor {name!r} belongs to no part of a LLaVA model")
