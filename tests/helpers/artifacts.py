"""Artifacts on a tiny base, with weights as if they had been trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from lora_llava.artifact import MANIFEST, Manifest, save_artifact
from lora_llava.modeling.base import BaseIdentity, LoadedModel, hash_weights, load_base
from lora_llava.modeling.stages import build_stage, target_pattern
from lora_llava.recipe.settings import AdapterSettings
from lora_llava.recipe.stages import StageName
from tests.helpers.tiny import IMAGE_ID, IMAGE_MEAN, IMAGE_SIZE, IMAGE_STD, NUM_IMAGE_TOKENS

CPU = torch.device("cpu")
FILES = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "generation_config.json",
    "manifest.json",
    "preprocessor_config.json",
    "processor_config.json",
    "recipe.yaml",
    "tokenizer.json",
    "tokenizer_config.json",
}
"""All files of an artifact."""


def facts(stage: StageName, nf4: bool) -> dict[str, Any]:
    """What a run says of a stage."""
    return {
        "stage": stage,
        "parent_sha256": None,
        "quantization": {"type": "nf4" if nf4 else "none", "double_quant": True},
        "template": {"name": "vicuna_v1", "system": None},
        "images": {"size": IMAGE_SIZE, "mean": list(IMAGE_MEAN), "std": list(IMAGE_STD), "image_aspect_ratio": "pad"},
        "data": {"sha256": "0", "records": 1, "answer_prompt": None},
        "seen": {"steps": 1},
        "metrics": {"train_loss": 1.0},
    }


def train(
    base: Path,
    stage: StageName,
    *,
    nf4: bool = False,
    kind: str = "lora",
    dtype: torch.dtype = torch.float32,
) -> LoadedModel:
    """A loaded base in a stage, with weights that differ from those it began with."""
    identity = BaseIdentity("tiny-llava", None, hash_weights(base))
    loaded = load_base(base, identity, nf4=nf4, double_quant=True, dtype=dtype, device=CPU)
    torch.manual_seed(1)
    loaded.model = build_stage(loaded.model, stage, AdapterSettings(type=kind, r=4, lora_alpha=8.0))
    shake(loaded.model)
    return loaded


def shake(model: Any) -> None:
    """Move what is trained, as training would."""
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.eval()


def save(loaded: LoadedModel, directory: Path, stage: StageName = "instruct", *, nf4: bool = False) -> Manifest:
    """Save it as a run does."""
    return save_artifact(directory, loaded, facts(stage, nf4), "version: 1\n")


def make_artifact(base: Path, directory: Path, stage: StageName = "instruct", **how: Any) -> Path:
    """Write an artifact and return its directory."""
    save(train(base, stage, **how), directory, stage, nf4=how.get("nf4", False))
    return directory


def as_earlier(directory: Path, **changes: Any) -> None:
    """Rewrite the manifest as earlier versions wrote it, without an identity; `changes` replace its values."""
    path = directory / MANIFEST
    manifest = {**json.loads(path.read_text(encoding="utf-8")), "format": 1, **changes}
    del manifest["identity"]
    path.write_text(json.dumps(manifest), encoding="utf-8")


def logits(model: Any) -> torch.Tensor:
    """Logits of one text with an image, (1, 12, vocabulary)."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(7, 280, (1, 12), generator=generator)
    ids[0, 2 : 2 + NUM_IMAGE_TOKENS] = IMAGE_ID
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).logits
    return out


def plain_peft(model: Any, directory: Path, *, projector: bool = True, **changes: Any) -> Any:
    """Save a PEFT adapter as other tools do, without any of the kit's files; returns the wrapped model."""
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": target_pattern(model, ["q_proj", "v_proj"]),
        "modules_to_save": ["multi_modal_projector"] if projector else None,
        "task_type": "CAUSAL_LM",
    }
    wrapped = get_peft_model(model, LoraConfig(**{**settings, **changes}))
    shake(wrapped)
    wrapped.save_pretrained(directory)
    return wrapped
