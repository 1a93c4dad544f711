"""The adapter of an artifact as llama.cpp's LoRA, beside the mmproj of its projector."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoTokenizer

from lora_llava.artifact import is_artifact
from lora_llava.conversation.chat_template import TEMPLATE_FILE, chat_template
from lora_llava.conversation.encode import get_template
from lora_llava.errors import ArtifactError, RecipeError
from lora_llava.formats.llava_hf import expected_shapes
from lora_llava.formats.names import HEAD
from lora_llava.formats.peft_adapter import Adapter
from lora_llava.shipping.export.gguf.file import (
    Fields,
    OutType,
    Tensor,
    check_gguf,
    general_fields,
    kind_of,
    real,
    string,
    write_gguf,
)
from lora_llava.shipping.export.gguf.mmproj import FILE, KNOWN_DEFECT, check_vision, write_mmproj
from lora_llava.shipping.export.gguf.model import out_type
from lora_llava.shipping.export.gguf.text import ARCHITECTURE, gguf_name, rotated_heads
from lora_llava.shipping.export.gguf.tokenizer import MEDIA_MARKER
from lora_llava.shipping.export.options import ExportOptions, ExportReport
from lora_llava.shipping.merge.run import Source, open_source
from lora_llava.shipping.merge.stream import merged_reader
from lora_llava.system.files import staged

LORA_FILE = "lora.gguf"

_LANGUAGE = "language_model."
_INSTEAD = "Export it with --format gguf, which merges it."


def export_gguf_lora(source: Path, output: Path, options: ExportOptions) -> ExportReport:
    """Write the LoRA of an artifact as `lora.gguf`, its projector and the tower as `mmproj.gguf`, and its template.

    Everything is read back and compared. Raises ArtifactError for an artifact that llama.cpp's LoRA cannot express:
    DoRA, no LoRA at all, or other changes to the language model.
    """
    outtype = out_type(options, "f32")
    if outtype not in ("f32", "f16"):
        raise RecipeError(f"--outtype {outtype}: of gguf-lora f32 or f16; the base's own file may be of any")
    if not is_artifact(source):
        raise ArtifactError(f"{source} is a whole model and has no adapter; export it with --format gguf")
    with staged(output) as staging:
        found = open_source(source, options.base_model)
        _check_form(found)
        check_vision(found.config)
        fields, tensors = _lora_file(found, output.name, outtype)
        write_gguf(staging / LORA_FILE, ARCHITECTURE, fields, tensors)
        check_gguf(staging / LORA_FILE, ARCHITECTURE, fields, tensors)
        # LoRA on the tower, too: there it is folded in.
        read = merged_reader(found.files, found.files.read, found.adapter, torch.float32)
        vision: OutType = "f32" if options.outtype == "f32" else "f16"
        count = write_mmproj(staging / FILE, found.config, read, found.base, output.name, vision)
        _write_template(staging, found)
    lines = [f"{output}: {LORA_FILE}, {len(tensors)} tensors; {FILE}, {count} tensors; read back and the same"]
    lines.append(
        "base: the GGUF of the language model that it was trained on: lora-llava export BASE OUT --format gguf"
    )
    if found.nf4:
        lines.append("it was trained on that base in NF4; on any other form of it answers differ a little")
    return {"summary": [*lines, KNOWN_DEFECT]}


def _check_form(source: Source) -> None:
    adapter = source.adapter
    if adapter.config.use_dora:
        raise ArtifactError(f"{source.artifact} is DoRA, whose row norms llama.cpp's LoRA has no place for. {_INSTEAD}")
    if not any(name.startswith(_LANGUAGE) for name in adapter.layers):
        raise ArtifactError(f"{source.artifact} holds no LoRA on the language model, just a projector. {_INSTEAD}")
    replaced = [name for name in adapter.replaced if name.startswith(_LANGUAGE)]
    if HEAD in adapter.layers and source.config.tie_word_embeddings:
        replaced.append(HEAD)
    if replaced:
        raise ArtifactError(
            f"{source.artifact} changes {', '.join(sorted(replaced)[:3])} otherwise than by LoRA on a layer of "
            f"llama.cpp's. {_INSTEAD}"
        )


def _lora_file(source: Source, name: str, outtype: OutType) -> tuple[Fields, list[Tensor]]:
    """Plan `lora.gguf`. Shapes: lora_a (rank, inputs), lora_b (outputs, rank).

    llama.cpp adds `alpha / rank * B A`, with the rank read off the tensors and one alpha for all. So alpha is that of
    the first layer, the square root of rsLoRA in it; layers with another scale have the rest in B.
    """
    adapter, shapes = source.adapter, expected_shapes(source.config)
    layers = {one: keys for one, keys in adapter.layers.items() if one.startswith(_LANGUAGE)}
    alphas = {one: keys.scaling * adapter.stored(keys.a).shape[0] for one, keys in layers.items()}
    alpha = next(iter(alphas.values()))
    tensors = []
    for one, keys in layers.items():
        place, rank = gguf_name(one), adapter.stored(keys.a).shape[0]
        outputs, inputs = shapes[one]
        a, b = (rank, inputs), (outputs, rank)
        tensors.append(Tensor(f"{place}.lora_a", a, kind_of(a, outtype), _reader(adapter, keys.a, 1.0)))
        scaled = _reader(adapter, keys.b, alphas[one] / alpha)
        heads = rotated_heads(one, source.config)
        tensors.append(Tensor(f"{place}.lora_b", b, kind_of(b, outtype), scaled, heads))
    fields: Fields = {
        **general_fields(name, "adapter", outtype),
        "adapter.type": string("lora"),
        "adapter.lora.alpha": real(alpha),
    }
    return fields, tensors


def _reader(adapter: Adapter, key: str, factor: float) -> Callable[[], torch.Tensor]:
    return lambda: adapter.read(key) if factor == 1 else adapter.read(key) * factor


def _write_template(staging: Path, source: Source) -> None:
    """Write the template of training: the base's GGUF has another, or none."""
    eos_token = AutoTokenizer.from_pretrained(source.base).eos_token
    template = get_template(**source.manifest.template)
    (staging / TEMPLATE_FILE).write_text(chat_template(template, eos_token, MEDIA_MARKER), encoding="utf-8")
