"""The artifact of a stage: a directory with everything the stage trained, and a manifest that describes it.

`adapter_model.safetensors` holds LoRA and projector in PEFT's layout, so that `PeftModel.from_pretrained` loads it. The
manifest identifies an artifact by its content, never by its name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from lora_llava.conversation.chat_template import OwnTemplate, chat_template, read_own_template, recognize
from lora_llava.conversation.endings import stated_ends, write_generation_config
from lora_llava.conversation.templates import TEMPLATES, Template, get_template
from lora_llava.errors import ArtifactError
from lora_llava.formats.adapter_config import write_adapter_config
from lora_llava.formats.llava_hf import expected_shapes
from lora_llava.formats.manifest import BASE_OPTION, FORMAT, MANIFEST, base_of, manifest_problem
from lora_llava.formats.names import MERGE_REPORT, WEIGHTS
from lora_llava.formats.peft_adapter import Adapter
from lora_llava.formats.processor import save_processor
from lora_llava.formats.tokenizer import read_tokenizer
from lora_llava.formats.transformers_4 import PREPROCESSOR, PROCESSOR
from lora_llava.modeling.base import BaseIdentity, LoadedModel, check_finite, hash_weights, load_base
from lora_llava.modeling.identity import Fields, base_fields, check_base_files, check_unchanged, record
from lora_llava.modeling.merged import check_merged
from lora_llava.modeling.metadata import hub_errors, locate, read_config
from lora_llava.recipe.stages import AspectRatio, StageName
from lora_llava.run_directory.claim import is_artifact, require_artifact
from lora_llava.system.device import pick_device, pick_dtype
from lora_llava.system.files import (
    Place,
    file_sha256,
    json_text,
    place_new,
    read_json,
    refuse_irregular,
    staged,
)
from lora_llava.system.hub.artifact import located
from lora_llava.system.text import dtype_name, first_line

RECIPE = "recipe.yaml"

_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "lora-llava")


@dataclass(frozen=True, slots=True)
class Manifest:
    """The manifest of an artifact; field names are the keys of `manifest.json`."""

    stage: StageName
    base: dict[str, Any]
    """`name`, `revision`, `weights_sha256`, and `path` from the artifact's directory if the base is local."""
    parent_sha256: str | None
    """Hash of the adapter that the stage started from; None if it started from the base."""
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
    identity: dict[str, Any] | None = None
    """What decides the answers, as `modeling.identity` records it; None in format 1."""
    parent_hub: dict[str, Any] | None = None
    """`repo_id` and `revision` of the adapter that the stage started from, if it came from the Hub."""

    @property
    def usage(self) -> Usage:
        """How to prompt the trained model."""
        window = self.images.get("window")
        ratio, prompt = self.images["image_aspect_ratio"], self.data.get("answer_prompt")
        return Usage(self.template, ratio, prompt, window=window and tuple(window))


@dataclass(frozen=True, slots=True)
class Usage:
    """How to prompt a model as in training: template, image transform, text after each question."""

    template: dict[str, Any] | None
    """`name` and `system` of a template of the kit; None if none of them matches the model's."""
    image_aspect_ratio: AspectRatio
    answer_prompt: str | None
    own: OwnTemplate | None = None
    """The model's own chat template, if none of the kit's matches it."""
    window: tuple[float, float] | None = None
    """Values of gray images with more than 8 bits that become black and white; None: the range of each image."""

    @property
    def prompt_template(self) -> Template | OwnTemplate | None:
        """The template to prompt with; None if it is unknown."""
        return self.own if self.template is None else get_template(**self.template)


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that determine what a run computes."""
    return {name: version(name) for name in _LIBRARIES}


def read_usage(directory: Path, template: str | None = None) -> Usage:
    """Return how to prompt an artifact, a merged model or any LLaVA in the llava-hf layout.

    From its manifest or, without one, from the chat template in its directory. `template` names one of the kit's for a
    model that has neither, or a wrong one; ArtifactError for an artifact, whose manifest names its template.
    """
    manifest = read_manifest(directory) if is_artifact(directory) else merged_manifest(directory)
    if template is not None:
        if is_artifact(directory):
            raise ArtifactError(f"{directory} is an artifact, whose manifest names its template; leave --template out")
        get_template(template)
        known = manifest.usage if manifest else Usage(None, _aspect_ratio(directory), None)
        return replace(known, template={"name": template, "system": None}, own=None)
    if manifest is not None:
        return manifest.usage
    own = read_own_template(directory)
    known_template = recognize(own) if own else None
    if known_template is None:
        return Usage(None, _aspect_ratio(directory), None, own)
    return Usage({"name": known_template.name, "system": known_template.system}, _aspect_ratio(directory), None)


def template_to_ask(usage: Usage, directory: Path) -> Template | OwnTemplate:
    """Return the template to prompt a model with; ArtifactError if its directory does not say which."""
    if (template := usage.prompt_template) is None:
        raise ArtifactError(
            f"{directory} does not name its template: it has neither a {MERGE_REPORT} nor a chat template "
            f"(chat_template.jinja, or chat_template in tokenizer_config.json). Name the template that it was trained "
            f"in: --template {' or '.join(TEMPLATES)}"
        )
    return template


def _aspect_ratio(directory: Path) -> AspectRatio:
    """Read whether a model's processor pads images to a square, as LLaVA-1.5 does; old files do not say."""
    nested = read_json(directory / PROCESSOR).get("image_processor")
    # transformers, too, takes the nested settings before the file of their own.
    images = nested if isinstance(nested, dict) else {"do_pad": True, **read_json(directory / PREPROCESSOR)}
    return "pad" if images.get("do_pad") else "square"


