"""The preflight, top to bottom: look everything up, run every check, refuse with all problems at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from lora_llava.preflight import base, data, environment, settings, start_from, text_side
from lora_llava.preflight.environment import refuse_several_processes
from lora_llava.preflight.findings import Finding, Findings
from lora_llava.preflight.setup import Setup, Start
from lora_llava.recipe import Recipe

CHECKS: tuple[Callable[[Setup], Iterable[Finding]], ...] = (
    settings.settings_are_used,
    base.features_can_be_read,
    text_side.tokenizer_can_be_read,
    text_side.image_token_is_known,
    text_side.template_can_be_written,
    text_side.lengths_fit,
    start_from.start_from_fits,
    data.data_files_are_there,
    environment.trackers_are_installed,
    environment.libraries_are_installed,
    environment.device_can_compute,
)
"""After the base itself, in the order in which a user reads what they find: base, data, directory, machine."""
NOTICES: tuple[Callable[[Setup], Iterable[Finding]], ...] = (text_side.template_is_the_bases,)
"""What takes longer, and only tells: looked at where no problem was found."""


def preflight(recipe: Recipe, *, start: Start = "new", recipe_file: Path | None = None, here: bool = True) -> Findings:
    """Run every check on a recipe; nothing is raised for what they find.

    `recipe_file` is where the recipe was read from: misspelled names are looked for beside it. `here`: it is to run
    on this machine. Raises PreflightError at once in each of several processes.
    """
    refuse_several_processes()
    setup = Setup.of(recipe, start, recipe_file, here=here)
    findings = Findings()
    findings.add(base.base_can_be_used(setup))
    setup.sound = not findings.problems
    for check in CHECKS:
        findings.add(check(setup))
    if not findings.problems:
        for check in NOTICES:
            findings.add(check(setup))
    return findings
