"""The artifact of a stage, at its end or at any step of it, and what its manifest says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_llava.artifact import MANIFEST, file_sha256, save_artifact, write_artifact
from lora_llava.data.images.fingerprint import picture_facts
from lora_llava.data.load import fingerprint
from lora_llava.data.stage import StageData
from lora_llava.formats.peft_adapter import WEIGHTS
from lora_llava.modeling.base import LoadedModel
from lora_llava.recipe.file import dump_resolved
from lora_llava.recipe.settings import Recipe
from lora_llava.recipe.stages import StageName
from lora_llava.run_directory.claim import place
from lora_llava.run_directory.output import writing_named
from lora_llava.training.checkpoints.image_settings import image_facts


class StageArtifact:
    """Writes the model of a stage as it is, with the manifest of the step it has come to."""

    def __init__(
        self, recipe: Recipe, stage: StageName, loaded: LoadedModel, data: StageData, parent: Path | None
    ) -> None:
        self.recipe = recipe
        self.stage = stage
        self.loaded = loaded
        self.data = data
        self.stated = stage_facts(recipe, stage, loaded, data, parent)

    def save(self, step: int, metrics: dict[str, float]) -> None:
        """Leave the artifact of the finished stage in the run's directory."""
        directory = self.recipe.resolved_output_dir / self.stage
        facts, recipe_yaml = self._facts(step, metrics), dump_resolved(self.recipe, directory)
        with writing_named(f"the artifact of stage {self.stage}", self.recipe.resolved_output_dir):
            save_artifact(directory, self.loaded.model, self.loaded, facts, recipe_yaml, self._place)

    def _place(self, staging: Path, directory: Path) -> None:
        manifest = json.loads((staging / MANIFEST).read_text(encoding="utf-8"))
        place(self.recipe.resolved_output_dir, staging, directory, {WEIGHTS: manifest["adapter_sha256"]})

    def write(self, staging: Path, directory: Path, step: int, metrics: dict[str, float]) -> None:
        """Write the files of an artifact that will stand in `directory` to `staging`."""
        facts, recipe_yaml = self._facts(step, metrics), dump_resolved(self.recipe, directory)
        write_artifact(staging, directory, self.loaded.model, self.loaded, facts, recipe_yaml)

    def _facts(self, step: int, metrics: dict[str, float]) -> dict[str, Any]:
        return {**self.stated, "seen": seen_until(self.data, step), "metrics": metrics}


def stage_facts(
    recipe: Recipe, stage: StageName, loaded: LoadedModel, data: StageData, parent: Path | None
) -> dict[str, Any]:
    """Collect what the manifest says of a stage, apart from how far it has come."""
    settings = recipe.stage(stage)
    return {
        "stage": stage,
        "parent_sha256": file_sha256(parent / WEIGHTS) if parent else None,
        "quantization": recipe.quantization.model_dump(),
        "template": {"name": settings.template, "system": settings.system},
        "images": image_facts(recipe, settings, loaded),
        "data": {
            "sha256": fingerprint(data.encoded.records),
            "records": len(data.encoded),
            "validation_records": len(data.validation),
            "validation_sha256": fingerprint(data.validation.records),
            "images": picture_facts([*data.encoded.records, *data.validation.records]),
            "skipped_records": len(data.skipped),
            "answer_prompt": settings.data.answer_prompt,
            "merge_turns": settings.data.merge_turns,
        },
    }


def seen_until(data: StageData, step: int) -> dict[str, int]:
    """Count what a stage has seen after `step` optimizer steps."""
    counts = data.counts[:step]
    return {
        "steps": step,
        "batch_size": data.length.batch_size,
        "conversations": sum(len(tree) for one in data.plan.steps[:step] for row in one for tree in row),
        "questions": sum(one.questions for one in counts),
        "supervised_tokens": sum(one.supervised_tokens for one in counts),
        "computed_tokens": sum(one.computed_tokens for one in counts),
    }
