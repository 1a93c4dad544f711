"""Export to the llava-hf layout: an artifact is merged, a model is rewritten with canonical names."""

from __future__ import annotations

import shutil
from pathlib import Path

from lora_llava.artifact import read_usage
from lora_llava.conversation.chat_template import TEMPLATE_FILE, chat_template
from lora_llava.conversation.endings import write_generation_config
from lora_llava.conversation.templates import Template
from lora_llava.formats.llava_hf import WeightFiles, check_identical, each_tensor, expected_shapes, write_weights
from lora_llava.formats.tokenizer import read_tokenizer
from lora_llava.formats.transformers_4 import add_old_files, add_old_names
from lora_llava.modeling.merged import update_identity
from lora_llava.modeling.metadata import read_config
from lora_llava.run_directory.claim import is_artifact
from lora_llava.shipping.export.options import ExportOptions, ExportReport, record_source
from lora_llava.shipping.merge.run import merge_artifact, summary
from lora_llava.system.files import staged_result

_COPIED = ("*.json", "*.jinja", "tokenizer.model", "*.txt")


def export_hf(source: Path, output: Path, options: ExportOptions) -> ExportReport:
    """Write `source` in the llava-hf layout, in files of at most 5 GB."""
    if is_artifact(source):
        report = merge_artifact(source, output, base=options.base, base_model=options.base_model)
        return {**report, "summary": summary(report, output)}
    config = read_config(source)
    files = WeightFiles(source)
    files.check(config)
    with staged_result(output) as staging:
        names = sorted(expected_shapes(config))
        written = write_weights(staging, ((name, files.read(name)) for name in names))
        copy_surroundings(source, staging, options)
        record_source(staging, source)
        for name, tensor in each_tensor(staging):
            check_identical(tensor, files.read(name), name)
        shutil.copyfile(source / "config.json", staging / "config.json")
        add_old_names(staging / "config.json")
        update_identity(staging)
    return {"files": written, "summary": [f"{output}: {len(names)} tensors, each read back and equal"]}


def copy_surroundings(source: Path, staging: Path, options: ExportOptions) -> None:
    """Copy tokenizer, processor and settings of a model directory, without config.json, which is written last.

    End-of-answer tokens and chat template are those that the kit prompts with, even where the model's files differ.
    """
    for pattern in _COPIED:
        for path in source.glob(pattern):
            # An index names the files of the source, not those that are written here.
            if path.is_file() and path.name != "config.json" and not path.name.endswith(".index.json"):
                shutil.copyfile(path, staging / path.name)
    add_old_files(staging, is_model=True)
    template = read_usage(source, options.template).prompt_template
    tokenizer = read_tokenizer(source)
    write_generation_config(staging, source, template, tokenizer)
    if isinstance(template, Template):
        (staging / TEMPLATE_FILE).write_text(chat_template(template, tokenizer.eos_token), encoding="utf-8")
