"""Check the run's directory: free, or as --overwrite and --resume need it."""

from __future__ import annotations

from collections.abc import Iterator

from lora_llava.planning.preflight.findings import Finding, Problem
from lora_llava.planning.preflight.setup import Setup
from lora_llava.run_directory.problems import problems_of_output_dir


def output_dir_can_be_used(setup: Setup) -> Iterator[Finding]:
    """The run can use `output_dir`, and none of its inputs would be overwritten there."""
    recipe, start = setup.recipe, setup.start
    problems = problems_of_output_dir(
        recipe.resolved_output_dir, recipe.plain(), overwrite=start == "overwrite", resume=start == "resume"
    )
    yield from (Problem(problem.where, problem.what, problem.fix) for problem in problems)
