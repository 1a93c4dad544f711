"""Tensor and file names of LLaVA and of PEFT's adapters, and how they map to each other. Without torch.

The canonical name of a tensor is the one that llava-hf publishes; transformers spells it otherwise in memory, and PEFT
wraps that again.
"""

from __future__ import annotations

import re

from lora_llava.errors import ModelError

WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
MERGE_REPORT = "merge_report.json"
"""In a merged model: how it was merged, `identity` and, under `artifact`, the manifest of the merged artifact."""

LANGUAGE_MODEL_PREFIX = "language_model."
LAYERS_PREFIX = "language_model.model.layers."
TOWER_PREFIX = "vision_tower."
PROJECTOR_PREFIX = "multi_modal_projector."
HEAD = "language_model.lm_head.weight"
EMBEDDINGS = "language_model.model.embed_tokens.weight"
BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")
"""Endings of tensors in old files that are computed, not trained."""

PEFT_PREFIX = "base_model.model."
"""Precedes every name of the wrapped model, in an adapter's file as in memory."""

_IN_MEMORY = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", TOWER_PREFIX),
    ("model.multi_modal_projector.", PROJECTOR_PREFIX),
    ("lm_head.", "language_model.lm_head."),
)
_SHORT_TOWER = re.compile(r"^vision_tower\.(?!vision_model\.)")
_CANONICAL = re.compile(r"^(language_model\.(model|lm_head)|vision_tower\.vision_model|multi_modal_projector)\.")
_LORA = re.compile(r"^(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(\.weight)?$")
_COPIES = re.compile(r"\.(modules_to_save(\.default)?|original_module)\.")
_ADAPTER_NAME = re.compile(r"(?<=\.)(lora_A|lora_B|lora_magnitude_vector)\.default(?=\.|$)")


def canonical_name(name: str) -> str:
    """Return the canonical name of a tensor that is named as in memory or as in any file of transformers.

    Raises ModelError for a tensor of no part of LLaVA.
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
    """Return the name in memory of the parameter with this canonical name."""
    name = name.replace("vision_tower.vision_model.", TOWER_PREFIX, 1)
    for replacement, prefix in _IN_MEMORY:
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    raise ModelError(f"a tensor {name!r} belongs to no part of a LLaVA model")


def unwrap_peft(name: str) -> str:
    """Return a name of PEFT's without its prefix, the adapter's name and the wrapper of `modules_to_save`."""
    return _ADAPTER_NAME.sub(r"\1", _COPIES.sub(".", name.removeprefix(PEFT_PREFIX)))


def split_lora(name: str) -> tuple[str, str] | None:
    """Split an unwrapped name into the weight that LoRA changes and the part of LoRA; None for another tensor.

    The part is `lora_A`, `lora_B` or `lora_magnitude_vector`.
    """
    match = _LORA.match(name)
    return (match["module"] + ".weight", match["part"]) if match else None
