"""Import adapters of other tools as artifacts: PEFT's for llava-hf, the original code's LoRA, a projector file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from lora_llava.conversation.chat_template import read_own_template, recognize
from lora_llava.conversation.templates import Template, get_template
from lora_llava.errors import ArtifactError, ModelError
from lora_llava.formats.adapter_config import ranks_and_alphas, read_adapter_config
from lora_llava.formats.llava_hf import WeightFiles
from lora_llava.formats.llava_original import NON_LORA, check_original_images, from_original_name, read_tensors
from lora_llava.formats.names import (
    BUFFERS,
    EMBEDDINGS,
    HEAD,
    PEFT_PREFIX,
    PROJECTOR_PREFIX,
    WEIGHTS,
    canonical_name,
    split_lora,
    unwrap_peft,
)
from lora_llava.formats.peft_adapter import check_parts
from lora_llava.formats.transformers_4 import PREPROCESSOR, PROCESSOR
from lora_llava.recipe.stages import AspectRatio
from lora_llava.shipping.importers.options import ImportOptions
from lora_llava.shipping.importers.write import Base, ForeignAdapter, LayerLora, open_base, write_artifact
from lora_llava.system.files import read_json
from lora_llava.system.text import counted

_ORIGINAL = re.compile(r"^(model\.)?(layers|mm_projector)\.")
_COPY = ".base_layer.weight"

_Rename = Callable[[str], str | None]
"""Returns the canonical name of a tensor; None for one to skip."""


@dataclass(slots=True)
class _Parts:
    """The tensors of an adapter by canonical weight and part; `modules`: the names that its own settings use."""

    lora: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    replaced: dict[str, torch.Tensor] = field(default_factory=dict)
    copies: dict[str, torch.Tensor] = field(default_factory=dict)
    """The base's own weights under LoRA, which PEFT saves too where embeddings or lm_head are among the targets."""


def import_adapter(source: Path, output: Path, options: ImportOptions) -> list[str]:
    """Write an artifact from a PEFT adapter for llava-hf (names of any version) or for the original code.

    An adapter without a projector gets the base's. Raises ArtifactError for an adapter that is not LoRA, rsLoRA or
    DoRA, or does not fit the base.
    """
    form = read_adapter_config(source)
    state = read_tensors(_weights_file(source))
    # The original code's names say which layout the adapter is for; its settings do not.
    original = any(_ORIGINAL.match(name.removeprefix(PEFT_PREFIX)) for name in state)
    parts = _Parts()
    _sort(parts, state, from_original_name if original else canonical_name, source)
    # The original code stores the projector next to the LoRA, not in it.
    if (source / NON_LORA).is_file():
        _sort(parts, read_tensors(source / NON_LORA), from_original_name, source / NON_LORA)
    base = open_base(options.base_model, source)
    _check_copies(parts, base, source)
    layers = _layers(parts, form, source)
    template, reason = _template(source, base, original, options.template)
    ratio = _original_ratio(source) if original else _processor_ratio(source, base.directory)
    foreign = ForeignAdapter(layers, parts.replaced, form, template, options.image_aspect_ratio or ratio)
    has_projector = any(name.startswith(PROJECTOR_PREFIX) for name in foreign.replaced)
    write_artifact(output, foreign, base, source, _quantization(options))
    kind = "the original's LoRA" if original else "a PEFT adapter"
    projector = "its own projector" if has_projector else "the base's projector, as it has none"
    return [
        f"{source}: {kind} on {counted(len(layers), 'layer')} with {projector}; written as an artifact: {output}",
        *_notes(foreign, base, reason, options),
    ]


def _template(source: Path, base: Base, original: bool, name: str | None) -> tuple[Template, str]:
    """Return the template that an adapter was trained in, and the source of that answer."""
    if name is not None:
        return get_template(name), "from --template"
    # The original code keeps its templates in code; its directories say nothing about them.
    for directory, where in (
        () if original else ((source, "its chat template"), (base.directory, "its base's chat template"))
    ):
        own = read_own_template(directory)
        template = (recognize(own) or recognize(own, first_question=True)) if own else None
        if template is not None:
            return template, f"from {where}"
        if own is not None:
            return get_template("vicuna_v1"), f"{where} is none of the kit's; name one with --template"
    return get_template("vicuna_v1"), "the default, as in LLaVA-1.5; name another with --template"


def import_projector(source: Path, output: Path, options: ImportOptions) -> list[str]:
    """Write an artifact of stage `align` from a projector file, such as `mm_projector.bin`."""
    parts = _Parts()
    state = read_tensors(source)
    original = any("mm_projector" in name for name in state)
    _sort(parts, state, from_original_name if original else canonical_name, source)
    if parts.lora or not all(name.startswith(PROJECTOR_PREFIX) for name in parts.replaced):
        raise ArtifactError(f"{source}: holds more than a projector; give the directory that it is in")
    base = open_base(options.base_model, source)
    template = get_template(options.template or "plain")
    reason = "from --template" if options.template else "the default for captions"
    ratio = _original_ratio(source.parent)
    foreign = ForeignAdapter({}, parts.replaced, None, template, options.image_aspect_ratio or ratio)
    write_artifact(output, foreign, base, source, _quantization(options))
    return [f"{source}: a projector; written as an artifact: {output}", *_notes(foreign, base, reason, options)]


