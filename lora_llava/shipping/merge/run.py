"""Merging, top to bottom: check, fold and write, ask, report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlavaConfig
from transformers.image_processing_base import ImageProcessingMixin

from lora_llava.artifact import (
    MERGE_REPORT,
    Manifest,
    check_base,
    find_base,
    library_versions,
    portable,
    read_manifest,
)
from lora_llava.conversation.chat_template import chat_template
from lora_llava.conversation.encode import get_template
from lora_llava.conversation.endings import write_generation_config
from lora_llava.errors import ArtifactError
from lora_llava.formats.llava_hf import MAX_SHARD_BYTES, WeightFiles, expected_shapes, write_json, write_weights
from lora_llava.formats.names import EMBEDDINGS
from lora_llava.formats.peft_adapter import Adapter
from lora_llava.formats.processor import save_processor
from lora_llava.modeling.base import hash_weights
from lora_llava.modeling.metadata import read_config
from lora_llava.shipping.merge.probe import Difference, adapted_model, ask, difference, logits_of, merged_model
from lora_llava.shipping.merge.stream import BaseKind, Read, base_reader, merged_reader
from lora_llava.system.files import staged
from lora_llava.system.progress import Advance, counting, phase
from lora_llava.system.text import counted, dtype_name

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest relative difference of logits between merged model and base + adapter, by the type that is written.

What rounding the folded weights to that type makes of a whole model; a wrong base, a lost projector or a wrong
scale are at 0.1 and above.
"""

_REASONS = {
    "dequantized": "the adapter was trained on the base in NF4, and these are the weights that it saw",
    "original": "the adapter was trained on the base as it is",
    "chosen": "chosen with --onto; the adapter was trained on the base in NF4",
}


@dataclass(frozen=True, slots=True)
class Source:
    """What is merged, found and checked."""

    artifact: Path
    manifest: Manifest
    adapter: Adapter
    base: Path
    files: WeightFiles
    config: LlavaConfig

    @property
    def nf4(self) -> bool:
        """Whether the adapter was trained on a base in 4 bits."""
        return bool(self.manifest.quantization["type"] == "nf4")


def open_source(artifact: Path, base_model: str | None) -> Source:
    """Read an artifact and find its base. Raises ArtifactError for a wrong base or an incomplete adapter."""
    manifest = read_manifest(artifact)
    adapter = Adapter(artifact)
    base = find_base(manifest, artifact, base_model)
    config = read_config(base)
    files = WeightFiles(base)
    files.check(config)
    adapter.check(expected_shapes(config))
    check_base(manifest, hash_weights(base), str(base), artifact)
    return Source(artifact, manifest, adapter, base, files, config)


def choose_base(source: Source, wanted: BaseKind | None) -> BaseKind:
    """Return the base to fold into: `wanted`, or what the adapter was trained on. ArtifactError if there is none."""
    if wanted == "dequantized" and not source.nf4:
        raise ArtifactError(f"{source.artifact} was trained on the base as it is; there is no dequantized one for it")
    return wanted or ("dequantized" if source.nf4 else "original")


def reason_for(source: Source, kind: BaseKind) -> str:
    """Say why it is this base."""
    return _REASONS["chosen" if kind == "original" and source.nf4 else kind]


def merge_artifact(
    artifact: Path | str,
    output: Path | str,
    *,
    base: BaseKind | None = None,
    base_model: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, Any]:
    """Fold an artifact into its base, write the model to `output`, and check it against base + adapter.

    `base` is what to fold into (None: what the adapter was trained on); `base_model` where the base is, if not
    where the artifact says; `dtype` what to write (None: the types of the base's file). Peak memory: one output
    file and the work on one tensor. Returns what is in `merge_report.json`. Raises ArtifactError, with nothing
    left at `output`, if that exists, or an input is not right, or the check fails.
    """
    with staged(Path(output)) as staging:
        source = open_source(Path(artifact), base_model)
        kind = choose_base(source, base)
        merged = merged_reader(source.files, base_reader(source.files, source.manifest, kind), source.adapter, dtype)
        names = sorted(expected_shapes(source.config))
        with counting("merging", len(names)) as advance:
            shards = write_weights(staging, each(names, merged, advance), max_shard_bytes)
        save_surroundings(staging, source)
        written = WeightFiles(staging)
        report = {
            "base": kind,
            "reason": reason_for(source, kind),
            "dtype": dtype_name(written.dtype(EMBEDDINGS)),
            "files": shards,
            **verify(source, kind, written, dtype, staging),
            "artifact": portable(source.manifest),
            "versions": library_versions(),
        }
        write_json(staging / MERGE_REPORT, report)
        # Last: without it, nothing takes what an interruption leaves for a model.
        write_config(staging, source.base, written.dtype(EMBEDDINGS))
    return report


