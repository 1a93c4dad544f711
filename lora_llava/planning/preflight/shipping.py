"""Report before training what export and serving do not support; check a command's models before it loads them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from lora_llava.errors import ArtifactError, ModelError, PreflightError, RecipeError
from lora_llava.formats.manifest import BASE_OPTION, MANIFEST, base_of, manifest_problem
from lora_llava.formats.shapes import LlavaShape, hidden_state_index
from lora_llava.planning.preflight.findings import Finding, Findings, Notice, Problem
from lora_llava.planning.preflight.model.base import model_problems, unreadable
from lora_llava.planning.preflight.model.files import find_model
from lora_llava.planning.preflight.model.text_side import custom_readers, reader_problems
from lora_llava.planning.preflight.model.weights import read_weights
from lora_llava.planning.preflight.setup import LLAVA, Setup
from lora_llava.recipe.settings import PROJECTOR_ACTIVATIONS, AdapterSettings
from lora_llava.recipe.stages import trains_lora
from lora_llava.run_directory.claim import is_artifact
from lora_llava.system.files import find_json, refuse_irregular
from lora_llava.system.names import path_hint

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


def refuse_model(path: Path, base: str | None, copied_to: Path | None = None) -> None:
    """Raise an error if the files of a whole model, or of an artifact's base, show that it cannot be loaded.

    RecipeError if it does not exist, or is a whole model for which `base` is given; ArtifactError if it is neither, or
    without its base; PreflightError if the base is damaged. `base` overrides the artifact's own path of its base.
    `copied_to`: an output that takes as much space as the weights; ArtifactError if its disk has less.
    """
    if not path.exists():
        raise RecipeError(f"{path} does not exist. {path_hint(path)}")
    refuse_irregular(path, ModelError)
    name = str(path)
    if is_artifact(path):
        manifest = find_json(path / MANIFEST)
        if manifest is None or manifest_problem(manifest) is not None:
            # Reported where it is read.
            return
        name = base_of(manifest["base"], path, base)
    elif base is not None:
        raise RecipeError(f"{path} is a whole model and needs no base; leave {BASE_OPTION} out")
    refuse_base(name)
    weights = Path(name).expanduser()
    if copied_to is not None and weights.is_dir():
        nearest = next(path for path in copied_to.absolute().parents if path.is_dir())
        free, needed = shutil.disk_usage(nearest).free / 2**30, read_weights(weights).bytes / 2**30
        if needed > free:
            raise ArtifactError(
                f"{copied_to} takes {needed:.1f} GiB, as the weights in {weights}, and {free:.1f} GiB are free on its "
                "disk; free some space, or name an output on another disk"
            )


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
