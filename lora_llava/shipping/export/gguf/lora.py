"""The adapter of an artifact as llama.cpp's LoRA, with its projector in an mmproj file."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from gguf import Keys

from lora_llava.conversation.chat_template import TEMPLATE_FILE, chat_template
from lora_llava.errors import ArtifactError
from lora_llava.formats.llava_hf import expected_shapes
from lora_llava.formats.names import LANGUAGE_MODEL_PREFIX
from lora_llava.formats.peft_adapter import Adapter
from lora_llava.formats.tokenizer import read_tokenizer
from lora_llava.shipping.export.gguf.file import (
    Fields,
    OutType,
    Tensor,
    general_fields,
    kind_of,
    write_gguf,
)
from lora_llava.shipping.export.gguf.mmproj import FILE, check_gguf_support, image_notes, write_mmproj
from lora_llava.shipping.export.gguf.model import TEXT_FILE, out_type, write_text
from lora_llava.shipping.export.gguf.text import ARCHITECTURE, gguf_name, rotated_heads
from lora_llava.shipping.export.gguf.tokenizer import MEDIA_MARKER
from lora_llava.shipping.export.options import ExportOptions, ExportReport, record_source
from lora_llava.shipping.merge.probe import LogitDifference, adapted_model, ask, difference, logits_of
from lora_llava.shipping.merge.run import Source, artifact_logits, choose_base, open_source
from lora_llava.shipping.merge.stream import BaseKind, base_reader, merged_reader
from lora_llava.system.files import staged_result
from lora_llava.system.progress import phase

_LORA_FILE = "lora.gguf"

_INSTEAD = "Export it with --format gguf, which merges it."


def export_gguf_lora(source: Path, output: Path, options: ExportOptions) -> ExportReport:
    """Write the LoRA of an artifact as `lora.gguf`, its projector and the tower as `mmproj.gguf`, and its template.

    For an adapter that was trained on NF4, also `text.gguf` with the dequantized base, unless `options.base` says
    `original`. Each file is read back and compared. Raises ArtifactError for an artifact that llama.cpp's LoRA cannot
    express: DoRA, no LoRA, or other changes to the language model.
    """
    outtype = out_type(options, "f32")
    _check_form(Adapter(source), source)
    with staged_result(output) as staging:
        opened = open_source(source, options.base_model)
        check_gguf_support(opened.config)
        fields, tensors = _lora_file(opened, output.name, outtype)
        write_gguf(staging / _LORA_FILE, ARCHITECTURE, fields, tensors)
        # llama.cpp applies LoRA to the language model only, so LoRA on the vision tower is merged.
        read = merged_reader(opened.files, opened.files.read, opened.adapter, torch.float32)
        vision: OutType = "f32" if options.outtype == "f32" else "f16"
        count = write_mmproj(staging / FILE, opened.config, read, opened.surroundings, output.name, vision)
        _write_template(staging, opened)
        record_source(staging, source)
        base_lines = _write_base(staging, opened, choose_base(opened, options.base), vision)
    lines = [f"{output}: {_LORA_FILE}, {len(tensors)} tensors; {FILE}, {count} tensors; read back and equal"]
    return {"summary": [*lines, *base_lines, *image_notes(opened.manifest.usage.image_aspect_ratio)]}


def _write_base(staging: Path, source: Source, kind: BaseKind, outtype: OutType) -> list[str]:
    """Write the dequantized base, which an adapter trained on NF4 needs. Return the lines to show about the base.

    For `original`, nothing is written, and the lines say how far the adapter on the stored base is from the trained
    model.
    """
    stored = "base: the GGUF of the language model that it was trained on (lora-llava export BASE OUT --format gguf)"
    if not source.nf4:
        return [stored]
    if kind == "original":
        return [stored, f"it was trained on that base in NF4. On the stored weights: {_distance(source)}"]
    read = base_reader(source.files, source.manifest, kind)
    tensors = write_text(staging / TEXT_FILE, source.surroundings, source.config, read, outtype, source.template)
    return [
        f"base: {TEXT_FILE}, {outtype}, {len(tensors)} tensors: the weights that training saw, dequantized from NF4. "
        "It does not fit the stored ones; --onto original leaves the base out and measures the difference"
    ]


def _distance(source: Source) -> LogitDifference:
    """Measure how far the adapter on the stored base is from the trained model."""
    phase("Asking the adapter on the stored base, and on the base that it was trained on")
    shipped = adapted_model(source.files.read, source.config, source.adapter)
    asked = ask(shipped, source.config, source.template, source.surroundings)
    return difference(logits_of(shipped, asked), artifact_logits(source, "dequantized", asked), asked)


def _check_form(adapter: Adapter, source: Path) -> None:
    """Raise ArtifactError for an adapter that llama.cpp's LoRA cannot express."""
    if adapter.config.use_dora:
        raise ArtifactError(f"{source} is DoRA, whose row norms llama.cpp's LoRA cannot hold. {_INSTEAD}")
    if not any(name.startswith(LANGUAGE_MODEL_PREFIX) for name in adapter.layers):
        raise ArtifactError(f"{source} holds no LoRA on the language model, only a projector. {_INSTEAD}")
    if replaced := [name for name in adapter.replaced if name.startswith(LANGUAGE_MODEL_PREFIX)]:
        raise ArtifactError(
            f"{source} replaces {', '.join(sorted(replaced)[:3])}, which llama.cpp's LoRA cannot hold. {_INSTEAD}"
        )


