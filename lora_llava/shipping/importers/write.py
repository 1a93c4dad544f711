"""Write a foreign adapter as an artifact on its base."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.constants import DUMMY_TARGET_MODULES
from transformers import LlavaConfig

from lora_llava.artifact import Manifest, base_location, library_versions, write_manifest
from lora_llava.conversation.templates import Template, get_template
from lora_llava.errors import ArtifactError
from lora_llava.formats.adapter_config import write_adapter_config
from lora_llava.formats.llava_hf import WeightFiles, expected_shapes, save_tensors
from lora_llava.formats.llava_original import identity_layer, is_linear
from lora_llava.formats.names import PEFT_PREFIX, PROJECTOR_PREFIX, WEIGHTS, memory_name
from lora_llava.formats.peft_adapter import Adapter, lora_fits, lora_scaling, merge_lora
from lora_llava.formats.processor import save_surroundings
from lora_llava.modeling.base import BaseIdentity, hash_weights
from lora_llava.modeling.identity import base_fields
from lora_llava.modeling.metadata import locate, read_config
from lora_llava.modeling.structure import num_image_tokens
from lora_llava.recipe.stages import STAGES, AspectRatio, trains_lora
from lora_llava.system.files import file_sha256, staged_result

_BLOCK = re.compile(r"^model\.language_model\.layers\.\d+\..*\.(\w+)$")


@dataclass(frozen=True, slots=True)
class LayerLora:
    """LoRA of one layer: `scale * B A`, with the scale from `alpha` and the rank."""

    a: torch.Tensor
    """(rank, inputs)."""
    b: torch.Tensor
    """(outputs, rank)."""
    magnitude: torch.Tensor | None
    """DoRA's row norms, of `outputs` elements."""
    alpha: float


@dataclass(frozen=True, slots=True)
class ForeignAdapter:
    """An adapter of another tool, with canonical names."""

    layers: dict[str, LayerLora]
    replaced: dict[str, torch.Tensor]
    form: LoraConfig | None
    """Settings of its LoRA; None without one."""
    template: Template
    aspect_ratio: AspectRatio


@dataclass(frozen=True, slots=True)
class Base:
    """The base that an adapter was trained on."""

    directory: Path
    identity: BaseIdentity
    config: LlavaConfig


def open_base(base_model: str | None, source: Path) -> Base:
    """Locate and hash the base that the user names; ArtifactError if none is named."""
    if base_model is None:
        raise ArtifactError(
            f"{source}: name the base that it was trained on with --base-model: directory or hub id of a LLaVA in the "
            "llava-hf layout"
        )
    directory, revision = locate(base_model, None)
    config = read_config(directory)
    WeightFiles(directory).check(config)
    name = base_model if revision else directory.resolve().name
    return Base(directory, BaseIdentity(name, revision, hash_weights(directory)), config)


def write_artifact(
    output: Path, foreign: ForeignAdapter, base: Base, source: Path, quantization: dict[str, Any]
) -> None:
    """Write an artifact with the adapter's projector, its LoRA merged, or else with the base's.

    `quantization`: how the base was quantized in training, as a manifest says it.
    Raises ArtifactError for an adapter that does not fit the base.
    """
    shapes = expected_shapes(base.config)
    if unknown := sorted({*foreign.layers, *foreign.replaced} - shapes.keys()):
        raise ArtifactError(f"{source}: the base has no {', '.join(unknown[:6])}; it was trained on another")
    for name, layer in foreign.layers.items():
        b, a = tuple(layer.b.shape), tuple(layer.a.shape)
        if not lora_fits(a, b, shapes[name]):
            raise ArtifactError(f"{source}: LoRA {b} x {a} does not fit {name}, {shapes[name]}; another base?")
    for name, tensor in foreign.replaced.items():
        if tuple(tensor.shape) != shapes[name]:
            raise ArtifactError(f"{source}: {name} is {tuple(tensor.shape)}, {shapes[name]} in the base; another base?")
    layers, replaced = _whole_projector(foreign, base)
    # None: the template's own.
    own_system = None if foreign.template == get_template(foreign.template.name) else foreign.template.system
    with staged_result(output) as staging:
        save_tensors(_named(layers, replaced), staging / WEIGHTS)
        location = base_location(base.identity, base.directory, output)
        form = _form(foreign.form, layers, _whole_modules(replaced, shapes, source))
        write_adapter_config(staging, form, base.identity.reference(base.directory), location["revision"])
        Adapter(staging).check(shapes)
        images = _save_surroundings(staging, foreign, base)
        manifest = Manifest(
            stage=next(stage for stage in STAGES if trains_lora(stage) == bool(layers)),
            base=location,
            parent_sha256=None,
            adapter_sha256=file_sha256(staging / WEIGHTS),
            quantization=quantization,
            template={"name": foreign.template.name, "system": own_system},
            images=images,
            data={"answer_prompt": None},
            seen={},
            metrics={},
            versions=library_versions(),
        )
        write_manifest(staging, manifest, base_fields(base.directory))


