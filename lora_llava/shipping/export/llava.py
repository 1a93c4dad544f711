"""Export to the layout of haotian-liu/LLaVA: a model as its checkpoint, an artifact as its LoRA or projector files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import LlavaConfig
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from lora_llava.artifact import Manifest, read_usage
from lora_llava.conversation.endings import write_generation_config
from lora_llava.errors import ArtifactError, ModelError
from lora_llava.formats.adapter_config import write_adapter_config
from lora_llava.formats.llava_hf import (
    WeightFiles,
    check_identical,
    each_tensor,
    expected_shapes,
    save_tensors,
    write_json,
    write_weights,
)
from lora_llava.formats.llava_original import (
    MM_PROJECTOR,
    NON_LORA,
    TOWER_DIRECTORY,
    from_original_name,
    identity_layer,
    is_linear,
    original_name,
    read_tensors,
    to_original_config,
)
from lora_llava.formats.names import EMBEDDINGS, LAYERS_PREFIX, PEFT_PREFIX, PROJECTOR_PREFIX, TOWER_PREFIX, WEIGHTS
from lora_llava.formats.peft_adapter import Adapter
from lora_llava.formats.processor import clip_image_settings
from lora_llava.formats.shapes import LlavaShape
from lora_llava.formats.tokenizer import read_tokenizer
from lora_llava.formats.transformers_4 import PREPROCESSOR, PROCESSOR, join_merges, with_old_names
from lora_llava.modeling.metadata import read_config
from lora_llava.planning.preflight.shipping import no_llava
from lora_llava.run_directory.claim import is_artifact
from lora_llava.shipping.export.hf import copy_surroundings
from lora_llava.shipping.export.options import ExportOptions, ExportReport, record_source
from lora_llava.shipping.merge.run import open_source
from lora_llava.system.files import staged_result
from lora_llava.system.text import counted, dtype_name

_CLIP_L_336 = "openai/clip-vit-large-patch14-336"
"""The vision tower of LLaVA-1.5, recognized by its shape."""
_SECOND = "multi_modal_projector.linear_2."


def export_llava(source: Path, output: Path, options: ExportOptions) -> ExportReport:
    """Write an artifact as the original's LoRA or projector files, a model as the original's checkpoint.

    Every tensor is read back and compared bit by bit. Raises ArtifactError or ModelError for
    what the original layout cannot hold.
    """
    return (_export_adapter if is_artifact(source) else _export_model)(source, output, options)


def _check_support(config: LlavaConfig) -> None:
    """Raise ModelError for a model that the original code would load as another one, or not at all."""
    if reasons := list(no_llava(LlavaShape.of(config.to_dict()))):
        raise ModelError("; ".join(reasons))


def _export_model(source: Path, output: Path, options: ExportOptions) -> ExportReport:
    config = read_config(source)
    _check_support(config)
    files = WeightFiles(source)
    files.check(config)
    names = sorted(expected_shapes(config))
    projector = (name for name in names if name.startswith(PROJECTOR_PREFIX))
    skipped = _left_out({name: files.read(name) for name in projector}) if is_linear(config) else set()
    original = {name: original_name(name, linear=is_linear(config)) for name in names if name not in skipped}
    main = [name for name in original if not name.startswith(TOWER_PREFIX)]
    tower = options.vision_tower or TOWER_DIRECTORY
    with staged_result(output) as staging:
        write_weights(staging, ((original[name], files.read(name)) for name in main))
        _check_written(staging, {original[name]: name for name in main}, files)
        if options.vision_tower is None:
            _write_tower(staging / TOWER_DIRECTORY, source, config, files)
        copy_surroundings(source, staging, options)
        join_merges(staging / "tokenizer.json")
        record_source(staging, source)
        # The original code reads the tower's own preprocessor_config.json.
        for name in (PROCESSOR, PREPROCESSOR):
            (staging / name).unlink(missing_ok=True)
        aspect_ratio = read_usage(source, options.template).image_aspect_ratio
        write_json(staging / "config.json", to_original_config(config, files.dtype(EMBEDDINGS), tower, aspect_ratio))
    is_named = options.vision_tower is not None
    where = f"{tower}, by name (not compared with the model's)" if is_named else "in its directory vision_tower"
    lines = [
        f"{output}: {len(original)} tensors in the original layout, each read back and equal",
        f"vision tower: {where}",
        f"vocabulary: {config.text_config.vocab_size} rows, including <image> and padding",
    ]
    if not is_named:
        lines.append("the original code looks for the tower in the current directory: run it from this one")
    return {"summary": lines}


def _check_written(directory: Path, sources: dict[str, str], files: WeightFiles) -> None:
    """Raise ArtifactError unless the files of `directory` hold the tensors of `files`; `sources`: their names there."""
    remaining = dict(sources)
    for name, tensor in each_tensor(directory):
        check_identical(tensor, files.read(remaining.pop(name)), name)
    if remaining:
        raise ArtifactError(f"{directory}: {', '.join(sorted(remaining)[:3])} was not written; please report it")


def _write_tower(directory: Path, source: Path, config: LlavaConfig, files: WeightFiles) -> None:
    """Write the vision tower for `CLIPVisionModel.from_pretrained`, as CLIP is published."""
    directory.mkdir()
    sources = {
        name.removeprefix(TOWER_PREFIX): name for name in expected_shapes(config) if name.startswith(TOWER_PREFIX)
    }
    write_weights(directory, ((name, files.read(sources[name])) for name in sorted(sources)))
    _check_written(directory, sources, files)
    pixels, _ = ImageProcessingMixin.get_image_processor_dict(source)
    settings = clip_image_settings(int(config.vision_config.image_size), pixels)
    CLIPImageProcessorPil(**settings).save_pretrained(directory)
    dtype = dtype_name(files.dtype(f"{TOWER_PREFIX}vision_model.embeddings.class_embedding"))
    vision = {**config.vision_config.to_dict(), "architectures": ["CLIPVisionModel"], "dtype": dtype}
    write_json(directory / "config.json", with_old_names(vision))


def _left_out(projector: Mapping[str, torch.Tensor]) -> set[str]:
    """Return the names that a one-layer projector leaves out; ArtifactError unless they hold the identity."""
    second = {name: tensor for name, tensor in projector.items() if name.startswith(_SECOND)}
    weight = second[f"{_SECOND}weight"]
    identity = identity_layer(weight.shape[0], weight.dtype, bias=len(second) > 1)
    if any(not torch.equal(second[name], identity[name]) for name in second):
        raise ArtifactError(
            "the projector's second layer is not the identity, and the original's linear one has no second"
        )
    return set(second)


def _tower_name(config: LlavaConfig) -> str:
    vision = config.vision_config
    if (vision.image_size, vision.patch_size, vision.hidden_size, vision.num_hidden_layers) == (336, 14, 1024, 24):
        return _CLIP_L_336
    raise ArtifactError(
        "the original layout names its vision tower, and this base's is not CLIP ViT-L/14-336; give --vision-tower NAME"
    )


def _lora_parts(adapter: Adapter) -> Iterator[tuple[str, str]]:
    """Yield each LoRA tensor's name in the original layout, and its name in the artifact's file."""
    for name, keys in adapter.layers.items():
        module = original_name(name, linear=False).removesuffix(".weight")
        for key in (keys.a, keys.b, keys.magnitude):
            if key is not None:
                yield f"{PEFT_PREFIX}{module}.lora_{key.rpartition('.lora_')[2]}", key


def _export_adapter(source: Path, output: Path, options: ExportOptions) -> ExportReport:
    """Write an artifact as the original's LoRA directory, or as `mm_projector.bin` if it holds no LoRA."""
    opened = open_source(source, options.base_model)
    manifest, adapter, config = opened.manifest, opened.adapter, opened.config
    _check_support(config)
    other = [name for name in adapter.layers if not name.startswith(LAYERS_PREFIX)]
    other += [name for name in adapter.replaced if not name.startswith(PROJECTOR_PREFIX)]
    if other:
        raise ArtifactError(
            f"{source}: changes {', '.join(sorted(other)[:3])}; in the original layout only the language model's "
            "layers have LoRA and only the projector is replaced. Merge it, and export the merged model."
        )
    projector = {name: adapter.stored(key) for name, key in adapter.replaced.items()}
    if is_linear(config):
        for name in _left_out(projector):
            del projector[name]
    named = {original_name(name, linear=is_linear(config)): tensor for name, tensor in projector.items()}
    tower = options.vision_tower or _tower_name(config)
    with staged_result(output) as staging:
        if adapter.layers:
            _write_lora(staging, adapter, manifest)
            tokenizer = read_tokenizer(source)
            write_generation_config(staging, opened.surroundings, opened.template, tokenizer)
            torch.save({f"{PEFT_PREFIX}{name}": tensor for name, tensor in named.items()}, staging / NON_LORA)
        else:
            torch.save(named, staging / MM_PROJECTOR)
        _check_adapter(staging, adapter, projector)
        record_source(staging, source)
        ratio = manifest.images["image_aspect_ratio"]
        write_json(staging / "config.json", to_original_config(config, torch.float16, tower, ratio))
    what = f"LoRA on {counted(len(adapter.layers), 'layer')} and the projector" if adapter.layers else "the projector"
    lines = [f"{output}: {what} in the original layout, read back and equal"]
    if adapter.layers:
        lines.append("the original code loads a directory as LoRA only if its name contains both 'llava' and 'lora'")
    return {"summary": lines}