def _lora_file(source: Source, name: str, outtype: OutType) -> tuple[Fields, list[Tensor]]:
    """Plan `lora.gguf`. Shapes: lora_a (rank, inputs), lora_b (outputs, rank).

    llama.cpp adds `alpha / rank * B A`, with the rank of the tensors and one alpha for all layers. So alpha is that of
    the first layer that has any (for rsLoRA times sqrt(rank)); B of a layer with another one is multiplied by the
    quotient.
    """
    adapter, shapes = source.adapter, expected_shapes(source.config)
    layers = {name: keys for name, keys in adapter.layers.items() if name.startswith(LANGUAGE_MODEL_PREFIX)}
    alphas = {name: keys.scaling * adapter.stored(keys.a).shape[0] for name, keys in layers.items()}
    # llama.cpp takes an alpha of 0 for none, and adds B A unscaled.
    alpha = next(filter(None, alphas.values()), 1.0)
    tensors = []
    for weight, keys in layers.items():
        stored_name, rank = gguf_name(weight, source.config), adapter.stored(keys.a).shape[0]
        outputs, inputs = shapes[weight]
        a, b = (rank, inputs), (outputs, rank)
        tensors.append(Tensor(f"{stored_name}.lora_a", a, kind_of(a, outtype), partial(adapter.read, keys.a)))
        scaled = partial(_read_scaled, adapter, keys.b, alphas[weight] / alpha)
        heads = rotated_heads(weight, source.config)
        tensors.append(Tensor(f"{stored_name}.lora_b", b, kind_of(b, outtype), scaled, heads))
    fields: Fields = {
        **general_fields(name, "adapter", outtype),
        Keys.Adapter.TYPE: "lora",
        Keys.Adapter.LORA_ALPHA: float(alpha),
    }
    return fields, tensors


def _read_scaled(adapter: Adapter, key: str, factor: float) -> torch.Tensor:
    return adapter.read(key) * factor


def _write_template(staging: Path, source: Source) -> None:
    """Write the chat template of training; the GGUF of the base has another one, or none."""
    text = chat_template(source.template, read_tokenizer(source.surroundings).eos_token, MEDIA_MARKER)
    (staging / TEMPLATE_FILE).write_text(text, encoding="utf-8")
