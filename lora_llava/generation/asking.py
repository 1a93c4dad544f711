"""Load a model to ask it many questions, in the form of its training."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel

from lora_llava.artifact import Usage, load_model, read_usage, template_to_ask
from lora_llava.generation.answers import PromptFormat
from lora_llava.modeling.base import LoadedModel
from lora_llava.modeling.folded import can_fold
from lora_llava.planning.preflight.shipping import refuse_model
from lora_llava.recipe.stages import DataSettings
from lora_llava.system.device import pick_device, pick_dtype
from lora_llava.system.progress import phase

_Data = TypeVar("_Data", bound=DataSettings)


@dataclass(frozen=True, slots=True)
class AskedModel:
    """A model to ask."""

    directory: Path
    """An artifact or a whole model."""
    base: str | None = None
    """Directory or Hub id of an artifact's base, if it is not where the artifact says."""
    template: str | None = None
    """Template to ask in, for a model that does not say its own."""


def usage_of(model: AskedModel) -> Usage:
    """Return how to prompt a model, before it is loaded.

    Raises PreflightError or ArtifactError for one that cannot be loaded or prompted.
    """
    refuse_model(model.directory, model.base)
    usage = read_usage(model.directory, model.template)
    template_to_ask(usage, model.directory)
    return usage


def as_trained(data: _Data, usage: Usage) -> _Data:
    """Fill in `answer_prompt` and `window`, where the settings leave them open, from the model's training."""
    trained = {"answer_prompt": usage.answer_prompt, "window": usage.window and list(usage.window)}
    missing: dict[str, Any] = {key: value for key, value in trained.items() if getattr(data, key) is None}
    if data.others:
        missing["others"] = [as_trained(other, usage) for other in data.others]
    return data.model_copy(update=missing)


def load_to_ask(model: AskedModel, precision: str = "auto") -> tuple[LoadedModel, Usage]:
    """Load a model for many questions, as `load_model` does: dequantized once, if that fits."""
    # The trained model is no longer needed: on a small card there is no room for two.
    gc.collect()
    torch.cuda.empty_cache()
    device = pick_device()
    phase("Loading the model to ask")
    return load_model(
        model.directory,
        device=device,
        dtype=pick_dtype(precision, device),
        base=model.base,
        template=model.template,
        keep_dequantized=None,
    )


def how_computed(model: Any) -> str | None:
    """Return a line that says with which weights an adapter is asked; None for a whole model."""
    if not isinstance(model, PeftModel):
        return None
    if any(isinstance(module, Linear4bit) for module in model.modules()):
        return "asked in 4 bits: the dequantized weights would take more than half of the free memory"
    if can_fold(model):
        return "asked in fp32, with the adapter merged into the weights, as merge does"
    return "asked with the adapter next to the base, whose weights are in the compute dtype"


def prompt_format(usage: Usage, directory: Path) -> PromptFormat:
    """Return the form in which to ask a model."""
    return PromptFormat(template_to_ask(usage, directory), usage.image_aspect_ratio)
