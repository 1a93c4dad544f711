"""The preflight, top to bottom: look everything up, run every check, refuse with all problems at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from lora_llava.preflight import base, data
from lora_llava.preflight.environment import refuse_several_processes
from lora_llava.preflight.findings import Finding, Findings
from lora_llava.preflight.setup import Setup, Start
from lora_llava.recipe import Recipe

CHECKS: tuple[Callable[[Setup], Iterable[Finding]], ...] = (
    base.base_can_be_used,
    data.data_files_are_there,
)
"""In the order in which a user reads what they find: base, data, directory, machine."""


def preflight(recipe: Recipe, *, start: Start = "new", recipe_file: Path | None = None) -> Findings:
    """Run every check on a recipe; nothing is raised for what they find.

    `recipe_file` is where the recipe was read from: misspelled names are looked for beside it. Raises PreflightError
    at once in each of several processes.
    """
    refuse_several_processes()
    setup = Setup.of(recipe, start, recipe_file)
    findings = Findings()
    for check in CHECKS:
        findings.add(check(setup))
    return findings