def merged_manifest(directory: Path) -> Manifest | None:
    """Return the manifest of the artifact that a model was merged from; None without a merge report."""
    path = directory / MERGE_REPORT
    if not path.is_file():
        return None
    fix = "merge the artifact again"
    return _manifest_from(read_json(path, ArtifactError, fix).get("artifact"), path, fix)


def load_model(
    directory: Path | str,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    base: str | None = None,
    template: str | None = None,
    keep_dequantized: bool | None = False,
) -> tuple[LoadedModel, Usage]:
    """Load an artifact onto its base, or a whole model, for inference; also return how to prompt it.

    `device`: None takes the GPU if there is one; `dtype`: None takes what `precision: auto` takes there.
    `base`, `keep_dequantized` and `template` are as in `load_artifact` and `read_usage`. Raises ArtifactError as these
    do, for a model whose template is unknown, and if `base` is given for a whole model.
    """
    directory, device = located(directory), device or pick_device()
    dtype = dtype or pick_dtype("auto", device)
    usage = read_usage(directory, template)
    template_to_ask(usage, directory)
    if is_artifact(directory):
        loaded, _ = load_artifact(directory, device=device, dtype=dtype, base=base, keep_dequantized=keep_dequantized)
        return loaded, usage
    if base is not None:
        raise ArtifactError(f"{directory} is a whole model and needs no base; leave {BASE_OPTION} out")
    check_merged(directory)
    identity = BaseIdentity(directory.resolve().name, None, "")
    loaded = load_base(directory, identity, nf4=False, double_quant=False, dtype=dtype, device=device)
    check_finite(loaded.model, directory)
    loaded.model.eval()
    return loaded, usage


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of an artifact and check the adapter against it; ArtifactError says what is wrong."""
    path = directory / MANIFEST
    require_artifact(directory)
    refuse_irregular(directory, ArtifactError)
    data = read_json(path, ArtifactError, "take it from its source again")
    if isinstance(version := data.get("format"), int) and version > FORMAT:
        raise ArtifactError(f"{path}: format {version} is newer than this program's {FORMAT}; update it")
    manifest = _manifest_from(data, path, "take the artifact from its source again")
    weights = directory / WEIGHTS
    if not weights.is_file():
        raise ArtifactError(f"{directory}: {WEIGHTS} is missing; take the artifact from its source again")
    if (sha256 := file_sha256(weights)) != manifest.adapter_sha256:
        altered = f"was altered: its sha256 is {sha256}, the manifest has {manifest.adapter_sha256}"
        raise ArtifactError(f"{weights} {altered}; take the artifact from its source again")
    check_unchanged(asdict(manifest), directory)
    return manifest


def portable(manifest: Manifest) -> dict[str, Any]:
    """Return the manifest without the base's local path, for publishing."""
    return {**asdict(manifest), "base": {**manifest.base, "path": None}}


def _manifest_from(data: object, path: Path, fix: str) -> Manifest:
    """Return the manifest in the content of a JSON file; ArtifactError if it is none."""
    problem = manifest_problem(data) if isinstance(data, dict) else "it is not a mapping"
    if problem is None:
        try:
            return Manifest(**data)  # type: ignore[arg-type]  # keys and values were checked
        except TypeError as error:
            problem = first_line(error)
    raise ArtifactError(f"{path} is damaged ({problem}); {fix}")


def save_artifact(
    directory: Path, loaded: LoadedModel, facts: dict[str, Any], recipe_yaml: str, place: Place = place_new
) -> Manifest:
    """Write the artifact of `loaded.model`; once complete, its directory is renamed into position, or moved by `place`.

    `facts`: the manifest's fields other than `base`, `adapter_sha256` and `versions`.
    """
    with staged(directory, place) as staging:
        return write_artifact(staging, directory, loaded, facts, recipe_yaml)


