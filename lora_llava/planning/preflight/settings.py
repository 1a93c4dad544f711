"""Check for settings that have no effect, or that contradict the models that the recipe names."""

from __future__ import annotations

from collections.abc import Iterator

from lora_llava.planning.preflight.findings import Finding, Notice, Problem
from lora_llava.planning.preflight.setup import Setup
from lora_llava.recipe.start import unlike_the_start
from lora_llava.recipe.unused import unlike_the_model, unused_settings


def settings_are_used(setup: Setup) -> Iterator[Finding]:
    """Every setting that the recipe changes has an effect, and agrees with the model and with start_from."""
    model = setup.models.get("base.model_name_or_path")
    config = model.config if model is not None and model.problem is None else {}
    for unused in unused_settings(setup.recipe):
        yield Problem(unused.key, unused.what, f"{unused.fix}.") if unused.refused else Notice(unused.key, unused.what)
    # Another check reports an empty config.
    for unused in unlike_the_model(setup.recipe, config) if config else ():
        yield Problem(unused.key, unused.what, f"{unused.fix}.")
    for key, what in unlike_the_start(setup.recipe):
        yield Notice(key, what)
