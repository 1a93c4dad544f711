"""Fine-tune LLaVA-1.5-style vision-language models on one consumer GPU.

What a notebook needs is offered here by name and imported when it is used; docs/python.md shows it at work.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lora_llava.errors import (
    ArtifactError,
    DataError,
    HubError,
    LoraLlavaError,
    LostProcessError,
    ModelError,
    PreflightError,
    RecipeError,
    RunInterruptedError,
    TrainingError,
)
from lora_llava.system.quiet import hold_back_advice

if TYPE_CHECKING:
    from lora_llava.artifact import load_model
    from lora_llava.evaluation.run import evaluate
    from lora_llava.generation.chat import Chat
    from lora_llava.recipe.file import load_recipe
    from lora_llava.shipping.export import export
    from lora_llava.shipping.hub.push import publish as push
    from lora_llava.shipping.merge.run import merge_artifact as merge
    from lora_llava.training.run import finetune

hold_back_advice()

__version__ = "0.1.0"
__all__ = [
    "ArtifactError",
    "Chat",
    "DataError",
    "HubError",
    "LoraLlavaError",
    "LostProcessError",
    "ModelError",
    "PreflightError",
    "RecipeError",
    "RunInterruptedError",
    "TrainingError",
    "evaluate",
    "export",
    "finetune",
    "load_model",
    "load_recipe",
    "merge",
    "push",
]

_LAZY = {
    "Chat": ("generation.chat", "Chat"),
    "evaluate": ("evaluation.run", "evaluate"),
    "export": ("shipping.export", "export"),
    "finetune": ("training.run", "finetune"),
    "load_model": ("artifact", "load_model"),
    "load_recipe": ("recipe.file", "load_recipe"),
    "merge": ("shipping.merge.run", "merge_artifact"),
    "push": ("shipping.hub.push", "publish"),
}
"""Module and name of what is imported on first use; torch and transformers come with most of it."""


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), attribute)
    return value


def __dir__() -> list[str]:
    """List the public names, those that are not imported yet among them."""
    return sorted({*globals(), *__all__})