def each(names: Sequence[str], read: Read, advance: Advance) -> Iterator[tuple[str, torch.Tensor]]:
    """Read tensors one after another; `advance` hears of each."""
    for name in names:
        yield name, read(name)
        advance(1)


def verify(
    source: Source, kind: BaseKind, written: WeightFiles, dtype: torch.dtype | None, staging: Path
) -> dict[str, Any]:
    """Ask the written model and base + adapter the same; ArtifactError if they differ by more than rounding.

    For an adapter trained in NF4, measures how far merging into either base is from what was trained.
    """
    written.check(source.config)
    config, adapter = source.config, source.adapter
    phase("Asking the merged model, and base + adapter, the same questions")
    model = merged_model(written.read, config)
    asked = ask(model, config, source.manifest, staging)
    ours = logits_of(model, asked)
    del model

    def logits_with_adapter(on: BaseKind) -> list[torch.Tensor]:
        return logits_of(adapted_model(base_reader(source.files, source.manifest, on), config, adapter), asked)

    theirs = logits_with_adapter(kind)
    found = difference(ours, theirs, asked)
    tolerance = max(TOLERANCE[written.dtype(name)] for name in adapter)
    # Written so that NaN fails too.
    if not found.relative <= tolerance:
        raise ArtifactError(
            f"the merged model is not base + adapter: logits differ by {found}; at most {tolerance:g} relative is "
            "rounding. Nothing was written. Try --dtype float32; if that fails too, please report it."
        )
    result: dict[str, Any] = {
        "probe": {"questions": len(asked.prompts), "against": f"{kind} base + adapter", **found.plain()},
        "tolerance": tolerance,
    }
    if source.nf4:
        other: BaseKind = "original" if kind == "dequantized" else "dequantized"
        trained = theirs if kind == "dequantized" else logits_with_adapter("dequantized")
        read: Read = merged_reader(source.files, base_reader(source.files, source.manifest, other), adapter, dtype)
        apart = {kind: difference(ours, trained, asked)}
        apart[other] = difference(logits_of(merged_model(read, config), asked), trained, asked)
        result["distance_from_trained"] = {name: one.plain() for name, one in sorted(apart.items())}
    return result


def save_surroundings(directory: Path, source: Source) -> None:
    """Write tokenizer, processor and generation settings, so that images and chats are read as in training."""
    images = source.manifest.images
    template = get_template(**source.manifest.template)
    tokenizer = AutoTokenizer.from_pretrained(source.base)
    pixels, _ = ImageProcessingMixin.get_image_processor_dict(source.base)
    save_processor(
        directory,
        tokenizer,
        source.config,
        pixels,
        aspect_ratio=images["image_aspect_ratio"],
        chat_template=chat_template(template, tokenizer.eos_token),
    )
    write_generation_config(directory, source.base, template, tokenizer)
    if (source.base / "tokenizer.model").is_file():
        shutil.copyfile(source.base / "tokenizer.model", directory / "tokenizer.model")


def write_config(directory: Path, base: Path, dtype: torch.dtype) -> None:
    """Write the base's config.json with the type of the weights that are there now."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    for name in ("quantization_config", "torch_dtype", "_name_or_path"):
        config.pop(name, None)
    config["dtype"] = dtype_name(dtype)
    write_json(directory / "config.json", config)


def summary(report: dict[str, Any], output: Path) -> list[str]:
    """Say what a merge did, in the lines that the command shows."""
    probe = {key: report["probe"][key] for key in ("max_abs", "relative", "answers_equal", "answers")}
    lines = [
        f"merged into {output}: {counted(len(report['files']), 'file')}, {report['dtype']}",
        f"base: {report['base']} ({report['reason']})",
        f"against base + adapter, logits of {report['probe']['questions']} questions: {Difference(**probe)} "
        f"(at most {report['tolerance']:g} relative is taken for rounding)",
    ]
    for name, found in report.get("distance_from_trained", {}).items():
        lines.append(f"from what was trained, merged into the {name} base: {Difference(**found)}")
    return lines
