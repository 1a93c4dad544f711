"""Settings that a stage inherits from what it continues: the artifact in `start_from`, or the run's own `instruct`.

Rank, scale and layers of the LoRA are always those of the artifact. Template, system prompt, image aspect ratio, window
and precision are inherited unless the recipe sets them; a difference is reported. Only small JSON files are read here;
loading checks that the artifact is complete and fits the base.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from lora_llava.errors import RecipeError
from lora_llava.recipe.errors import shown
from lora_llava.recipe.settings import AdapterSettings, ImageSettings, QuantizationSettings, Recipe
from lora_llava.recipe.stages import StageSettings, trains_lora
from lora_llava.system.files import find_json

_LLAMA_LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
_LEAVES = re.compile(r"\.\*\\\.\(([\w|]+)\)$")
"""End of the regex that restricts a LoRA to the language model: the names of its layers."""
_OTHER_LAYERS = "other layers, listed in its adapter_config.json"


@dataclass(frozen=True, slots=True)
class _Start:
    """The manifest and LoRA settings of the artifact in `start_from`."""

    directory: Path
    manifest: dict[str, Any]
    """With `template`, `images` and `data`, empty if the file has none."""
    adapter: dict[str, Any]
    """Values for `AdapterSettings`; empty if the artifact has no LoRA."""

    @property
    def stage(self) -> str:
        """Name of the stage that wrote the artifact."""
        return str(self.manifest.get("stage"))


def _read_start(directory: Path) -> _Start | None:
    """Read the manifest and LoRA settings of an artifact; None if missing or damaged, which loading reports."""
    manifest = find_json(directory / "manifest.json")
    config = find_json(directory / "adapter_config.json")
    if manifest is None or config is None:
        return None
    try:
        sections = {name: dict(manifest.get(name) or {}) for name in ("template", "images", "data")}
        adapter = adapter_of(config) if trains_lora(str(manifest.get("stage"))) else {}
        # What is inherited must be what a recipe accepts.
        _with_lora(AdapterSettings(), adapter)
        ImageSettings.model_validate({"window": sections["images"].get("window") or "auto"})
    except (TypeError, ValueError):
        return None
    return _Start(directory, {**manifest, **sections}, adapter)


def adapter_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate an adapter_config.json into the `adapter` settings of a recipe."""
    kind = "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"
    return {
        "type": kind,
        "r": config.get("r"),
        "lora_alpha": config.get("lora_alpha"),
        "lora_dropout": config.get("lora_dropout", 0.0),
        "target_modules": _targets(config.get("target_modules")),
    }


def continued(recipe: Recipe) -> Recipe:
    """Return the recipe with the settings that it inherits from `start_from`, and `prefer` from `instruct`.

    Raises RecipeError for `adapter` settings that differ from those of the LoRA in `start_from`.
    """
    return _with_preference(_started(recipe))


def _with_preference(recipe: Recipe) -> Recipe:
    """Return the recipe with stage `prefer` in the format of stage `instruct`, where it sets none."""
    before, after = recipe.stages.instruct, recipe.stages.prefer
    if before is None or after is None:
        return recipe
    names = {"template", "system", "image_aspect_ratio"} - after.model_fields_set
    if "template" in after.model_fields_set and after.template != before.template:
        names.discard("system")
    update: dict[str, Any] = {name: getattr(before, name) for name in names}
    if "window" not in after.data.model_fields_set:
        update["data"] = after.data.with_window(before.data.window)
    stages = recipe.stages.model_copy(update={"prefer": after.model_copy(update=update)})
    return recipe.model_copy(update={"stages": stages})


def _started(recipe: Recipe) -> Recipe:
    """Return the recipe with the settings that its first stage inherits from `start_from`."""
    start = _read_start(recipe.start_from) if recipe.start_from else None
    if start is None:
        return recipe
    first = recipe.stage_names[0]
    if start.adapter and not trains_lora(first):
        raise RecipeError(
            f"start_from: {start.directory} has a LoRA, which stage {first} cannot use: it trains only the projector. "
            f"Remove stages.{first} (stages.{first}=null), or start from an artifact of stage {first}"
        )
    if not _continues(start, first):
        return recipe
    update: dict[str, Any] = {}
    if start.adapter:
        _refuse_other_adapter(recipe, start)
        update["adapter"] = _with_lora(recipe.adapter, start.adapter)
    stage = _stage(recipe, recipe.stage(first), start.manifest)
    update["stages"] = recipe.stages.model_copy(update={first: stage})
    if recipe.evaluation is not None and stage.data.window != recipe.stage(first).data.window:
        # The evaluation follows the last stage and must show images as that stage did.
        data = recipe.evaluation.data.with_window(stage.data.window)
        update["evaluation"] = recipe.evaluation.model_copy(update={"data": data})
    update["quantization"] = _quantization(recipe.quantization, start.manifest)
    return recipe.model_copy(update=update)