def _whole_projector(foreign: ForeignAdapter, base: Base) -> tuple[dict[str, LayerLora], dict[str, torch.Tensor]]:
    """Return LoRA and replaced weights with a complete projector, which an artifact holds as whole weights."""
    files = WeightFiles(base.directory)
    replaced = dict(foreign.replaced)
    projector = [name for name in files if name.startswith(PROJECTOR_PREFIX)]
    if is_linear(base.config) and any(name in replaced for name in projector):
        # The original's linear projector has one layer; llava-hf's second one is then the identity.
        known = next(replaced[name] for name in projector if name in replaced)
        bias = f"{PROJECTOR_PREFIX}linear_2.bias" in files
        for name, tensor in identity_layer(int(base.config.text_config.hidden_size), known.dtype, bias=bias).items():
            replaced.setdefault(name, tensor)
    present = [name for name in projector if name in replaced]
    if present and (missing := sorted(set(projector) - set(present))):
        raise ArtifactError(f"the projector is incomplete: {', '.join(missing)} is missing")
    layers = dict(foreign.layers)
    for name in projector:
        weight = replaced[name] if name in replaced else files.read(name)
        if name in layers:
            weight = _merged(weight, layers.pop(name), foreign.form)
        replaced[name] = weight
    return layers, replaced


def _merged(weight: torch.Tensor, layer: LayerLora, form: LoraConfig | None) -> torch.Tensor:
    assert form is not None
    if layer.magnitude is not None:
        raise ArtifactError("DoRA on the projector is not read; merge the adapter with PEFT first")
    return merge_lora(weight, layer.a, layer.b, lora_scaling(form, layer.alpha, layer.a.shape[0]))


def _module(name: str) -> str:
    return memory_name(name).removesuffix(".weight")


def _named(layers: dict[str, LayerLora], replaced: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors by the names that PEFT gives them around the model in memory."""
    state = {f"{PEFT_PREFIX}{memory_name(name)}": tensor.contiguous() for name, tensor in replaced.items()}
    for name, layer in layers.items():
        module = f"{PEFT_PREFIX}{_module(name)}"
        state[f"{module}.lora_A.weight"] = layer.a.contiguous()
        state[f"{module}.lora_B.weight"] = layer.b.contiguous()
        if layer.magnitude is not None:
            state[f"{module}.lora_magnitude_vector"] = layer.magnitude.flatten().contiguous()
    return state


def _form(form: LoraConfig | None, layers: dict[str, LayerLora], saved: list[str]) -> LoraConfig:
    """Return PEFT's settings for the adapter with its new names; `saved`: the modules of the replaced weights."""
    if form is None or not layers:
        return LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=saved, inference_mode=True)
    modules = {_module(name): layer for name, layer in layers.items()}
    return LoraConfig(
        r=form.r,
        lora_alpha=form.lora_alpha,
        lora_dropout=form.lora_dropout,
        use_rslora=form.use_rslora,
        use_dora=form.use_dora,
        rank_pattern={name: lora.a.shape[0] for name, lora in modules.items() if lora.a.shape[0] != form.r},
        alpha_pattern={name: lora.alpha for name, lora in modules.items() if lora.alpha != form.lora_alpha},
        target_modules=_targets(sorted(modules)),
        modules_to_save=saved,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )


def _whole_modules(replaced: Iterable[str], shapes: Iterable[str], source: Path) -> list[str]:
    """Return the largest modules all of whose weights are replaced: PEFT replaces modules, not weights.

    Raises ArtifactError for a weight of a module that is replaced in part.
    """
    unchanged = {memory_name(name) for name in shapes} - {memory_name(name) for name in replaced}
    saved = {PROJECTOR_PREFIX.removesuffix("."): None}
    for name in sorted(memory_name(name) for name in replaced if not name.startswith(PROJECTOR_PREFIX)):
        parts = name.split(".")
        modules = (".".join(parts[:count]) for count in range(2 if parts[0] == "model" else 1, len(parts)))
        whole = next((top for top in modules if not any(other.startswith(f"{top}.") for other in unchanged)), None)
        if whole is None:
            raise ArtifactError(
                f"{source}: replaces {name} alone, and PEFT can replace only the module that it is in. Merge the "
                "adapter with the tool that wrote it, and name the result as the base."
            )
        saved[whole] = None
    return list(saved)


def _targets(modules: list[str]) -> str:
    """Return a pattern that matches exactly these modules; a short one if every decoder layer has the same ones."""
    matches = [_BLOCK.match(name) for name in modules]
    if all(matches):
        blocks = {name.split(".")[3] for name in modules}
        leaves = {match[1] for match in matches if match}
        if len(blocks) * len(leaves) == len(modules) and blocks == {str(n) for n in range(len(blocks))}:
            return rf"model\.language_model\..*\.({'|'.join(sorted(leaves))})"
    return "|".join(re.escape(name) for name in modules)


def _save_surroundings(staging: Path, foreign: ForeignAdapter, base: Base) -> dict[str, object]:
    """Write tokenizer and processor; return the manifest's image settings."""
    ratio = foreign.aspect_ratio
    pixels = save_surroundings(staging, base.directory, base.config, foreign.template, ratio, is_model=False)
    return {
        "size": int(base.config.vision_config.image_size),
        "mean": list(pixels["image_mean"]),
        "std": list(pixels["image_std"]),
        "image_aspect_ratio": ratio,
        "vision_feature_layer": base.config.vision_feature_layer,
        "vision_feature_select_strategy": base.config.vision_feature_select_strategy,
        "num_image_tokens": num_image_tokens(base.config),
    }
