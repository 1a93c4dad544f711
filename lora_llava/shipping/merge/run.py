"""Merge an artifact, top to bottom: check, merge and write, compare with base + adapter, report."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig

from lora_llava.artifact import (
    Manifest,
    check_base,
    find_base,
    library_versions,
    portable,
    read_manifest,
)
from lora_llava.conversation.templates import Template, get_template
from lora_llava.errors import ArtifactError
from lora_llava.formats.llava_hf import MAX_SHARD_BYTES, WeightFiles, expected_shapes, write_json, write_weights
from lora_llava.formats.names import EMBEDDINGS, MERGE_REPORT
from lora_llava.formats.peft_adapter import Adapter
from lora_llava.formats.processor import save_surroundings
from lora_llava.formats.transformers_4 import with_old_names
from lora_llava.modeling.base import hash_weights
from lora_llava.modeling.identity import base_fields, check_base_files
from lora_llava.modeling.merged import with_identity
from lora_llava.modeling.metadata import read_config
from lora_llava.shipping.merge.probe import (
    LogitDifference,
    Sequences,
    adapted_model,
    ask,
    difference,
    logits_of,
    merged_model,
    probe_line,
    probe_report,
)
from lora_llava.shipping.merge.stream import BaseKind, Read, base_reader, merged_reader
from lora_llava.system.files import read_json, staged_result
from lora_llava.system.hub.artifact import located, source_facts
from lora_llava.system.progress import Advance, counting, phase
from lora_llava.system.text import counted, dtype_name

_REASONS = {
    "dequantized": "the adapter was trained on the base in NF4, and these are the weights that it saw",
    "original": "the adapter was trained on the unquantized base",
    "chosen": "chosen with --onto; the adapter was trained on the base in NF4",
}


@dataclass(frozen=True, slots=True)
class Source:
    """An artifact and its base, checked."""

    artifact: Path
    manifest: Manifest
    adapter: Adapter
    base: Path
    files: WeightFiles
    config: LlavaConfig
    surroundings: Path
    """Where tokenizer, pixel statistics and ends of an answer are those of training: the base, or the artifact."""

    @property
    def nf4(self) -> bool:
        """Whether the adapter was trained on a base in NF4."""
        return bool(self.manifest.quantization["type"] == "nf4")

    @property
    def template(self) -> Template:
        """The template of training."""
        return get_template(**self.manifest.template)


def open_source(artifact: Path, base_model: str | None) -> Source:
    """Read an artifact and find its base. Raises ArtifactError for an incomplete adapter, and for another base.

    `base_model`: directory or hub id of the base; None: where the manifest says. The base's weights are only hashed.
    """
    manifest = read_manifest(artifact)
    base = find_base(manifest, artifact, base_model)
    comparison = check_base_files(asdict(manifest), base_fields(base), str(base), artifact)
    adapter, config = Adapter(artifact), read_config(base)
    adapter.check(expected_shapes(config), finite=True)
    files = WeightFiles(base)
    files.check(config)
    check_base(manifest, hash_weights(base), str(base), artifact)
    surroundings = artifact if comparison.text_side else base
    return Source(artifact, manifest, adapter, base, files, config, surroundings)


def choose_base(source: Source, requested: BaseKind | None) -> BaseKind:
    """Return the base to merge into: `requested`, or what the adapter was trained on.

    Raises ArtifactError for `dequantized` if the adapter was not trained on a quantized base.
    """
    if requested == "dequantized" and not source.nf4:
        raise ArtifactError(
            f"{source.artifact} was trained on the unquantized base, so there is no dequantized base to merge into; "
            "leave --onto out"
        )
    return requested or ("dequantized" if source.nf4 else "original")


def report_on(source: Source, kind: BaseKind, dtype: torch.dtype, **facts: Any) -> dict[str, Any]:
    """Return the report on files written from an artifact: its base and why, their dtype, `facts`, the origin."""
    return {
        "base": kind,
        "reason": _REASONS["chosen" if kind == "original" and source.nf4 else kind],
        "dtype": dtype_name(dtype),
        **facts,
        "artifact": portable(source.manifest),
        "hub": source_facts(source.artifact),
        "versions": library_versions(),
    }


def merge_artifact(
    artifact: Path | str,
    output: Path | str,
    *,
    base: BaseKind | None = None,
    base_model: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, Any]:
    """Merge an artifact into its base, write the model to `output`, and check it against base + adapter.

    `base` is what to merge into (None: what the adapter was trained on); `base_model` where the base is, if not
    where the artifact says; `dtype` what to write (None: the dtypes of the base's file). Peak memory: one output
    file and the work on one tensor. Returns the content of `merge_report.json`. Raises ArtifactError, leaving nothing
    at `output`, if `output` exists, an input is wrong or the check fails.
    """
    with staged_result(Path(output)) as staging:
        source = open_source(located(artifact), base_model)
        kind = choose_base(source, base)
        merged = merged_reader(source.files, base_reader(source.files, source.manifest, kind), source.adapter, dtype)
        names = sorted(expected_shapes(source.config))
        with counting("merging", len(names)) as advance:
            shards = write_weights(staging, _each(names, merged, advance), max_shard_bytes)
        copy_surroundings(staging, source)
        written = WeightFiles(staging)
        checked = verify(source, kind, written, dtype, staging)
        report = report_on(source, kind, written.dtype(EMBEDDINGS), files=shards, **checked)
        # After all else: without config.json, no reader takes the leftovers of an interruption for a model.
        write_config(staging, source.base, written.dtype(EMBEDDINGS))
        report = with_identity(report, staging)
        write_json(staging / MERGE_REPORT, report)
    return report


def _each(names: Sequence[str], read: Read, advance: Advance) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each name with its tensor, and advance the progress bar."""
    for name in names:
        yield name, read(name)
        advance(1)


def artifact_logits(source: Source, kind: BaseKind, asked: Sequences) -> list[torch.Tensor]:
    """Return `logits_of` the adapter on a base, which is streamed."""
    read = base_reader(source.files, source.manifest, kind)
    return logits_of(adapted_model(read, source.config, source.adapter), asked)


def verify(
    source: Source, kind: BaseKind, written: WeightFiles, dtype: torch.dtype | None, staging: Path
) -> dict[str, Any]:
    """Compare the written model with base + adapter; ArtifactError if rounding does not explain the difference.

    For an adapter trained on NF4, also measures how far merging into each base is from the trained model.
    """
    written.check(source.config)
    config, adapter = source.config, source.adapter
    phase("Asking the merged model, and base + adapter, the same questions")
    model = merged_model(written.read, config)
    asked = ask(model, config, source.template, staging)
    ours = logits_of(model, asked)
    del model
    theirs = artifact_logits(source, kind, asked)
    try:
        result = probe_report(difference(ours, theirs, asked), asked, kind, map(written.dtype, adapter))
    except ArtifactError as error:
        raise ArtifactError(
            f"the merged model is not base + adapter: {error}. Nothing was written. Try --dtype float32; if that fails "
            "too, please report it."
        ) from None
    if source.nf4:
        other: BaseKind = "original" if kind == "dequantized" else "dequantized"
        trained = theirs if kind == "dequantized" else artifact_logits(source, "dequantized", asked)
        read: Read = merged_reader(source.files, base_reader(source.files, source.manifest, other), adapter, dtype)
        distances = {kind: difference(ours, trained, asked)}
        distances[other] = difference(logits_of(merged_model(read, config), asked), trained, asked)
        result["distance_from_trained"] = {name: asdict(distance) for name, distance in sorted(distances.items())}
    return result


def copy_surroundings(directory: Path, source: Source) -> None:
    """Write tokenizer, processor and generation settings, so that prompts and images are processed as in training."""
    origin, aspect_ratio = source.surroundings, source.manifest.images["image_aspect_ratio"]
    # First: the class of the tokenizer depends on it.
    if (origin / "tokenizer.model").is_file():
        shutil.copyfile(origin / "tokenizer.model", directory / "tokenizer.model")
    save_surroundings(directory, origin, source.config, source.template, aspect_ratio)


def write_config(directory: Path, base: Path, dtype: torch.dtype) -> None:
    """Write the base's config.json with the dtype of the written weights."""
    config = read_json(base / "config.json")
    for name in ("quantization_config", "torch_dtype", "_name_or_path"):
        config.pop(name, None)
    config["dtype"] = dtype_name(dtype)
    write_json(directory / "config.json", with_old_names(config))


def summary(report: dict[str, Any], output: Path) -> list[str]:
    """Return the lines that the command shows of a merge."""
    lines = [
        f"merged into {output}: {counted(len(report['files']), 'file')}, {report['dtype']}",
        f"base: {report['base']} ({report['reason']})",
        probe_line(report, "base + adapter"),
    ]
    for name, distance in report.get("distance_from_trained", {}).items():
        lines.append(f"against the trained model, merged into the {name} base: {LogitDifference(**distance)}")
    return lines
