"""`start_from`: what a recipe takes over from the artifact that it starts from, and what it may not say otherwise.

A LoRA is trained further as it is, so its form is the artifact's. Template, system text, image form and precision are
the artifact's unless the recipe names them; a difference is said. Only small JSON files are read here; whether the
artifact is whole and fits the base is for whoever loads it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from lora_llava.errors import RecipeError
from lora_llava.recipe.errors import shown
from lora_llava.recipe.settings import AdapterSettings, QuantizationSettings, Recipe
from lora_llava.recipe.stages import StageSettings

_LLAMA_LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
_LEAVES = re.compile(r"\.\*\\\.\(([\w|]+)\)$")
"""The end of the pattern that anchors LoRA on the language model: the names of its layers."""


_OWN_LAYERS = "layers of its own, named in its adapter_config.json"


@dataclass(frozen=True, slots=True)
class Start:
    """What `start_from` says of itself."""

    directory: Path
    manifest: dict[str, Any]
    adapter: dict[str, Any]
    """Values for `AdapterSettings`; empty if it has no LoRA."""

    @property
    def stage(self) -> str:
        """The stage that left it."""
        return str(self.manifest.get("stage"))


def read_start(directory: Path) -> Start | None:
    """Read what an artifact says of itself; None if it is not there, or is damaged: then loading it says how."""
    manifest = _read_json(directory / "manifest.json")
    form = _read_json(directory / "adapter_config.json")
    if manifest is None or form is None:
        return None
    return Start(directory, manifest, adapter_of(form) if manifest.get("stage") == "instruct" else {})


def adapter_of(form: Mapping[str, Any]) -> dict[str, Any]:
    """Put an adapter_config.json into the words of a recipe."""
    kind = "dora" if form.get("use_dora") else "rslora" if form.get("use_rslora") else "lora"
    return {
        "type": kind,
        "r": form.get("r"),
        "lora_alpha": form.get("lora_alpha"),
        "lora_dropout": form.get("lora_dropout", 0.0),
        "target_modules": _targets(form.get("target_modules")),
    }


def continued(recipe: Recipe) -> Recipe:
    """Return the recipe as it will be run: with what it takes over from `start_from`.

    Raises RecipeError for what the recipe says otherwise of a LoRA that is trained further, by name.
    """
    start = read_start(recipe.start_from) if recipe.start_from else None
    if start is None:
        return recipe
    first = recipe.stage_names[0]
    if start.adapter and first == "align":
        raise RecipeError(
            f"start_from: {start.directory} has a LoRA, which stage align cannot use: it trains the projector alone. "
            "Leave stages.align out (stages.align=null), or start from an artifact of stage align"
        )
    if start.stage != first:
        return recipe
    update: dict[str, Any] = {}
    if start.adapter:
        _refuse_another_form(recipe, start)
        update["adapter"] = _adapter(recipe.adapter, start)
    stage = _stage(recipe, recipe.stage(first), start.manifest)
    update["stages"] = recipe.stages.model_copy(update={first: stage})
    if recipe.evaluation is not None and stage.data.window != recipe.stage(first).data.window:
        # The last stage alone has an evaluation, and asks about images in the shades of its training.
        data = recipe.evaluation.data.model_copy(update={"window": stage.data.window})
        update["evaluation"] = recipe.evaluation.model_copy(update={"data": data})
    update["quantization"] = _quantization(recipe.quantization, start.manifest)
    return recipe.model_copy(update=update)


def unlike_the_start(recipe: Recipe) -> list[tuple[str, str]]:
    """List the settings in which a recipe differs from the artifact that it starts from: key, and what to know."""
    start = read_start(recipe.start_from) if recipe.start_from else None
    first = recipe.stage_names[0]
    if start is None or start.stage != first:
        return []
    stage, manifest = recipe.stage(first), start.manifest
    data = manifest.get("data") or {}
    pairs = {
        f"stages.{first}.template": (stage.template, (manifest.get("template") or {}).get("name")),
        f"stages.{first}.system": (stage.system, (manifest.get("template") or {}).get("system")),
        f"stages.{first}.image_aspect_ratio": (
            stage.image_aspect_ratio or recipe.images.image_aspect_ratio,
            (manifest.get("images") or {}).get("image_aspect_ratio"),
        ),
        f"stages.{first}.data.window": (stage.data.window, (manifest.get("images") or {}).get("window")),
        f"stages.{first}.data.answer_prompt": (stage.data.answer_prompt, data.get("answer_prompt")),
    }
    if _precision_is_known(manifest):
        pairs["quantization.type"] = (recipe.quantization.type, manifest["quantization"]["type"])
    return [
        (key, f"{shown(now)}, but start_from was trained with {shown(before)}; the loss begins higher for it")
        for key, (now, before) in pairs.items()
        if now != before
    ]


def _adapter(settings: AdapterSettings, start: Start) -> AdapterSettings:
    taken = {key: value for key, value in start.adapter.items() if value is not None}
    return AdapterSettings.model_validate({**settings.model_dump(), **taken, "lora_alpha": float(taken["lora_alpha"])})


def _refuse_another_form(recipe: Recipe, start: Start) -> None:
    """Raise RecipeError for settings of the adapter that are given and are not the artifact's, all at once."""
    wrong = [
        f"adapter.{name}: is {shown(getattr(recipe.adapter, name))}, but the adapter in start_from ({start.directory}) "
        f"has {_OWN_LAYERS if has is None else shown(has)}, and is trained further as it is. Leave adapter.{name} out"
        for name, has in start.adapter.items()
        if name in recipe.adapter.model_fields_set and not _same(getattr(recipe.adapter, name), has)
    ]
    if wrong:
        raise RecipeError("\n".join(wrong))


