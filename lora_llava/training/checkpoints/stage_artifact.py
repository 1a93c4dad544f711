"""Write the artifact of a stage, after its last step or at a checkpoint, with its manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lora_llava.artifact import save_artifact, write_artifact
from lora_llava.data.images.fingerprint import picture_facts
from lora_llava.data.load import fingerprint
from lora_llava.data.stage import StageData
from lora_llava.formats.manifest import MANIFEST
from lora_llava.formats.names import WEIGHTS
from lora_llava.modeling.base import LoadedModel
from lora_llava.recipe.file import dump_resolved
from lora_llava.run_directory.claim import place
from lora_llava.run_directory.output import writing_named
from lora_llava.system.files import file_sha256
from lora_llava.system.hub.artifact import source_facts
from lora_llava.training.stage import Stage


class StageArtifact:
    """Writes the weights of a stage, with the manifest of the step they are from."""

    def __init__(self, stage: Stage, loaded: LoadedModel, data: StageData) -> None:
        self.stage = stage
        self.loaded = loaded
        self.data = data
        self.manifest_fields = _manifest_fields(stage, loaded, data)

    def save(self, step: int, metrics: dict[str, float]) -> None:
        """Save the artifact of the finished stage in the run's directory."""
        directory = self.stage.directory
        fields, recipe_yaml = self._fields(step, metrics), dump_resolved(self.stage.recipe, directory)
        with writing_named(f"the artifact of stage {self.stage.name}", self.stage.run_directory):
            save_artifact(directory, self.loaded, fields, recipe_yaml, self._place)

    def _place(self, staging: Path, directory: Path) -> None:
        manifest = json.loads((staging / MANIFEST).read_text(encoding="utf-8"))
        place(self.stage.run_directory, staging, directory, {WEIGHTS: manifest["adapter_sha256"]})

    def write(
        self,
        staging: Path,
        directory: Path,
        step: int,
        metrics: dict[str, float],
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Write the files of an artifact to `staging`, from which they will move to `directory`.

        `weights`: the trained ones, by parameter name; None: those of the model.
        """
        fields, recipe_yaml = self._fields(step, metrics), dump_resolved(self.stage.recipe, directory)
        write_artifact(staging, directory, self.loaded, fields, recipe_yaml, weights)

    def _fields(self, step: int, metrics: dict[str, float]) -> dict[str, Any]:
        return {**self.manifest_fields, "seen": seen_until(self.data, step), "metrics": metrics}


def _manifest_fields(stage: Stage, loaded: LoadedModel, data: StageData) -> dict[str, Any]:
    """Collect the fields of the manifest that do not depend on the step."""
    settings = stage.settings
    return {
        "stage": stage.name,
        "parent_sha256": file_sha256(stage.parent / WEIGHTS) if stage.parent else None,
        "parent_hub": source_facts(stage.parent),
        "quantization": stage.recipe.quantization.model_dump(),
        "template": {"name": settings.template, "system": settings.system},
        "images": image_fields(stage, loaded),
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


def image_fields(stage: Stage, loaded: LoadedModel) -> dict[str, Any]:
    """Collect the fields of the manifest that say how an image becomes tokens."""
    transform, window = stage.image_transform(loaded), stage.settings.data.gray_window
    return {
        "size": transform.size,
        "mean": list(transform.mean),
        "std": list(transform.std),
        "image_aspect_ratio": transform.aspect_ratio,
        "window": window and list(window),
        "vision_feature_layer": loaded.config.vision_feature_layer,
        "vision_feature_select_strategy": loaded.config.vision_feature_select_strategy,
        "num_image_tokens": loaded.image_tokens.count,
    }


def seen_until(data: StageData, step: int) -> dict[str, int]:
    """Count what a stage was trained on in its first `step` optimizer steps."""
    counts = data.counts[:step]
    return {
        "steps": step,
        "batch_size": data.length.batch_size,
        "conversations": sum(len(tree) for rows in data.plan.steps[:step] for row in rows for tree in row),
        "questions": sum(count.questions for count in counts),
        "supervised_tokens": sum(count.supervised_tokens for count in counts),
        "computed_tokens": sum(count.computed_tokens for count in counts),
    }