def _quantization(options: ImportOptions) -> dict[str, Any]:
    """Return how the base was quantized in training, as a manifest says it; QLoRA computes in bf16."""
    if options.quantization in (None, "none"):
        return {"type": "none", "double_quant": False}
    return {"type": "nf4", "double_quant": options.quantization == "nf4-double", "compute_dtype": "bfloat16"}


def _notes(foreign: ForeignAdapter, base: Base, reason: str, options: ImportOptions) -> list[str]:
    return [
        f"base: {base.identity.name}, weights {base.identity.weights_sha256[:12]}...",
        f"template {foreign.template.name} ({reason}), images {foreign.aspect_ratio}, quantization of the base "
        f"{options.quantization or 'none'}; if it was trained with others, import it again with --template, "
        "--image-aspect-ratio or --quantization",
    ]


def _weights_file(source: Path) -> Path:
    for name in (WEIGHTS, "adapter_model.bin"):
        if (source / name).is_file():
            return source / name
    raise ArtifactError(f"{source}: it has neither {WEIGHTS} nor adapter_model.bin")


def _sort(parts: _Parts, state: Mapping[str, torch.Tensor], rename: _Rename, where: Path) -> None:
    """Divide tensors into LoRA by layer, and whole weights; ArtifactError for unknown names."""
    for stored, tensor in state.items():
        # The base's own copy of a module that the adapter replaces; what is computed, not trained.
        if ".original_module." in stored or stored.endswith(BUFFERS):
            continue
        copied = stored.endswith(_COPY)
        unwrapped = unwrap_peft(stored.removesuffix(_COPY) + ".weight" if copied else stored)
        lora = split_lora(unwrapped)
        try:
            name = rename(lora[0] if lora else unwrapped)
        except ModelError as error:
            raise ArtifactError(f"{where}: {error}") from None
        if name is None:
            continue
        if not torch.isfinite(tensor).all():
            raise ArtifactError(f"{where}: {stored} holds NaN or infinity; it cannot be used")
        if lora:
            weight, part = lora
            parts.lora.setdefault(name, {})[part] = tensor
            parts.modules[name] = weight.removesuffix(".weight")
        elif copied:
            parts.copies[name] = tensor
        else:
            parts.replaced[name] = tensor


def _check_copies(parts: _Parts, base: Base, source: Path) -> None:
    """Raise ArtifactError for embeddings or an lm_head that the base does not have, or has as one weight."""
    files, tied = WeightFiles(base.directory), bool(base.config.tie_word_embeddings)
    # PEFT saves both weights where one is a target, the other under its plain name.
    for name in {EMBEDDINGS, HEAD} & parts.replaced.keys():
        if _is_stored(files, tied, name, parts.replaced[name]):
            del parts.replaced[name]
    for name, tensor in parts.copies.items():
        if not _is_stored(files, tied, name, tensor):
            raise ArtifactError(
                f"{source}: holds a copy of {name} that differs from the base's: it was trained on a base with resized "
                "or other embeddings. Name that base with --base-model."
            )
    changed = [name for name in (EMBEDDINGS, HEAD) if name in parts.lora or name in parts.replaced]
    if tied and changed:
        raise ArtifactError(
            f"{source}: changes {' and '.join(changed)}, which this base has as one weight (tie_word_embeddings); its "
            "layout cannot hold two. Train without lm_head and embed_tokens among target_modules and modules_to_save."
        )


def _is_stored(files: WeightFiles, tied: bool, name: str, tensor: torch.Tensor) -> bool:
    name = EMBEDDINGS if tied and name == HEAD else name
    if name not in files:
        return False
    stored = files.read(name)
    return stored.shape == tensor.shape and torch.equal(stored.float(), tensor.float())


def _layers(parts: _Parts, form: LoraConfig, source: Path) -> dict[str, LayerLora]:
    """Return the LoRA of each layer; ArtifactError if a part is missing, or a rank is not that of the settings."""
    values, layers = ranks_and_alphas(source, form, parts.modules.values()), {}
    for name, tensors in parts.lora.items():
        check_parts(tensors, form, name, source)
        module, actual = parts.modules[name], tensors["lora_A"].shape[0]
        rank, alpha = values[module]
        if rank != actual:
            raise ArtifactError(
                f"{source}: LoRA of {module} has the rank {actual}, but r and rank_pattern give it {rank}, so its "
                "alpha is uncertain too. Save the adapter again with the PEFT that wrote it."
            )
        layers[name] = LayerLora(tensors["lora_A"], tensors["lora_B"], tensors.get("lora_magnitude_vector"), alpha)
    return layers


def _original_ratio(directory: Path) -> AspectRatio:
    """Read how the original code makes images square; as LLaVA-1.5 does if its config.json does not say.

    Raises ModelError for images in another form.
    """
    config = read_json(directory / "config.json")
    check_original_images(config, directory / "config.json")
    return "pad" if config.get("image_aspect_ratio", "pad") == "pad" else "square"


def _processor_ratio(source: Path, base: Path) -> AspectRatio:
    """Read whether the adapter's processor, or else its base's, pads images; transformers' default does not."""
    directory = source if any((source / name).is_file() for name in (PROCESSOR, PREPROCESSOR)) else base
    for name in (PROCESSOR, PREPROCESSOR):
        data = read_json(directory / name)
        images = data.get("image_processor", data)
        if isinstance(images, dict) and images.get("do_pad"):
            return "pad"
    return "square"
