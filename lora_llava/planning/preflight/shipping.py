"""Report before training what export and serving do not support; check a command's models before it loads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lora_llava.errors import ModelError, PreflightError
from lora_llava.formats.shapes import LlavaShape, hidden_state_index
from lora_llava.planning.preflight.findings import Finding, Findings, Notice, Problem
from lora_llava.planning.preflight.model.base import model_problems, unreadable
from lora_llava.planning.preflight.model.files import find_model
from lora_llava.planning.preflight.model.text_side import custom_readers, reader_problems
from lora_llava.planning.preflight.setup import LLAVA, Setup
from lora_llava.recipe.settings import PROJECTOR_ACTIVATIONS, AdapterSettings
from lora_llava.recipe.stages import trains_lora
from lora_llava.system.files import find_json, joined, refuse_irregular

_GGUF_ROPES, _LLAVA_ROPES = ("default", "linear", "llama3"), ("default", "linear", "dynamic")
_MAX_VLLM_RANK = 512
"""vLLM's largest --max-lora-rank."""


def exports_that_fail(setup: Setup) -> Iterator[Finding]:
    """Give a notice for each format that the result cannot be exported to; the other formats remain."""
    shape = setup.shape
    if shape is None:
        return
    if reasons := list(no_gguf(shape)):
        yield Notice("export", f"The result cannot be exported with --format gguf: {'; '.join(reasons)}.")
    if reasons := list(no_llava(shape)):
        yield Notice("export", f"The result cannot be exported with --format llava: {'; '.join(reasons)}.")
    trained = any(trains_lora(stage) for stage in setup.recipe.stage_names)
    if trained and (refused := _no_vllm_adapter(setup.recipe.adapter)):
        yield Notice(
            "export", f"vLLM cannot serve the adapter: {refused}. It serves the model merged with lora-llava merge."
        )


def refuse_model(path: Path, base: str | None) -> None:
    """Raise PreflightError if the files of an artifact's base, or of a whole model, show that it cannot be loaded.

    `base` overrides the artifact's own path of its base. If `path` is not a directory, the command reports that.
    """
    refuse_irregular(path, ModelError)
    manifest = find_json(path / "manifest.json")
    if manifest is not None:
        name = base or _base_of(path, manifest)
    else:
        name = str(path) if (path / "config.json").is_file() else None
    if name is not None:
        refuse_base(name)


def refuse_base(name: str) -> None:
    """Raise PreflightError if the files of a local model show that it cannot be a base."""
    if not Path(name).expanduser().is_dir():
        return
    refuse_irregular(Path(name).expanduser(), ModelError)
    model = find_model(name, None, ())
    findings = Findings()
    findings.add(model_problems(LLAVA, model))
    if not findings.problems:
        findings.add(Problem(LLAVA, *problem) for problem in reader_problems(model))
    if findings.problems:
        raise PreflightError([f"{problem.what}. {problem.fix}" for problem in findings.problems])


def refuse_source(path: Path) -> None:
    """Raise PreflightError if the config.json of another tool's checkpoint shows that it cannot be read."""
    refuse_irregular(path, ModelError)
    problems = [*unreadable(find_json(path / "config.json") or {}), *custom_readers(path)]
    if problems:
        raise PreflightError([f"{path}: {what}. {fix}" for what, fix in problems])


def _base_of(path: Path, manifest: dict[str, object]) -> str | None:
    base = manifest.get("base")
    if not isinstance(base, dict):
        return None
    return str(joined(path, str(base["path"]))) if base.get("path") else str(base.get("name"))


def no_gguf(shape: LlavaShape) -> Iterator[str]:
    """Yield what of a model llama.cpp computes differently, or does not support."""
    layer, layers = shape.whole["vision_feature_layer"], int(shape.vision["num_hidden_layers"])
    if not isinstance(layer, int):
        yield f"vision_feature_layer {layer}: GGUF holds the features of one layer, not of several"
    elif not 1 <= hidden_state_index(layer, layers) <= layers:
        yield f"vision_feature_layer {layer}: llama.cpp needs at least one layer of the vision tower"
    if shape.whole["vision_feature_select_strategy"] != "default":
        yield "llama.cpp always drops the class token (vision_feature_select_strategy: default)"
    if shape.whole["projector_hidden_act"] != "gelu":
        yield "llama.cpp's projector needs GELU (mm_projector_type: mlp2x_gelu)"
    if shape.vision["hidden_act"] not in ("quick_gelu", "gelu"):
        yield f"llama.cpp supports no vision tower with {shape.vision['hidden_act']}"
    if shape.text.hidden_act != "silu":
        yield f"llama.cpp's Llama supports only silu, not {shape.text.hidden_act}"
    if (kind := _rope_type(shape)) not in _GGUF_ROPES:
        yield f"rope_type {kind}: GGUF is written for {', '.join(_GGUF_ROPES)} only"


def no_llava(shape: LlavaShape) -> Iterator[str]:
    """Yield what of a model the original LLaVA v1.2.2, on transformers 4.37.2, would drop, make up or not load."""
    if not isinstance(layer := shape.whole["vision_feature_layer"], int):
        yield f"vision_feature_layer {layer}: the original has the features of one layer, not of several"
    if (activation := shape.whole["projector_hidden_act"]) not in PROJECTOR_ACTIVATIONS.values():
        yield f"projector_hidden_act {activation}: the original has {' and '.join(PROJECTOR_ACTIVATIONS.values())}"
    if not shape.whole["multimodal_projector_bias"]:
        yield "multimodal_projector_bias false: the original's projector has biases, and would fill them at random"
    if shape.text.mlp_bias:
        yield "mlp_bias true: the original's Llama has no such biases, and would drop them"
    if (kind := _rope_type(shape)) not in _LLAVA_ROPES:
        yield f"rope_type {kind}: the original has {', '.join(_LLAVA_ROPES)} only"


def _rope_type(shape: LlavaShape) -> str:
    rope = getattr(shape.text, "rope_parameters", None) or getattr(shape.text, "rope_scaling", None) or {}
    return str(rope.get("rope_type", rope.get("type", "default")))


def _no_vllm_adapter(adapter: AdapterSettings) -> str | None:
    if adapter.type == "dora":
        return "it does not support DoRA"
    return f"it supports ranks up to {_MAX_VLLM_RANK}" if adapter.r > _MAX_VLLM_RANK else None
