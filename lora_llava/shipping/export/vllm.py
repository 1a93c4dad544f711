"""Export for vLLM: a base with the tuned projector merged in, and an adapter that holds only LoRA.

vLLM refuses adapters with a projector and DoRA (vllm/lora/peft_helper.py), and reads one rank and one scale for all
layers. So everything except LoRA on the decoder layers is merged into the base.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch.nn.functional import pad

from lora_llava.errors import ArtifactError
from lora_llava.formats.adapter_config import write_adapter_config
from lora_llava.formats.llava_hf import WeightFiles, expected_shapes, save_tensors, write_json, write_weights
from lora_llava.formats.names import EMBEDDINGS, LAYERS_PREFIX, PEFT_PREFIX, WEIGHTS, memory_name
from lora_llava.formats.peft_adapter import Adapter
from lora_llava.shipping.export.options import REPORT, VLLM_RANKS, ExportOptions, ExportReport, max_lora_rank
from lora_llava.shipping.merge.probe import (
    LogitDifference,
    adapted_model,
    ask,
    difference,
    logits_of,
    probe_line,
    probe_report,
)
from lora_llava.shipping.merge.run import (
    Source,
    artifact_logits,
    choose_base,
    copy_surroundings,
    open_source,
    report_on,
    write_config,
)
from lora_llava.shipping.merge.stream import BaseKind, base_reader, merged_reader
from lora_llava.system.files import staged_result
from lora_llava.system.text import counted

_BASE, _ADAPTER = "base", "adapter"


@dataclass(frozen=True, slots=True)
class _Form:
    """The single rank and scale that vLLM reads for all layers."""

    r: int
    lora_alpha: float
    use_rslora: bool
    scaled_b: bool
    """Whether each layer's B is multiplied by its scale, because the scales differ."""


def export_vllm(source: Path, output: Path, options: ExportOptions) -> ExportReport:
    """Write `source`, an artifact with LoRA, as OUTPUT/base and OUTPUT/adapter.

    Both are read back and compared with the artifact on its base. Raises ArtifactError for a whole model, for forms
    that vLLM refuses, and if rounding does not explain the difference.
    """
    served = _served_layers(Adapter(source), source)
    with staged_result(output) as staging:
        opened = open_source(source, options.base_model)
        kind = choose_base(opened, options.base)
        form = _form(opened.adapter, served)
        _write_base(staging / _BASE, opened, kind, served)
        _write_adapter(staging / _ADAPTER, opened.adapter, served, form)
        written = WeightFiles(staging / _BASE)
        report = report_on(opened, kind, written.dtype(EMBEDDINGS), **_verify(opened, kind, written, staging))
        write_json(staging / REPORT, report)
        # Last: without config.json, no reader takes the leftovers of an interruption for a model.
        write_config(staging / _BASE, opened.base, written.dtype(EMBEDDINGS))
    return {**report, "summary": _summary(report, output, form, len(served))}


def _served_layers(adapter: Adapter, source: Path) -> list[str]:
    """Return the weights whose LoRA vLLM serves; ArtifactError if there are none or vLLM refuses their form."""
    if adapter.config.use_dora:
        raise ArtifactError(
            f"{source}: DoRA, which vLLM does not serve as an adapter. Merge it (lora-llava merge), and vLLM serves "
            "the merged model; or train with adapter.type lora or rslora."
        )
    served = sorted(name for name in adapter.layers if name.startswith(LAYERS_PREFIX))
    if not served:
        raise ArtifactError(
            f"{source}: holds no LoRA on the language model, so there is no adapter to serve. Merge it (lora-llava "
            "merge), and vLLM serves the merged model."
        )
    return served


