"""Export to GGUF: text model and mmproj for llama.cpp and Ollama, with a Modelfile."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import cast, get_args

import torch
from transformers import LlavaConfig

from lora_llava.artifact import Usage, read_usage
from lora_llava.conversation.endings import end_token_ids, stated_ends
from lora_llava.conversation.templates import Template
from lora_llava.errors import RecipeError
from lora_llava.formats.llava_hf import WeightFiles
from lora_llava.formats.names import LANGUAGE_MODEL_PREFIX
from lora_llava.formats.tokenizer import read_tokenizer
from lora_llava.modeling.metadata import read_config
from lora_llava.run_directory.claim import is_artifact
from lora_llava.shipping.export.gguf.file import F16, OutType, Tensor, as_stored, general_fields, write_gguf
from lora_llava.shipping.export.gguf.mmproj import FILE, check_gguf_support, image_notes, write_mmproj
from lora_llava.shipping.export.gguf.ollama import modelfile
from lora_llava.shipping.export.gguf.text import ARCHITECTURE, gguf_name, text_fields, text_tensors
from lora_llava.shipping.export.gguf.tokenizer import AnyTemplate, tokenizer_fields
from lora_llava.shipping.export.options import ExportOptions, ExportReport, record_source
from lora_llava.shipping.merge.probe import ask, difference, logits_of, merged_model
from lora_llava.shipping.merge.run import merge_artifact, summary
from lora_llava.shipping.merge.stream import Read
from lora_llava.system.files import staged_result
from lora_llava.system.progress import phase
from lora_llava.system.text import counted

TEXT_FILE = "text.gguf"
_MODELFILE = "Modelfile"
_MERGED = "merged"


def export_gguf(source: Path, output: Path, options: ExportOptions) -> ExportReport:
    """Write `source` as `text.gguf`, `mmproj.gguf` and a Modelfile; an artifact is merged to a temporary model first.

    Holds one tensor in memory. Each file is read back: metadata, names and shapes must be equal, values within the
    rounding of their type. Raises ModelError for what llama.cpp does not compute as transformers does.
    """
    outtype = out_type(options, "f16")
    with staged_result(output) as staging:
        model, lines = source, list[str]()
        if is_artifact(source):
            model = staging / _MERGED
            report = merge_artifact(source, model, base=options.base, base_model=options.base_model)
            lines = summary(report, model)[1:]
        lines = _write(model, staging, output.name, outtype, read_usage(model, options.template)) + lines
        if model != source:
            shutil.rmtree(model)
        record_source(staging, source)
    return {"summary": [f"{output}: {lines[0]}", *lines[1:], *_commands(output)]}


def _commands(output: Path) -> list[str]:
    """Return what starts the model in llama.cpp, and what adds it to Ollama."""
    text, mmproj, recipe = (shlex.quote(str(output / name)) for name in (TEXT_FILE, FILE, _MODELFILE))
    return [
        f"llama-mtmd-cli --jinja -m {text} --mmproj {mmproj} --image IMAGE -p QUESTION",
        f"ollama create NAME -f {recipe}",
    ]


def out_type(options: ExportOptions, default: OutType) -> OutType:
    """Return the type to store weights in. Raises RecipeError for an unknown name."""
    if options.outtype is None:
        return default
    if options.outtype not in get_args(OutType):
        raise RecipeError(f"outtype {options.outtype!r} is unknown; one of {', '.join(get_args(OutType))}")
    return cast("OutType", options.outtype)


def _write(model: Path, staging: Path, name: str, outtype: OutType, usage: Usage) -> list[str]:
    """Write the files of a model directory into `staging`; return the lines to show."""
    template = usage.prompt_template
    config = read_config(model)
    check_gguf_support(config)
    files = WeightFiles(model)
    files.check(config)
    tensors = write_text(staging / TEXT_FILE, model, config, files.read, outtype, template)
    count = write_mmproj(staging / FILE, config, files.read, model, name, outtype)
    notes = _write_modelfile(staging, model, template)
    return [
        f"{TEXT_FILE}, {outtype}, {len(tensors)} tensors; {FILE}, {count} tensors; read back and equal",
        *_unquantized(tensors, outtype),
        *(_loss_by_rounding(model, config, files, tensors, template) if outtype.startswith("q") else ()),
        *notes,
        *image_notes(usage.image_aspect_ratio),
    ]


def write_text(
    path: Path, model: Path, config: LlavaConfig, read: Read, outtype: OutType, template: AnyTemplate
) -> list[Tensor]:
    """Write the language model with the tokenizer of `model`, read it back and compare; return its tensors.

    `read`: reads a weight by its canonical name.
    """
    fields = {
        **general_fields(path.parent.name, "model", outtype),
        **text_fields(config),
        **tokenizer_fields(model, int(config.text_config.vocab_size), template),
    }
    tensors = text_tensors(config, read, outtype)
    write_gguf(path, ARCHITECTURE, fields, tensors)
    return tensors


def _loss_by_rounding(
    model: Path, config: LlavaConfig, files: WeightFiles, tensors: list[Tensor], template: AnyTemplate
) -> list[str]:
    """Ask the model the probe questions before and after quantization; return the lines to show."""
    if not isinstance(template, Template):
        return ["the effect of quantization was not measured: the model's template is none of the kit's"]
    phase("Asking the model before and after quantization")
    rounded = {tensor.name: tensor for tensor in tensors}

    def read(name: str) -> torch.Tensor:
        is_text = name.startswith(LANGUAGE_MODEL_PREFIX)
        return as_stored(rounded[gguf_name(name, config)]) if is_text else files.read(name)

    after = merged_model(read, config)
    asked = ask(after, config, template, model)
    distance = difference(logits_of(after, asked), logits_of(merged_model(files.read, config), asked), asked)
    lines = [f"quantized against the model before, logits of {counted(distance.answers, 'question')}: {distance}"]
    if distance.answers_equal < distance.answers:
        lines.append("quantization changes its answers: compare them on your questions, or use --outtype q8_0 or f16")
    return lines


def _write_modelfile(staging: Path, model: Path, template: AnyTemplate) -> list[str]:
    """Write the Modelfile; return the lines to show about what it lacks."""
    tokenizer = read_tokenizer(model)
    ends = stated_ends(model) if template is None else end_token_ids(template, tokenizer, stated_ends(model))
    stops = [str(token) for token in tokenizer.convert_ids_to_tokens(ends) if token in tokenizer.added_tokens_encoder]
    text = modelfile([TEXT_FILE, FILE], template, tokenizer.eos_token, stops)
    (staging / _MODELFILE).write_text(text, encoding="utf-8")
    if isinstance(template, Template):
        return []
    return [
        "the Modelfile has no TEMPLATE: the model does not name its template; give it with --template"
        if template is None
        else "the Modelfile has no TEMPLATE: Ollama reads the model's own chat template from text.gguf"
    ]


def _unquantized(tensors: list[Tensor], outtype: OutType) -> list[str]:
    """Return a line on the tensors that could not be quantized; empty if there are none."""
    count = sum(tensor.kind == F16 for tensor in tensors) if outtype.startswith("q") else 0
    return [f"{counted(count, 'tensor')} in f16: rows that do not divide into blocks of 32"] if count else []
