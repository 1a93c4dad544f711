"""What a stage leaves behind: one directory with everything it trained, and a manifest that says what it is.

`adapter_model.safetensors` holds LoRA and projector, in PEFT's own layout; plain `PeftModel.from_pretrained`
loads it. The manifest identifies an artifact by what it holds, never by its name.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from lora_llava.chat_template import chat_template
from lora_llava.conversation import get_template
from lora_llava.errors import ArtifactError
from lora_llava.files import remove_directory, staged
from lora_llava.modeling.assemble import save_processor
from lora_llava.modeling.base import BaseIdentity, LoadedModel, hash_weights, load_base, locate
from lora_llava.modeling.structure import PROJECTOR
from lora_llava.recipe import AdapterSettings
from lora_llava.recipe_stages import AspectRatio, StageName

MANIFEST = "manifest.json"
WEIGHTS = "adapter_model.safetensors"
RECIPE = "recipe.yaml"
MERGE_REPORT = "merge_report.json"
"""In a merged model: how it was made, and under `artifact` the manifest of what it was made from."""
FORMAT = 1
"""Version of the manifest; a reader refuses a newer one."""

_KEYS = {
    "base": ("name", "revision", "weights_sha256", "path"),
    "quantization": ("type", "double_quant"),
    "template": ("name", "system"),
    "images": ("image_aspect_ratio",),
}
"""What a reader needs of the manifest's mappings."""

_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "lora-llava")
_PROJECTOR_KEY = f"base_model.model.{PROJECTOR}."


@dataclass(frozen=True, slots=True)
class Manifest:
    """The manifest of an artifact; field names are the keys of `manifest.json`."""

    stage: StageName
    base: dict[str, Any]
    """`name`, `revision`, `weights_sha256`, and `path` from the artifact's directory if the base is local."""
    parent_sha256: str | None
    """Hash of the adapter this stage started from."""
    adapter_sha256: str
    quantization: dict[str, Any]
    template: dict[str, Any]
    images: dict[str, Any]
    data: dict[str, Any]
    seen: dict[str, Any]
    """Optimizer steps, conversations, supervised and computed tokens."""
    metrics: dict[str, float]
    versions: dict[str, str]
    format: int = FORMAT

    @property
    def usage(self) -> Usage:
        """How the trained model wants to be asked."""
        return Usage(self.template, self.images["image_aspect_ratio"], self.data.get("answer_prompt"))


@dataclass(frozen=True, slots=True)
class Usage:
    """How a model is asked as it was trained: the template, what becomes of images, the text after each question."""

    template: dict[str, Any]
    image_aspect_ratio: AspectRatio
    answer_prompt: str | None


LLAVA_USAGE = Usage({"name": "vicuna_v1", "system": None}, "pad", None)
"""How LLaVA-1.5 was trained, and so how a model without a record of its training is asked."""


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide what a run computes."""
    return {name: version(name) for name in _LIBRARIES}


def file_sha256(path: Path) -> str:
    """Hash a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def is_artifact(directory: Path) -> bool:
    """Tell an artifact from a model; ArtifactError for a directory that is neither."""
    if (directory / MANIFEST).is_file():
        return True
    if (directory / "config.json").is_file():
        return False
    raise ArtifactError(
        f"{directory} is neither an artifact (it has no {MANIFEST}) nor a model (no config.json). Give the directory "
        "of a stage, such as runs/NAME/instruct, or of a merged model. Adapters and checkpoints of other tools are "
        "brought in with: lora-llava import"
    )


def read_usage(directory: Path) -> Usage:
    """Return how an artifact, a merged model or any LLaVA in the llava-hf layout is to be asked."""
    manifest = read_manifest(directory) if is_artifact(directory) else merged_manifest(directory)
    return manifest.usage if manifest else LLAVA_USAGE


def merged_manifest(directory: Path) -> Manifest | None:
    """Return the manifest of the artifact that a model was merged from; None if its making is not recorded."""
    path = directory / MERGE_REPORT
    if not path.is_file():
        return None
    try:
        return Manifest(**json.loads(path.read_text(encoding="utf-8"))["artifact"])
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); merge the artifact again") from error


def load_model(
    directory: Path, *, device: torch.device, dtype: torch.dtype, base: str | None = None
) -> tuple[LoadedModel, Usage]:
    """Load an artifact onto its base, or a whole model, ready to answer; with how to ask it.

    Raises ArtifactError as `load_artifact` does, and if `base` is given for a model that needs none.
    """
    usage = read_usage(directory)
    if is_artifact(directory):
        return load_artifact(directory, device=device, dtype=dtype, base=base)[0], usage
    if base is not None:
        raise ArtifactError(f"{directory} is a whole model and has no base beside it; leave --base out")
    identity = BaseIdentity(directory.resolve().name, None, "")
    loaded = load_base(directory, identity, nf4=False, double_quant=False, dtype=dtype, device=device)
    loaded.model.eval()
    return loaded, usage


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest of an artifact; ArtifactError names what is wrong with it."""
    path = directory / MANIFEST
    if not path.is_file():
        raise ArtifactError(
            f"{directory} is not an artifact: it has no {MANIFEST}. Give the directory of a stage, such as "
            "runs/NAME/instruct."
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] > FORMAT:
            raise ArtifactError(f"{path}: format {data['format']} is newer than this program's {FORMAT}; update it")
        manifest = Manifest(**data)
        _check_keys(manifest)
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); take the artifact from its source again") from error
    weights = directory / WEIGHTS
    if not weights.is_file():
        raise ArtifactError(f"{directory}: {WEIGHTS} is missing")
    if (found := file_sha256(weights)) != manifest.adapter_sha256:
        raise ArtifactError(f"{weights} was altered: its sha256 is {found}, the manifest has {manifest.adapter_sha256}")
    return manifest


def portable(manifest: Manifest) -> dict[str, Any]:
    """Give a manifest without the base's place, which means nothing elsewhere."""
    return {**asdict(manifest), "base": {**manifest.base, "path": None}}