def _same(wanted: Any, has: Any) -> bool:
    if isinstance(wanted, list) or isinstance(has, list):
        return _layers(wanted) == _layers(has)
    return bool(wanted == has)


def _layers(targets: Any) -> set[str]:
    return _LLAMA_LINEARS if targets == "all-linear" else set(targets or ())


def _stage(recipe: Recipe, stage: StageSettings, manifest: Mapping[str, Any]) -> StageSettings:
    """Return a stage with the template, system text, form and shades of images of the artifact, where it names none."""
    template = manifest.get("template") or {}
    update: dict[str, Any] = {}
    if "template" not in stage.model_fields_set and _takes(stage, template.get("name")):
        update["template"] = template["name"]
    if "system" not in stage.model_fields_set and update.get("template", stage.template) == template.get("name"):
        update["system"] = template.get("system")
    ratio = (manifest.get("images") or {}).get("image_aspect_ratio")
    named = "image_aspect_ratio" in stage.model_fields_set or "image_aspect_ratio" in recipe.images.model_fields_set
    if not named and ratio in ("pad", "square") and ratio != recipe.images.image_aspect_ratio:
        update["image_aspect_ratio"] = ratio
    window = (manifest.get("images") or {}).get("window")
    if window is not None and "window" not in stage.data.model_fields_set:
        update["data"] = stage.data.model_copy(update={"window": window})
    return stage.model_copy(update=update)


def _takes(stage: StageSettings, template: Any) -> bool:
    """Tell whether a stage can be trained in a template."""
    return template in get_args(type(stage).model_fields["template"].annotation)


def _quantization(settings: QuantizationSettings, manifest: Mapping[str, Any]) -> QuantizationSettings:
    """Return the precision of the artifact, where the recipe names none."""
    if not _precision_is_known(manifest) or settings.model_fields_set & {"type", "double_quant"}:
        return settings
    return settings.model_copy(update={name: manifest["quantization"][name] for name in ("type", "double_quant")})


def _precision_is_known(manifest: Mapping[str, Any]) -> bool:
    """Tell whether the manifest says how the base was trained on; of an adapter of another tool nobody knows."""
    found = manifest.get("quantization")
    return bool(manifest.get("seen")) and isinstance(found, dict) and {"type", "double_quant"} <= set(found)


def _targets(targets: Any) -> Any:
    """Return the layers that a LoRA adapts as a recipe names them; None where it cannot."""
    if isinstance(targets, list):
        names = set(targets)
    elif isinstance(targets, str) and (match := _LEAVES.search(targets)):
        names = set(match[1].split("|"))
    else:
        return None
    return "all-linear" if names == _LLAMA_LINEARS else sorted(names)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
