"""What a stage takes over from the artifact that it starts from."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_llava.artifact import check_base, read_manifest
from lora_llava.errors import ArtifactError
from lora_llava.formats.llava_hf import open_weights
from lora_llava.formats.names import ADAPTER_CONFIG, PEFT_PREFIX, WEIGHTS
from lora_llava.modeling.identity import check_base_files
from lora_llava.modeling.structure import PROJECTOR
from lora_llava.recipe.settings import AdapterSettings
from lora_llava.recipe.start import adapter_of
from lora_llava.system.files import read_json, shown_path
from lora_llava.training.stage import Stage

_PROJECTOR_KEY = f"{PEFT_PREFIX}{PROJECTOR}."


def check_parent(stage: Stage) -> None:
    """Raise ArtifactError unless the artifact that a stage starts from is whole, and of the stage's base."""
    if stage.parent is not None:
        manifest, found_at = read_manifest(stage.parent), shown_path(stage.base_directory)
        check_base_files(asdict(manifest), stage.base.fields, found_at, stage.parent, training=True)
        check_base(manifest, stage.base.weights_sha256, found_at, stage.parent)


def check_adapter(artifact: Path, adapter: AdapterSettings) -> None:
    """Raise ArtifactError if the LoRA to continue from differs from the recipe's; `recipe.start` checks before."""
    settings = adapter_of(read_json(artifact / ADAPTER_CONFIG, ArtifactError, "take it from its source again"))
    differing = [
        f"adapter.{name}: {value}" for name, value in settings.items() if value not in (None, getattr(adapter, name))
    ]
    if differing:
        raise ArtifactError(f"start_from: {artifact} has {', '.join(differing)}; set the recipe's to these")


def load_projector(artifact: Path, model: Any) -> None:
    """Copy the projector of an artifact into a base model without an adapter."""
    with open_weights(artifact / WEIGHTS) as handle:
        names = [name for name in handle.keys() if name.startswith(_PROJECTOR_KEY)]  # noqa: SIM118 - not a dict
        state = {name.removeprefix(_PROJECTOR_KEY): handle.get_tensor(name) for name in names}
    projector = model.get_submodule(PROJECTOR)
    if set(state) != set(projector.state_dict()):
        raise ArtifactError(f"{artifact}: its projector has {sorted(state)}, needed {sorted(projector.state_dict())}")
    projector.load_state_dict(state)