def _check_keys(manifest: Manifest) -> None:
    for field, keys in _KEYS.items():
        value = getattr(manifest, field)
        if not isinstance(value, dict) or any(key not in value for key in keys):
            raise KeyError(f"{field} must hold {', '.join(keys)}")


def save_artifact(
    directory: Path, model: PeftModel, loaded: LoadedModel, facts: dict[str, Any], recipe_yaml: str
) -> Manifest:
    """Write an artifact; the directory appears by rename when it is complete, in the place of an older one.

    `facts` are the manifest's fields other than `base`, `adapter_sha256` and `versions`.
    """
    remove_directory(directory)
    with staged(directory) as staging:
        return write_artifact(staging, directory, model, loaded, facts, recipe_yaml)


def write_artifact(
    staging: Path, directory: Path, model: PeftModel, loaded: LoadedModel, facts: dict[str, Any], recipe_yaml: str
) -> Manifest:
    """Write the files of an artifact that will stand in `directory` to `staging`; see `save_artifact`."""
    location = base_location(loaded.identity, loaded.directory, directory)
    for config in model.peft_config.values():
        config.base_model_name_or_path = location["path"] or location["name"]
        config.revision = location["revision"]
    model.save_pretrained(staging, save_embedding_layers=False)
    # PEFT's generic card claims things that are not so (task, library tags); a card is made on publishing.
    (staging / "README.md").unlink(missing_ok=True)
    template = get_template(**facts["template"])
    save_processor(
        staging,
        loaded.tokenizer,
        loaded.config,
        {"image_mean": loaded.image_mean, "image_std": loaded.image_std},
        aspect_ratio=facts["images"]["image_aspect_ratio"],
        chat_template=chat_template(template, loaded.tokenizer.eos_token),
    )
    dtype = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    facts = {**facts, "quantization": {**facts["quantization"], "compute_dtype": dtype}}
    (staging / RECIPE).write_text(recipe_yaml, encoding="utf-8")
    manifest = Manifest(
        base=location, adapter_sha256=file_sha256(staging / WEIGHTS), versions=library_versions(), **facts
    )
    (staging / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
    return manifest


def base_location(identity: BaseIdentity, directory: Path, artifact: Path) -> dict[str, Any]:
    """Describe the base so that it can be found again from the artifact: a hub id, or a relative path."""
    path = os.path.relpath(directory, artifact) if identity.revision is None else None
    return {**asdict(identity), "path": path}


def load_artifact(
    directory: Path, *, device: torch.device, dtype: torch.dtype, base: str | None = None
) -> tuple[LoadedModel, Manifest]:
    """Load an artifact onto its base, quantised as it was trained, ready to answer.

    `base` replaces the place where the manifest says the base is. Raises ArtifactError if the weights found
    there are not those the artifact was trained on.
    """
    manifest = read_manifest(directory)
    here = manifest.base["path"] and str(directory / manifest.base["path"])
    base_directory, _ = locate(base or here or manifest.base["name"], manifest.base["revision"])
    check_base(manifest, hash_weights(base_directory), str(base_directory), directory)
    loaded = load_base(
        base_directory,
        BaseIdentity(manifest.base["name"], manifest.base["revision"], manifest.base["weights_sha256"]),
        nf4=manifest.quantization["type"] == "nf4",
        double_quant=manifest.quantization["double_quant"],
        dtype=dtype,
        device=device,
    )
    loaded.model = PeftModel.from_pretrained(loaded.model, str(directory), torch_device=str(device))
    loaded.model.eval()
    return loaded, manifest


def check_base(
    manifest: Manifest, weights_sha256: str, found_at: str, artifact: Path, *, option: str = "--base"
) -> None:
    """Refuse a base other than the one the artifact was trained on; `option` names the way to give another."""
    wanted = manifest.base["weights_sha256"]
    if weights_sha256 != wanted:
        raise ArtifactError(
            f"{artifact} was trained on another base: weights {wanted} ({manifest.base['name']}), but those at "
            f"{found_at} are {weights_sha256}. Give the right one with {option}."
        )


def check_adapter(artifact: Path, wanted: AdapterSettings) -> None:
    """Refuse to go on training a LoRA of another form than the recipe states."""
    config = LoraConfig.from_pretrained(str(artifact))
    form = "dora" if config.use_dora else "rslora" if config.use_rslora else "lora"
    found = {"type": form, "r": config.r, "lora_alpha": config.lora_alpha}
    differing = [f"adapter.{name}: {value}" for name, value in found.items() if value != getattr(wanted, name)]
    if differing:
        raise ArtifactError(f"start_from: {artifact} has {', '.join(differing)}; set the recipe's to these")


def load_projector(artifact: Path, model: Any) -> None:
    """Copy the projector of an artifact into a bare base model."""
    state = {
        name.removeprefix(_PROJECTOR_KEY): tensor
        for name, tensor in load_file(artifact / WEIGHTS).items()
        if name.startswith(_PROJECTOR_KEY)
    }
    projector = model.get_submodule(PROJECTOR)
    if set(state) != set(projector.state_dict()):
        raise ArtifactError(f"{artifact}: its projector has {sorted(state)}, needed {sorted(projector.state_dict())}")
    projector.load_state_dict(state)
