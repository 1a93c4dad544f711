"""An artifact in the layout of haotian-liu/LLaVA: LoRA with `non_lora_trainables.bin`, or `mm_projector.bin`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlavaConfig

from lora_llava.artifact import Manifest, find_base, read_manifest
from lora_llava.conversation.encode import get_template
from lora_llava.conversation.endings import write_generation_config
from lora_llava.errors import ArtifactError
from lora_llava.formats.llava_hf import expected_shapes, write_json
from lora_llava.formats.llava_original import (
    MM_PROJECTOR,
    NON_LORA,
    from_original_name,
    identity_layer,
    is_linear,
    original_name,
    read_tensors,
    to_original_config,
)
from lora_llava.formats.names import PROJECTOR_PREFIX, WEIGHTS
from lora_llava.formats.peft_adapter import Adapter
from lora_llava.modeling.metadata import read_config
from lora_llava.shipping.export.options import ExportOptions, ExportReport
from lora_llava.shipping.export.verify import check_bits
from lora_llava.system.files import staged
from lora_llava.system.text import counted

CLIP_L_336 = "openai/clip-vit-large-patch14-336"
"""The vision tower of LLaVA-1.5, known by its shape."""

_SECOND = "multi_modal_projector.linear_2."
_LANGUAGE = "language_model.model.layers."
_WRAPPER = "base_model.model."


def left_out(projector: Mapping[str, torch.Tensor]) -> set[str]:
    """Return the names that a one-layer projector leaves out; ArtifactError if they hold more than the identity."""
    second = {name: tensor for name, tensor in projector.items() if name.startswith(_SECOND)}
    weight = second[f"{_SECOND}weight"]
    identity = identity_layer(weight.shape[0], weight.dtype, bias=len(second) > 1)
    if any(not torch.equal(second[name], identity[name]) for name in second):
        raise ArtifactError("the projector's second layer is not the identity; the original's linear one has no place")
    return set(second)


def _tower_name(config: LlavaConfig) -> str:
    vision = config.vision_config
    if (vision.image_size, vision.patch_size, vision.hidden_size, vision.num_hidden_layers) == (336, 14, 1024, 24):
        return CLIP_L_336
    raise ArtifactError("the original names its vision tower, and this base's is not CLIP ViT-L/14-336: --vision-tower")


def _lora_parts(adapter: Adapter) -> Iterator[tuple[str, str]]:
    """Yield each tensor's name around the original's language model, and its name in the artifact's file."""
    for name, keys in adapter.layers.items():
        module = original_name(name, linear=False).removesuffix(".weight")
        for key in (keys.a, keys.b, keys.magnitude):
            if key is not None:
                yield f"{_WRAPPER}{module}.lora_{key.rpartition('.lora_')[2]}", key


def export_adapter(source: Path, output: Path, options: ExportOptions) -> ExportReport:
    """Write an artifact as the original's LoRA directory, or as `mm_projector.bin` if it holds no LoRA."""
    manifest = read_manifest(source)
    adapter = Adapter(source)
    base = find_base(manifest, source, options.base_model)
    config = read_config(base)
    adapter.check(expected_shapes(config))
    other = [name for name in adapter.layers if not name.startswith(_LANGUAGE)]
    other += [name for name in adapter.replaced if not name.startswith(PROJECTOR_PREFIX)]
    if other:
        raise ArtifactError(
            f"{source}: changes {', '.join(sorted(other)[:3])}; in the original layout LoRA is on the language model's "
            "blocks, and the projector alone is replaced. Merge it, and export the merged model."
        )
    projector = {name: adapter.stored(key) for name, key in adapter.replaced.items()}
    if is_linear(config):
        for name in left_out(projector):
            del projector[name]
    named = {original_name(name, linear=is_linear(config)): tensor for name, tensor in projector.items()}
    tower = options.vision_tower or _tower_name(config)
    with staged(output) as staging:
        if adapter.layers:
            _write_lora(staging, adapter, manifest)
            tokenizer = AutoTokenizer.from_pretrained(source)
            write_generation_config(staging, base, get_template(**manifest.template), tokenizer)
            torch.save({f"{_WRAPPER}{name}": one for name, one in named.items()}, staging / NON_LORA)
        else:
            torch.save(named, staging / MM_PROJECTOR)
        _check_adapter(staging, adapter, projector)
        ratio = manifest.images["image_aspect_ratio"]
        write_json(staging / "config.json", to_original_config(config, torch.float16, tower, ratio))
    what = f"LoRA on {counted(len(adapter.layers), 'layer')} and the projector" if adapter.layers else "the projector"
    lines = [f"{output}: {what} in the original layout, read back and the same"]
    if adapter.layers:
        lines.append("the original code takes a directory for a LoRA if its name holds both 'llava' and 'lora'")
    return {"summary": lines}


def _write_lora(staging: Path, adapter: Adapter, manifest: Manifest) -> None:
    """Write LoRA as PEFT does around the original's language model."""
    state = {name: adapter.stored(key) for name, key in _lora_parts(adapter)}
    save_file(state, staging / WEIGHTS, metadata={"format": "pt"})
    form = adapter.config
    modules = {name.rsplit(".", 2)[-2] for name in adapter.layers}
    LoraConfig(
        r=form.r,
        lora_alpha=form.lora_alpha,
        lora_dropout=form.lora_dropout,
        use_rslora=form.use_rslora,
        use_dora=form.use_dora,
        rank_pattern=_renamed(form.rank_pattern),
        alpha_pattern=_renamed(form.alpha_pattern),
        # The original's vision tower has layers of the same names.
        target_modules=rf"model\.layers\..*\.({'|'.join(sorted(modules))})",
        task_type="CAUSAL_LM",
        base_model_name_or_path=manifest.base["name"],
        inference_mode=True,
    ).save_pretrained(staging)


def _renamed(pattern: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("model.language_model.", "model."): value for name, value in pattern.items()}


def _check_adapter(staging: Path, adapter: Adapter, projector: Mapping[str, torch.Tensor]) -> None:
    """Read the files back and compare."""
    place = staging / (NON_LORA if adapter.layers else MM_PROJECTOR)
    found = {from_original_name(name): tensor for name, tensor in read_tensors(place).items()}
    lora = read_tensors(staging / WEIGHTS) if adapter.layers else {}
    wanted = dict(_lora_parts(adapter))
    if found.keys() != projector.keys() or lora.keys() != wanted.keys():
        raise ArtifactError(f"{staging}: other tensors were written than read; please report it")
    for name, tensor in projector.items():
        check_bits(found[name], tensor, name)
    for name, key in wanted.items():
        check_bits(lora[name], adapter.stored(key), name)
