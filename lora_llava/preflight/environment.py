"""Checks of the machine: processes, trackers, devices."""

from __future__ import annotations

import os

from lora_llava.preflight.findings import Findings, Problem

_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""Variables by which launchers and schedulers say how many processes run this command together."""


def refuse_several_processes() -> None:
    """Raise PreflightError in each of several processes that were started together; they would wait for each other."""
    for name in _WORLD_SIZES:
        value = os.environ.get(name, "1")
        if value.strip() not in ("", "0", "1"):
            findings = Findings([Problem(name, *_several(value))])
            findings.refuse()


def _several(value: str) -> tuple[str, str]:
    return (
        f"is {value} in the environment: this command was started as several processes, and it trains in one",
        "Start it without torchrun, accelerate launch or srun, on one GPU; or unset the variable if it is left over.",
    )
