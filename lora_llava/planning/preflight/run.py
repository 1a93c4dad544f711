"""The preflight, top to bottom: look everything up, run every check, refuse with all problems at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from lora_llava.planning.preflight import data, directory, disk, environment, settings, shipping, start_from
from lora_llava.planning.preflight.findings import Finding, Findings, Notice
from lora_llava.planning.preflight.model import base, text_side
from lora_llava.planning.preflight.setup import Setup
from lora_llava.system.progress import phase

CHECKS: tuple[Callable[[Setup], Iterable[Finding]], ...] = (
    settings.settings_are_used,
    base.features_can_be_read,
    base.adapter_has_its_layers,
    text_side.tokenizer_can_be_read,
    text_side.image_token_is_known,
    text_side.template_can_be_written,
    text_side.lengths_fit,
    start_from.start_from_fits,
    data.data_files_are_there,
    data.hub_data_can_be_had,
    directory.output_dir_can_be_used,
    disk.room_is_there,
    environment.trackers_are_installed,
    environment.libraries_are_installed,
    environment.device_can_compute,
)
"""After the base itself, in the order in which a user reads what they find: base, data, directory, machine."""
NOTICES: tuple[Callable[[Setup], Iterable[Finding]], ...] = (
    text_side.template_is_the_bases,
    shipping.exports_that_fail,
)
"""What takes longer, and only tells: looked at where no problem was found."""


def preflight(setup: Setup) -> Findings:
    """Run every check that reads no data; nothing is raised for what they find."""
    findings = Findings()
    findings.add(base.base_can_be_used(setup))
    setup.sound = not findings.problems
    for check in CHECKS:
        findings.add(check(setup))
    if not findings.problems:
        for check in NOTICES:
            findings.add(check(setup))
    return findings


def check_setup(setup: Setup, *, data: bool = True) -> list[Notice]:
    """Run the preflight; with `data`, open all images too. Returns notices; PreflightError lists every problem."""
    environment.refuse_several_processes()
    findings = preflight(setup)
    findings.refuse()
    if data:
        phase("Opening all images")
        look_at_data(setup).refuse()
    return findings.notices


def look_at_data(setup: Setup) -> Findings:
    """Read every local source and open every image that the run will open, in parallel; `preflight` comes first."""
    from lora_llava.planning.preflight import images

    findings = Findings()
    found = images.read_images(setup.recipe)
    findings.add(found.problems)
    findings.add(images.images_can_be_opened(found))
    findings.add(disk.room_for_features(setup, {key: len(one) for key, one in found.by_key.items()}))
    return findings