def unlike_the_start(recipe: Recipe) -> list[tuple[str, str]]:
    """List the settings of a recipe that differ from those of the artifact in `start_from`, as key and message."""
    start = _read_start(recipe.start_from) if recipe.start_from else None
    first = recipe.stage_names[0]
    if start is None or not _continues(start, first):
        return []
    stage, manifest = recipe.stage(first), start.manifest
    window = stage.data.gray_window
    template, images = manifest["template"], manifest["images"]
    ratio = stage.image_aspect_ratio or recipe.images.image_aspect_ratio
    pairs = {
        f"stages.{first}.template": (stage.template, template.get("name")),
        f"stages.{first}.system": (stage.system, template.get("system")),
        f"stages.{first}.image_aspect_ratio": (ratio, images.get("image_aspect_ratio")),
        f"stages.{first}.data.window": (window and list(window), images.get("window")),
        f"stages.{first}.data.answer_prompt": (stage.data.answer_prompt, manifest["data"].get("answer_prompt")),
    }
    if _precision_is_known(manifest):
        pairs["quantization.type"] = (recipe.quantization.type, manifest["quantization"]["type"])
    return [
        (key, f"{shown(now)}, but start_from was trained with {shown(before)}; expect a higher initial loss")
        for key, (now, before) in pairs.items()
        if now != before
    ]


def _continues(start: _Start, first: str) -> bool:
    """Tell whether stage `first` trains all weights of the artifact further."""
    return start.stage == first or bool(start.adapter)


def _with_lora(settings: AdapterSettings, adapter: Mapping[str, Any]) -> AdapterSettings:
    """Return the settings with those of a LoRA that a recipe can express. Raises pydantic.ValidationError."""
    taken = {key: value for key, value in adapter.items() if value is not None}
    return AdapterSettings.model_validate({**settings.model_dump(), **taken})


def _refuse_other_adapter(recipe: Recipe, start: _Start) -> None:
    """Raise RecipeError for all given `adapter` settings that differ from the artifact's."""
    wrong = [
        f"adapter.{name}: is {shown(getattr(recipe.adapter, name))}, but the LoRA in start_from ({start.directory}) "
        f"has {_OTHER_LAYERS if value is None else shown(value)}, which cannot change. Remove adapter.{name}"
        for name, value in start.adapter.items()
        if name in recipe.adapter.model_fields_set and not _same(getattr(recipe.adapter, name), value)
    ]
    if wrong:
        raise RecipeError("\n".join(wrong))


def _same(given: Any, trained: Any) -> bool:
    if isinstance(given, list) or isinstance(trained, list):
        return _layers(given) == _layers(trained)
    return bool(given == trained)


def _layers(targets: Any) -> set[str]:
    return _LLAMA_LINEARS if targets == "all-linear" else set(targets or ())


def _stage(recipe: Recipe, stage: StageSettings, manifest: Mapping[str, Any]) -> StageSettings:
    """Return a stage that inherits template, system prompt, image aspect ratio and window where it sets none."""
    template, images = manifest["template"], manifest["images"]
    update: dict[str, Any] = {}
    if "template" not in stage.model_fields_set and _takes(stage, template.get("name")):
        update["template"] = template["name"]
    if "system" not in stage.model_fields_set and update.get("template", stage.template) == template.get("name"):
        update["system"] = template.get("system")
    ratio = images.get("image_aspect_ratio")
    named = "image_aspect_ratio" in stage.model_fields_set or "image_aspect_ratio" in recipe.images.model_fields_set
    if not named and ratio in ("pad", "square") and ratio != recipe.images.image_aspect_ratio:
        update["image_aspect_ratio"] = ratio
    window = images.get("window")
    if window is not None and "window" not in stage.data.model_fields_set | recipe.images.model_fields_set:
        update["data"] = stage.data.with_window(window)
    return stage.model_copy(update=update)


def _takes(stage: StageSettings, template: Any) -> bool:
    """Tell whether a stage supports a template."""
    return template in get_args(type(stage).model_fields["template"].annotation)


def _quantization(settings: QuantizationSettings, manifest: Mapping[str, Any]) -> QuantizationSettings:
    """Return the quantization of the artifact, unless the recipe sets one."""
    if not _precision_is_known(manifest) or settings.model_fields_set & {"type", "double_quant"}:
        return settings
    return settings.model_copy(update={name: manifest["quantization"][name] for name in ("type", "double_quant")})


def _precision_is_known(manifest: Mapping[str, Any]) -> bool:
    """Tell whether the manifest records the quantization; that of an imported adapter is unknown."""
    recorded = manifest.get("quantization")
    return bool(manifest.get("seen")) and isinstance(recorded, dict) and {"type", "double_quant"} <= set(recorded)


def _targets(targets: Any) -> Any:
    """Return `target_modules` of a LoRA as a recipe writes it; None if a recipe cannot express it."""
    if isinstance(targets, list):
        names = set(targets)
    elif isinstance(targets, str) and (match := _LEAVES.search(targets)):
        names = set(match[1].split("|"))
    else:
        return None
    return "all-linear" if names == _LLAMA_LINEARS else sorted(names)
