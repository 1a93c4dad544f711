"""Checks of the base: there, readable, and of the architecture that the kit trains."""

from __future__ import annotations

from collections.abc import Iterator

from lora_llava.preflight.findings import Finding, Problem
from lora_llava.preflight.setup import Setup


def base_can_be_had(setup: Setup) -> Iterator[Finding]:
    """Every model that the recipe names is here, or on the Hub, with a config.json."""
    for key, model in setup.models.items():
        if model.problem is not None:
            yield Problem(key, *model.problem)


def base_is_a_llava(setup: Setup) -> Iterator[Finding]:
    """The model named as the base is a LLaVA in the llava-hf layout."""
    key = "base.model_name_or_path"
    model = setup.models.get(key)
    if model is None or model.problem is not None:
        return
    if (kind := model.config.get("model_type")) != "llava":
        yield Problem(
            key,
            f"{model.name}: model_type is {kind!r}, needed 'llava'",
            "Name a converted LLaVA-1.5, such as llava-hf/llava-1.5-7b-hf; or the parts in base.language_model and "
            "base.vision_tower.",
        )
