"""What a stage depends on, and what of it differs between a run and what it left: named, and refused by default."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from lora_llava.artifact import WEIGHTS, file_sha256, library_versions
from lora_llava.data.records import fingerprint
from lora_llava.device import world_size
from lora_llava.errors import TrainingError
from lora_llava.files import shown_path
from lora_llava.modeling.base import BaseIdentity
from lora_llava.recipe import Recipe
from lora_llava.recipe_file import load_recipe
from lora_llava.recipe_stages import StageName
from lora_llava.run_directory import output
from lora_llava.training.cost import Machine
from lora_llava.training.memory_plan import MemoryPlan, StageShapes
from lora_llava.training.plan import StageData

Resume = Literal["no", "exact", "anyway"]
"""Start a run; go on with one that is still the same; go on with one that is not."""

Difference = tuple[str, Any, Any]
"""Key, what it was, what it is."""

RESOLVED = (
    "tokens_per_micro_batch", "gradient_checkpointing", "gradient_checkpointing_layers", "optim", "keep_dequantized",
)  # fmt: skip
"""Settings of memory and speed that may be `auto`; what they came to is compared."""
_FREE = (
    "dataloader_num_workers", "logging_steps", "eval_steps", "num_sample_answers", "save_steps", "save_total_limit",
    "data.path", "data.image_root", "data.split", "data.name", "data.revision", "data.exclude", "data.on_bad_record",
    "data.max_bad_records", "data.validation.path", "data.validation.exclude", "on_non_finite", "max_non_finite_steps",
)  # fmt: skip
"""Settings of a stage that change what is seen of a training, or where its data lie, and not what is learnt."""
_SHARED = {"align": ("seed", "quantization", "images"), "instruct": ("seed", "quantization", "images", "adapter")}
"""Sections of a recipe that a stage depends on besides its own."""
_FIXED = ("base (its weights)", "adapter.r", "adapter.type", "adapter.target_modules", "adapter.lora_alpha")
"""What the weights of a checkpoint are bound to."""
_MODEL: tuple[str, ...] = (
    "type",
    "double_quant",
    "image_aspect_ratio",
    "template",
    "system",
    "start_from (its weights)",
)
_MODEL += ("vision_feature_layer", "vision_feature_select_strategy")
_LATER: tuple[str, ...] = (
    "learning_rate",
    "mm_projector_lr",
    "lr_scheduler_type",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
)
_LATER += ("adam_beta1", "adam_beta2", "lora_dropout", "optim")
_ROUNDING: tuple[str, ...] = (
    "tokens_per_micro_batch",
    "gradient_checkpointing",
    "keep_dequantized",
    "attn_implementation",
    "device",
)
_ROUNDING += ("precision", "processes", "cache_image_features")


def run_facts(
    stage: StageName,
    shapes: StageShapes,
    data: StageData,
    chosen: MemoryPlan,
    identity: BaseIdentity,
    parent: Path | None,
    machine: Machine,
) -> dict[str, Any]:
    """Collect what a stage depends on besides the settings of its recipe, by recipe key where there is one."""
    key = f"stages.{stage}"
    return {
        "base (its weights)": identity.weights_sha256,
        "base.vision_feature_layer": shapes.config.vision_feature_layer,
        "base.vision_feature_select_strategy": shapes.config.vision_feature_select_strategy,
        "start_from (its weights)": file_sha256(parent / WEIGHTS) if parent else None,
        f"{key}.data (number of records)": len(data.encoded),
        f"{key}.data (sha256 of the records)": fingerprint(data.encoded.records),
        f"{key}.data.validation (sha256 of the records)": fingerprint(data.validation.records),
        f"{key}.batch_size": data.length.batch_size,
        f"{key}.tokens_per_micro_batch": chosen.tokens_per_micro_batch,
        f"{key}.gradient_checkpointing": str(chosen.recompute),
        f"{key}.optim": chosen.optim,
        "quantization.keep_dequantized": chosen.keep_dequantized,
        "attn_implementation": machine.attention,
        "precision": str(shapes.dtype).removeprefix("torch."),
        "device": machine.device,
        "processes": world_size(),
        **{f"version of {name}": found for name, found in library_versions().items()},
    }


def changed_settings(artifact: Path, recipe: Recipe, stage: StageName) -> list[Difference]:
    """List the settings of `stage` that are not those with which the artifact, or checkpoint, was trained."""
    before, now = flat_settings(stored_recipe(artifact)), flat_settings(recipe)
    return [
        (key, before.get(key), now.get(key))
        for key in dict.fromkeys((*before, *now))
        if _counts(key, stage) and before.get(key) != now.get(key)
    ]


def refuse_or_say(
    differences: list[Difference],
    stage: StageName,
    artifact: Path,
    recipe: Recipe,
    resume: Resume,
    console: Console,
) -> None:
    """Raise TrainingError if there are differences, or say what goes with them if the run goes on all the same."""
    if not differences:
        return
    lines = [f"  {key}: {_shown(before)} then, {_shown(now)} now" for key, before, now in differences]
    listed = "\n".join([f"stage {stage} is not what it was when {shown_path(artifact)} was written:", *lines])
    fixed = [key for key, _, _ in differences if key in _FIXED]
    if fixed:
        raise TrainingError(
            f"{listed}\nWeights trained so far fit nothing else ({', '.join(fixed)}). Set these back, or start a new "
            "run with another output_dir."
        )
    if resume != "anyway":
        raise TrainingError(
            f"{listed}\nSet these back to go on as if nothing had happened: {shown_path(recipe.resolved_output_dir)}/"
            f"{output.RECIPE} is the recipe of the run. Or go on with --resume-anyway, which gives up: "
            f"{'; '.join(given_up(differences))}."
        )
    text = f"{listed}\ngoing on all the same, which gives up: {'; '.join(given_up(differences))}"
    console.print(text, style="bold yellow", markup=False, soft_wrap=True)


def given_up(differences: list[Difference]) -> list[str]:
    """Say what a run that goes on with `differences` no longer is."""
    texts = []
    for key, _, _ in differences:
        name = key.rpartition(".")[2]
        if name in _ROUNDING or key.startswith("version of "):
            texts.append("figures that are those of an uninterrupted run bit by bit")
        elif name in _MODEL:
            texts.append(f"one model, asked in one form, for the whole stage: {name} holds from here on")
        elif name in _LATER:
            texts.append(f"one {name} for the whole stage: it holds from here on")
        elif "validation" in key:
            texts.append("validation losses that can be compared with the earlier ones")
        else:
            texts.append("each record once an epoch: the plan is another one, and is entered at the same step")
    return list(dict.fromkeys(texts))


def stored_recipe(directory: Path) -> Recipe:
    """Read the recipe with which an artifact, or a checkpoint, was trained."""
    return load_recipe(directory / output.RECIPE)


def flat_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings of a recipe by their dotted keys; lists are values."""
    flat: dict[str, Any] = {}

    def walk(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for name, one in value.items():
                walk(one, f"{key}.{name}" if key else name)
        else:
            flat[key] = value

    walk(recipe.plain(), "")
    return flat


def _counts(key: str, stage: StageName) -> bool:
    """Tell whether a setting has a part in what `stage` learns."""
    section, _, rest = key.partition(".")
    if section != "stages":
        return section in _SHARED[stage] and rest not in RESOLVED
    name, _, setting = rest.partition(".")
    return name == stage and setting not in _FREE + RESOLVED


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
