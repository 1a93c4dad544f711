"""Checks of the run's directory: free, or as --overwrite and --resume need it."""

from __future__ import annotations

from collections.abc import Iterator

from lora_llava.planning.preflight.findings import Finding, Problem
from lora_llava.planning.preflight.setup import Setup
from lora_llava.run_directory.problems import problems_of_output_dir


def output_dir_can_be_used(setup: Setup) -> Iterator[Finding]:
    """Nothing keeps the run out of `output_dir`, and no input of it lies where it would be replaced."""
    found = problems_of_output_dir(setup.recipe, overwrite=setup.start == "overwrite", resume=setup.start == "resume")
    yield from (Problem(one.where, one.what, one.fix) for one in found)
