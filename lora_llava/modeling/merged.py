"""The identity of a merged model: what `merge` wrote is what is loaded again, or the field that differs is named.

It is in `merge_report.json`, which other software ignores: the fields of `modeling.identity`, those of the artifact's
manifest that decide how it is prompted, and the hash of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_llava.errors import ArtifactError
from lora_llava.formats.llava_hf import write_json
from lora_llava.formats.manifest import manifest_problem
from lora_llava.formats.names import MERGE_REPORT
from lora_llava.modeling.base import hash_weights
from lora_llava.modeling.identity import (
    BASE,
    base_fields,
    difference,
    differing,
    identity_of,
    recorded_fields,
    stated_fields,
)
from lora_llava.system.files import read_json
from lora_llava.system.progress import note

_ARTIFACT, _IDENTITY = "artifact", "identity"
_WRITTEN = "it was merged with"
_FIX = "merge the artifact again"


def with_identity(report: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Return the report of a merged model, whose other files are written, with the identity of what they hold."""
    return {**report, _IDENTITY: _identity(report, directory)}


def update_identity(directory: Path) -> None:
    """Record a copy of a merged model, written in another form; do nothing without a report, or an identity in it."""
    report = read_json(directory / MERGE_REPORT, ArtifactError, _FIX)
    if report.get(_IDENTITY) is not None:
        write_json(directory / MERGE_REPORT, with_identity(report, directory))


def check_merged(directory: Path) -> None:
    """Compare a merged model with what `merge` wrote; do nothing for a directory without a report.

    Raises ArtifactError, with the name of each field, if it differs. Says that nothing can be compared if an earlier
    version merged it.
    """
    path = directory / MERGE_REPORT
    if not path.is_file():
        return
    report = read_json(path, ArtifactError, _FIX)
    if report.get(_IDENTITY) is None:
        note(
            f"{directory} was merged by an earlier version, which did not record what it wrote: config, image "
            "processor, tokenizer, generation config, template and weights are not compared"
        )
        return
    then = recorded_fields(report[_IDENTITY])
    if then is None:
        raise ArtifactError(f"{path}: the identity in it was altered; {_FIX}")
    now = _identity(report, directory)["fields"]
    if wrong := [difference(name, then[name], now[name], _WRITTEN) for name in differing(then, now)]:
        raise ArtifactError(
            f"{directory} was altered since it was merged: {'; '.join(wrong)}. Merge the artifact again, or remove "
            f"{MERGE_REPORT} to use it as a model of another origin."
        )


def _identity(report: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    manifest = report.get(_ARTIFACT)
    problem = manifest_problem(manifest) if isinstance(manifest, dict) else "it is not a mapping"
    if problem is not None:
        raise ArtifactError(f"{directory / MERGE_REPORT} is damaged ({problem}); {_FIX}")
    assert isinstance(manifest, dict)
    fields = {name.removeprefix(BASE): value for name, value in base_fields(directory).items()}
    trained = {f"{_ARTIFACT}: {name}": value for name, value in stated_fields(manifest).items()}
    return identity_of({**fields, **trained, "weights: sha256": hash_weights(directory)})
