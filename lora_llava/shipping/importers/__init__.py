"""Import models and adapters of other tools, as an artifact or a model in the llava-hf layout."""

from __future__ import annotations

from pathlib import Path

from lora_llava.errors import ArtifactError, ModelError, RecipeError
from lora_llava.shipping.importers.options import ImportOptions
from lora_llava.system.files import read_json, refuse_irregular


def import_any(source: Path, output: Path, options: ImportOptions) -> list[str]:
    """Import `source`, which is recognized by its files; return lines that say what it was and what was written.

    An adapter (PEFT's, for llava-hf or for the original code) and a projector file become an artifact; an original
    LLaVA-1.5 checkpoint becomes a model in the llava-hf layout. Raises ArtifactError or ModelError for
    anything else, RecipeError for an option that does not apply to it.
    """
    if not source.exists():
        raise ArtifactError(f"{source} does not exist")
    refuse_irregular(source, ModelError)
    from lora_llava.formats.llava_original import MM_PROJECTOR
    from lora_llava.formats.names import ADAPTER_CONFIG
    from lora_llava.formats.weight_files import has_safetensors, pickled_files
    from lora_llava.shipping.importers.adapter import import_adapter, import_projector
    from lora_llava.shipping.importers.checkpoint import import_checkpoint

    if source.is_file():
        _refuse_tower(options, source)
        return import_projector(source, output, options)
    if (source / "manifest.json").is_file():
        raise ArtifactError(f"{source} is already an artifact; there is nothing to import")
    if (source / ADAPTER_CONFIG).is_file():
        _refuse_tower(options, source)
        return import_adapter(source, output, options)
    config = source / "config.json"
    if config.is_file() and (has_safetensors(source) or pickled_files(source)):
        if read_json(config).get("architectures") == ["LlavaForConditionalGeneration"]:
            raise ArtifactError(f"{source} is already in the llava-hf layout; use it as base.model_name_or_path")
        if options.base_model is not None or options.quantization is not None:
            raise RecipeError(f"{source} is a whole model and needs no base; leave --base-model and --quantization out")
        return import_checkpoint(source, output, options)
    if (source / MM_PROJECTOR).is_file():
        _refuse_tower(options, source)
        return import_projector(source / MM_PROJECTOR, output, options)
    raise ArtifactError(
        f"{source}: nothing that can be imported; it must hold adapter_config.json, {MM_PROJECTOR}, or config.json "
        "with weights"
    )


def _refuse_tower(options: ImportOptions, source: Path) -> None:
    """Raise RecipeError for a vision tower that would not be read."""
    if options.vision_tower is not None:
        raise RecipeError(f"--vision-tower applies to an original checkpoint; the tower of {source} is its base's")
