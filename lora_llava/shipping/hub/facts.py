"""Collect what is known of a model to publish, from its directory and from that of its run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lora_llava.artifact import RECIPE, Manifest, merged_manifest, read_manifest
from lora_llava.errors import ArtifactError
from lora_llava.evaluation.compare import ACCURACY, SAMPLES
from lora_llava.formats.llava_hf import WeightFiles
from lora_llava.formats.manifest import MANIFEST
from lora_llava.formats.names import MERGE_REPORT
from lora_llava.modeling.merged import check_merged
from lora_llava.modeling.metadata import read_config
from lora_llava.recipe.file import read_recipe
from lora_llava.recipe.stages import STAGES
from lora_llava.run_directory import output
from lora_llava.run_directory.claim import is_artifact
from lora_llava.shipping.hub.results import accuracy_problems, summary_problems
from lora_llava.system.files import read_json, refuse_irregular

PICTURES = (output.LOSS_PLOT, SAMPLES)
"""Names in the repository of the loss plot and of the sample answers."""
DATA_PICTURES = (SAMPLES,)
"""Those that show data: test images with questions and answers."""
_read_json = partial(read_json, error=ArtifactError, fix="remove it to publish without its information")


@dataclass(frozen=True, slots=True)
class Facts:
    """A model to publish; unknown fields are empty."""

    directory: Path
    manifest: Manifest | None
    """The manifest of the artifact, or of the artifact that was merged."""
    merge: dict[str, Any] | None
    """The merge report, empty if there is none; None for an artifact."""
    recipe: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    accuracy: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, Path] = field(default_factory=dict)
    """By their names in the repository."""

    @property
    def is_adapter(self) -> bool:
        """Whether the model is an adapter, which needs a base."""
        return self.manifest is not None and self.merge is None

    @property
    def base_id(self) -> str | None:
        """The base's hub id; None if the base is a directory or unknown."""
        base = self.manifest.base if self.manifest else {}
        return base["name"] if base.get("revision") else None


def gather(source: Path, run: Path | None) -> Facts:
    """Collect what is known of an artifact or a model, including the results of its run.

    `run`: directory of the run; None: that of the artifact, if it is in one. Raises ArtifactError if `source` is
    neither artifact nor model, is damaged, or is not of the named run; RecipeError for a recipe that this version
    cannot read.
    """
    merge: dict[str, Any] | None = None
    manifest: Manifest | None
    refuse_irregular(source, ArtifactError)
    if is_artifact(source):
        manifest = read_manifest(source)
    else:
        WeightFiles(source).check(read_config(source))
        check_merged(source)
        manifest = merged_manifest(source)
        merge = _read_json(source / MERGE_REPORT)
    run = _run_of(source, manifest, run)
    recipes = [source / RECIPE, run / manifest.stage / RECIPE] if run and manifest else [source / RECIPE]
    recipe = next((read_recipe(path).plain() for path in recipes if path.is_file()), {})
    if run is None or manifest is None:
        return Facts(source, manifest, merge, recipe)
    stages = recipe.get("stages") or {}
    last = [stage for stage in STAGES if stages.get(stage)][-1:]
    # The run evaluated its last stage only; an earlier one has no results.
    tested = run / output.EVALUATION if last == [manifest.stage] else None
    pictures = {output.LOSS_PLOT: run / output.LOSS_PLOT}
    if tested:
        pictures[SAMPLES] = tested / SAMPLES
    return Facts(
        source,
        manifest,
        merge,
        recipe,
        summary=_read_results(run / output.SUMMARY, summary_problems),
        accuracy=_read_results(tested / ACCURACY, accuracy_problems) if tested else {},
        pictures={name: path for name, path in pictures.items() if path.is_file()},
    )


def _read_results(path: Path, problems_in: Callable[[Mapping[str, Any]], Iterator[str]]) -> dict[str, Any]:
    """Read a file of results; ArtifactError if the card cannot show what it holds."""
    results = _read_json(path)
    if (problem := next(problems_in(results), None)) is not None:
        raise ArtifactError(f"{path} is damaged ({problem}); remove it to publish without its information")
    return results


def _run_of(source: Path, manifest: Manifest | None, run: Path | None) -> Path | None:
    """Return the run that wrote an artifact. It is recognized by the artifact's hash, not by its name."""
    candidate = run or source.resolve().parent
    for stage in STAGES:
        recorded = _read_json(candidate / stage / MANIFEST)
        if manifest and recorded.get("adapter_sha256") == manifest.adapter_sha256:
            return candidate
    if run is not None:
        raise ArtifactError(f"{source} was not written by the run in {run}: no stage there has its weights")
    return None