def _write_lora(staging: Path, adapter: Adapter, manifest: Manifest) -> None:
    """Write LoRA as PEFT does for the original code's language model."""
    state = {name: adapter.stored(key) for name, key in _lora_parts(adapter)}
    save_tensors(state, staging / WEIGHTS)
    config = adapter.config
    modules = {name.rsplit(".", 2)[-2] for name in adapter.layers}
    theirs = LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        rank_pattern=_renamed(config.rank_pattern),
        alpha_pattern=_renamed(config.alpha_pattern),
        # The original's vision tower has layers of the same names.
        target_modules=rf"model\.layers\..*\.({'|'.join(sorted(modules))})",
        task_type="CAUSAL_LM",
    )
    write_adapter_config(staging, theirs, manifest.base["name"], auto_class=False)


def _renamed(pattern: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("model.language_model.", "model."): value for name, value in pattern.items()}


def _check_adapter(staging: Path, adapter: Adapter, projector: Mapping[str, torch.Tensor]) -> None:
    """Read the files back and compare each tensor with the artifact's."""
    path = staging / (NON_LORA if adapter.layers else MM_PROJECTOR)
    written = {from_original_name(name): tensor for name, tensor in read_tensors(path).items()}
    lora = read_tensors(staging / WEIGHTS) if adapter.layers else {}
    keys = dict(_lora_parts(adapter))
    if written.keys() != projector.keys() or lora.keys() != keys.keys():
        raise ArtifactError(f"{staging}: its tensors are not those of the artifact; please report it")
    for name, tensor in projector.items():
        check_identical(written[name], tensor, name)
    for name, key in keys.items():
        check_identical(lora[name], adapter.stored(key), name)