def _form(adapter: Adapter, served: list[str]) -> _Form:
    config = adapter.config
    if not (config.rank_pattern or config.alpha_pattern):
        form = _Form(config.r, config.lora_alpha, bool(config.use_rslora), scaled_b=False)
    else:
        rank = max(adapter.stored(adapter.layers[name].a).shape[0] for name in served)
        form = _Form(rank, rank, use_rslora=False, scaled_b=True)
    if form.r > VLLM_RANKS[-1]:
        raise ArtifactError(
            f"{adapter.path}: LoRA of rank {form.r}; vLLM serves ranks up to {VLLM_RANKS[-1]}. Merge it (lora-llava "
            "merge), and vLLM serves the merged model."
        )
    return form


def _write_base(directory: Path, source: Source, kind: BaseKind, served: list[str]) -> None:
    """Merge everything but the served layers into the base, and write it without config.json, which comes last."""
    directory.mkdir()
    merged = set(source.adapter) - set(served)
    read = merged_reader(
        source.files, base_reader(source.files, source.manifest, kind), source.adapter, None, only=merged
    )
    write_weights(directory, ((name, read(name)) for name in sorted(expected_shapes(source.config))))
    copy_surroundings(directory, source)


def _write_adapter(directory: Path, adapter: Adapter, served: list[str], form: _Form) -> None:
    """Write an adapter of LoRA only, as PEFT does."""
    directory.mkdir()
    save_tensors(dict(_tensors(adapter, served, form)), directory / WEIGHTS)
    config = LoraConfig(
        r=form.r,
        lora_alpha=form.lora_alpha,
        use_rslora=form.use_rslora,
        # Full names: the vision tower has modules with the same last names.
        target_modules=[memory_name(name).removesuffix(".weight") for name in served],
    )
    # Relative, so that the pair can be moved; vLLM does not read it.
    write_adapter_config(directory, config, f"../{_BASE}")


def _tensors(adapter: Adapter, served: list[str], form: _Form) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield A (rank, inputs) and B (outputs, rank) of each layer by PEFT's names, all with one rank and scale."""
    for name in served:
        keys = adapter.layers[name]
        a, b = (adapter.read(key).to(adapter.stored(key).dtype) for key in (keys.a, keys.b))
        if form.scaled_b:
            missing = form.r - a.shape[0]
            a, b = pad(a, (0, 0, 0, missing)), pad((b.float() * keys.scaling).to(b.dtype), (0, missing))
        module = PEFT_PREFIX + memory_name(name).removesuffix(".weight")
        yield f"{module}.lora_A.weight", a
        yield f"{module}.lora_B.weight", b


def _verify(source: Source, kind: BaseKind, written: WeightFiles, staging: Path) -> dict[str, Any]:
    """Compare the written pair with the artifact on its base; ArtifactError if they differ by more than rounding."""
    written.check(source.config)
    model = adapted_model(written.read, source.config, Adapter(staging / _ADAPTER))
    asked = ask(model, source.config, source.template, staging / _BASE)
    ours = logits_of(model, asked)
    del model

    def distance(on: BaseKind) -> LogitDifference:
        return difference(ours, artifact_logits(source, on, asked), asked)

    try:
        result = probe_report(distance(kind), asked, kind, map(written.dtype, written))
    except ArtifactError as error:
        raise ArtifactError(
            f"the files written for vLLM are not the artifact: {error}. Nothing was written; please report it."
        ) from None
    if source.nf4 and kind == "original":
        result["distance_from_trained"] = asdict(distance("dequantized"))
    return result


def _summary(report: ExportReport, output: Path, form: _Form, layers: int) -> list[str]:
    lines = [
        f"{output / _BASE}: the {report['base']} base with the tuned projector, {report['dtype']} ({report['reason']})",
        f"{output / _ADAPTER}: LoRA of rank {form.r} on {counted(layers, 'layer')}",
        probe_line(report, "the artifact"),
    ]
    if trained := report.get("distance_from_trained"):
        lines.append(f"against the trained model: {LogitDifference(**trained)}")
    lines.append(
        f"vllm serve {shlex.quote(str(output / _BASE))} --enable-lora --max-lora-rank {max_lora_rank(form.r)} "
        f"--lora-modules {shlex.quote(f'tuned={output / _ADAPTER}')}"
    )
    return lines
