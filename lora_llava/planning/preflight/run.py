"""The preflight, top to bottom: run every check, and refuse with all problems at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from lora_llava.planning.preflight import data, disk, environment, settings, shipping, start_from
from lora_llava.planning.preflight.findings import Finding, Findings
from lora_llava.planning.preflight.model import base, text_side
from lora_llava.planning.preflight.setup import Setup
from lora_llava.system.progress import phase

if TYPE_CHECKING:
    from rich.console import Console

CHECKS: tuple[Callable[[Setup], Iterable[Finding]], ...] = (
    settings.settings_are_used,
    base.features_can_be_read,
    base.adapter_has_its_layers,
    text_side.tokenizer_can_be_read,
    text_side.image_token_is_known,
    text_side.template_can_be_written,
    text_side.lengths_fit,
    start_from.start_from_fits,
    start_from.preference_has_a_start,
    data.data_files_are_there,
    data.hub_data_is_available,
    disk.output_dir_can_be_used,
    disk.room_is_there,
    environment.trackers_are_installed,
    environment.libraries_are_installed,
    environment.stages_can_be_divided,
    environment.device_can_compute,
)
"""The checks after that of the base, in the order in which a user reads their findings: base, data, directory, machine.
"""
NOTICES: tuple[Callable[[Setup], Iterable[Finding]], ...] = (
    text_side.template_is_the_bases,
    data.folders_hold_images,
    shipping.exports_that_fail,
)
"""Slower checks that only give notices; run if there is no problem."""


def preflight(setup: Setup) -> Findings:
    """Run every check that reads no data; return the findings, raise nothing for them."""
    findings = Findings()
    findings.add(base.base_can_be_used(setup))
    setup.sound = not findings.problems
    for check in CHECKS:
        findings.add(check(setup))
    if not findings.problems:
        for check in NOTICES:
            findings.add(check(setup))
    return findings


def check_setup(setup: Setup, console: Console, *, data: bool = True) -> None:
    """Run the preflight; then, with `data`, open all images. Print the notices of both. Raises PreflightError."""
    environment.refuse_several_processes()
    findings = preflight(setup)
    findings.refuse()
    _print_notices(findings, console)
    if data:
        phase("Opening all images")
        findings = _look_at_data(setup)
        findings.refuse()
        _print_notices(findings, console)


def _print_notices(findings: Findings, console: Console) -> None:
    for notice in findings.notices:
        console.print(f"Note: {notice}", soft_wrap=True, markup=False)


def _look_at_data(setup: Setup) -> Findings:
    """Read every local source and open every image that the run will open, in parallel; `preflight` comes first."""
    from lora_llava.planning.preflight import images

    findings = Findings()
    images_of_run = images.read_images(setup.recipe)
    findings.add(images_of_run.findings)
    findings.add(images.images_can_be_opened(images_of_run))
    findings.add(images.images_have_their_names(images_of_run))
    counts = {key: len(sources) for key, sources in images_of_run.by_key.items()}
    findings.add(disk.room_for_features(setup, counts))
    return findings