def write_artifact(
    staging: Path,
    directory: Path,
    loaded: LoadedModel,
    facts: dict[str, Any],
    recipe_yaml: str,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> Manifest:
    """Write an artifact to `staging`, to be moved to `directory`; `weights`, by parameter name, replace the model's."""
    model, location = loaded.model, base_location(loaded.identity, loaded.directory, directory)
    state = {**dict(model.named_parameters()), **weights} if weights else None
    # PEFT's generic card states a wrong task and wrong tags; the kit writes its own when the model is published.
    model.create_or_update_model_card = lambda _: None
    model.save_pretrained(staging, save_embedding_layers=False, state_dict=state)
    reference = loaded.identity.reference(loaded.directory)
    write_adapter_config(staging, model.peft_config["default"], reference, location["revision"])
    template, dtype = get_template(**facts["template"]), dtype_name(model.get_input_embeddings().weight.dtype)
    save_processor(
        staging,
        loaded.tokenizer,
        loaded.config,
        {"image_mean": loaded.image_mean, "image_std": loaded.image_std},
        aspect_ratio=facts["images"]["image_aspect_ratio"],
        jinja=chat_template(template, loaded.tokenizer.eos_token),
        is_model=False,
    )
    write_generation_config(staging, loaded.directory, template, loaded.tokenizer)
    facts = {**facts, "quantization": {**facts["quantization"], "compute_dtype": dtype}}
    (staging / RECIPE).write_text(recipe_yaml, encoding="utf-8")
    sha256 = file_sha256(staging / WEIGHTS)
    manifest = Manifest(base=location, adapter_sha256=sha256, versions=library_versions(), **facts)
    return write_manifest(staging, manifest, loaded.identity.fields)


def write_manifest(directory: Path, manifest: Manifest, base: Fields) -> Manifest:
    """Write the manifest of an artifact whose other files are written, with its identity; return it."""
    manifest = replace(manifest, identity=record(asdict(manifest), directory, base))
    (directory / MANIFEST).write_text(json_text(asdict(manifest), indent=2) + "\n", encoding="utf-8")
    return manifest


def base_location(identity: BaseIdentity, directory: Path, artifact: Path) -> dict[str, Any]:
    """Return how to locate the base from the artifact: by a hub id, or by a relative path."""
    # Resolve links in both: the file system follows `..` from the real directory, not from the name of a link.
    path = os.path.relpath(directory.resolve(), artifact.resolve()) if identity.revision is None else None
    facts = {"name": identity.name, "revision": identity.revision, "weights_sha256": identity.weights_sha256}
    return {**facts, "path": path}


def load_artifact(
    directory: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    base: str | None = None,
    keep_dequantized: bool | None = False,
) -> tuple[LoadedModel, Manifest]:
    """Load an artifact onto its base, quantized as in training, for inference.

    The tokenizer is the artifact's own. `base` replaces the base's location in the manifest; `keep_dequantized` is as
    in `load_base`. Raises ArtifactError if the base, or the adapter, is not the one of training.
    """
    manifest = read_manifest(directory)
    base_directory = find_base(manifest, directory, base)
    fields = base_fields(base_directory)
    check_base_files(asdict(manifest), fields, str(base_directory), directory)
    Adapter(directory).check(expected_shapes(read_config(base_directory)), finite=True)
    check_base(manifest, hash_weights(base_directory), str(base_directory), directory)
    loaded = load_base(
        base_directory,
        BaseIdentity(manifest.base["name"], manifest.base["revision"], manifest.base["weights_sha256"], fields),
        nf4=manifest.quantization["type"] == "nf4",
        double_quant=manifest.quantization["double_quant"],
        dtype=dtype,
        device=device,
        keep_dequantized=keep_dequantized,
    )
    with hub_errors("artifact", str(directory)):
        loaded.tokenizer = read_tokenizer(directory)
    # Training decides which tokens end an answer, not the base alone.
    if ends := stated_ends(directory):
        loaded.model.generation_config.eos_token_id = ends
    with hub_errors("artifact", str(directory)):
        loaded.model = PeftModel.from_pretrained(loaded.model, str(directory), torch_device=str(device))
    loaded.model.eval()
    return loaded, manifest


def find_base(manifest: Manifest, artifact: Path, base: str | None = None) -> Path:
    """Return the directory of an artifact's base, as `base_of` names it; one of the Hub is downloaded."""
    return locate(base_of(manifest.base, artifact, base), manifest.base["revision"])[0]


def add_adapter(loaded: LoadedModel, directory: Path, name: str) -> Usage:
    """Load a second artifact as adapter `name` onto the base of a loaded one, which stays active; return its usage.

    Raises ArtifactError if it was trained on another base.
    """
    manifest = read_manifest(directory)
    check_base_files(asdict(manifest), loaded.identity.fields, str(loaded.directory), directory)
    check_base(manifest, loaded.identity.weights_sha256, str(loaded.directory), directory)
    Adapter(directory).check(expected_shapes(loaded.config), finite=True)
    device = next(loaded.model.parameters()).device
    with hub_errors("artifact", str(directory)):
        loaded.model.load_adapter(str(directory), adapter_name=name, torch_device=str(device))
    loaded.model.eval()
    return manifest.usage


def check_base(manifest: Manifest, weights_sha256: str, location: str, artifact: Path) -> None:
    """Raise ArtifactError for a base other than the one that the artifact was trained on."""
    expected = manifest.base["weights_sha256"]
    if weights_sha256 != expected:
        raise ArtifactError(
            f"{artifact} was trained on another base: weights {expected} ({manifest.base['name']}), but those at "
            f"{location} are {weights_sha256}. Give the right one with {BASE_OPTION} DIR."
        )
