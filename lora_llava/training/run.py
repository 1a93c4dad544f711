"""The assembly of a run, from a recipe to its artifacts, in the order in which things happen."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from transformers import set_seed

from lora_llava.artifact import (
    WEIGHTS,
    check_adapter,
    check_base,
    file_sha256,
    load_projector,
    read_manifest,
    save_artifact,
)
from lora_llava.data.records import fingerprint
from lora_llava.device import describe_device, peak_memory_bytes, pick_device, pick_dtype
from lora_llava.evaluation.figures import plot_loss
from lora_llava.modeling.assemble import assemble
from lora_llava.modeling.attention import set_attention
from lora_llava.modeling.attention_choice import pick_attention
from lora_llava.modeling.base import (
    BaseIdentity,
    LoadedModel,
    hash_weights,
    load_base,
    locate,
)
from lora_llava.modeling.describe import describe_directory
from lora_llava.modeling.packed import llava_in
from lora_llava.modeling.recompute import set_recompute
from lora_llava.modeling.stages import build_stage, check_stage, train_only_what_is_saved
from lora_llava.recipe import Recipe
from lora_llava.recipe_file import dump_resolved
from lora_llava.recipe_stages import StageName
from lora_llava.training import output
from lora_llava.training.build import image_facts, make_trainer
from lora_llava.training.cost import Machine
from lora_llava.training.frozen import FrozenWeights
from lora_llava.training.memory import planned_parameters
from lora_llava.training.memory_plan import MemoryPlan, StageShapes, plan_memory, usable_bytes
from lora_llava.training.plan import StageData, StageRecords, cache_offer, plan_records, read_records
from lora_llava.training.self_check import check_first_row
from lora_llava.training.tables import parameter_table_view
from lora_llava.training.trainer import PackedTrainer
from lora_llava.training.trial import out_of_memory_named, trial_line, try_longest_row


def run_recipe(
    recipe: Recipe, console: Console, *, overwrite: bool = False, memory: int | None = None
) -> dict[str, Any]:
    """Train every stage of `recipe`, in `memory` bytes; each starts from the artifact of the one before.

    Returns the run's summary, which is also written to `summary.json`. Raises LoraLlavaError's subclasses.
    """
    directory = recipe.resolved_output_dir
    if recipe.start_from is not None:
        read_manifest(recipe.start_from)
    output.claim_output_dir(directory, overwrite=overwrite)
    recipe_yaml = dump_resolved(recipe, directory)
    (directory / output.RECIPE).write_text(recipe_yaml, encoding="utf-8")
    clock = time.monotonic()
    base_directory, identity = prepare_base(recipe, directory)
    seconds = {"base": round(time.monotonic() - clock, 1)}
    summary: dict[str, Any] = {"name": recipe.name, "hardware": describe_device(), "seconds": seconds}
    parent = recipe.start_from
    for stage in recipe.stage_names:
        clock = time.monotonic()
        summary[stage] = train_stage(recipe, stage, base_directory, identity, parent, console, memory)
        summary["seconds"][stage] = round(time.monotonic() - clock, 1)
        parent = directory / stage
        plot_loss(directory / output.LOSS_PLOT, read_log(directory))
    summary["peak_memory_bytes"] = peak_memory_bytes()
    write_summary(directory, summary)
    return summary


def prepare_base(recipe: Recipe, directory: Path) -> tuple[Path, BaseIdentity]:
    """Find the base, or assemble it from its parts inside the run's directory, and hash its weights."""
    settings = recipe.base
    if settings.model_name_or_path:
        base_directory, revision = locate(settings.model_name_or_path, settings.revision)
        name = settings.model_name_or_path if revision else base_directory.resolve().name
    else:
        base_directory, revision = directory / output.BASE, None
        assemble(settings, base_directory, recipe.seed)
        name = f"{recipe.name}-{output.BASE}"
    return base_directory, BaseIdentity(name, revision, hash_weights(base_directory))


def train_stage(
    recipe: Recipe,
    stage: StageName,
    base_directory: Path,
    identity: BaseIdentity,
    parent: Path | None,
    console: Console,
    memory: int | None = None,
) -> dict[str, Any]:
    """Train one stage from `parent`'s artifact (None: from the base as it is) and save its own.

    `memory`: bytes of the card to plan for; None: what is free.
    """
    device = pick_device()
    dtype = pick_dtype(recipe.precision, device)
    set_seed(recipe.seed)
    # The data before the weights: a mistake in it shows at once.
    records, shapes = read_stage(recipe, stage, base_directory, dtype)
    attention, why = pick_attention(recipe.attn_implementation, shapes.config.text_config, device, dtype)
    machine = Machine(device.type, usable_bytes(device, memory), attention)
    chosen = plan_memory(shapes, machine)
    data = plan_records(records, recipe.stage(stage), chosen.tokens_per_micro_batch, recipe.seed)
    loaded = load_quantized(recipe, base_directory, identity, chosen, dtype, device)
    model = start_stage(recipe, stage, loaded, parent)
    table = check_stage(model, stage, nf4=recipe.quantization.type == "nf4" and not chosen.keep_dequantized)
    set_recompute(model, chosen.recompute.policy, chosen.recompute.full_layers)
    set_attention(llava_in(model), attention)
    console.print(parameter_table_view(table, f"Parameters, stage {stage}"))
    lines = [data.summary(), str(chosen), f"attention {attention}, {why}", cache_offer(recipe.stage(stage), data)]
    console.print("\n".join(f"{stage}: {line}" for line in lines if line))
    trainer = make_trainer(recipe, stage, loaded, data, chosen.optim, dtype, console)
    with out_of_memory_named(shapes, machine, chosen):
        if device.type == "cuda":
            tokens = try_longest_row(model, trainer.train_dataset, data.encoded.items, shapes, console)
            console.print(f"{stage}: {trial_line(tokens, chosen)}")
        check_first_row(model, trainer.train_dataset, dtype, device)
        frozen = FrozenWeights(model)
        trainer.train()
    metrics = closing_metrics(trainer)
    console.print(f"{stage}: {frozen.check(stage)}")
    facts = stage_facts(recipe, stage, loaded, data, parent, trainer.state.global_step)
    facts["metrics"] = metrics
    # The artifact's copy of the recipe sits one level below the run's.
    directory = recipe.resolved_output_dir / stage
    save_artifact(directory, model, loaded, facts, dump_resolved(recipe, directory))
    memory_facts = {"memory_plan": asdict(chosen), "peak_memory_bytes": peak_memory_bytes()}
    return {**facts["seen"], **metrics, **memory_facts, "parameters": [asdict(row) for row in table]}


def load_quantized(
    recipe: Recipe,
    base_directory: Path,
    identity: BaseIdentity,
    chosen: MemoryPlan,
    dtype: torch.dtype,
    device: torch.device,
) -> LoadedModel:
    """Load the base in the precision that the recipe, and the plan of its memory, ask for."""
    return load_base(
        base_directory,
        identity,
        nf4=recipe.quantization.type == "nf4",
        double_quant=recipe.quantization.double_quant,
        keep_dequantized=chosen.keep_dequantized,
        dtype=dtype,
        device=device,
    )


def read_stage(
    recipe: Recipe, stage: StageName, base_directory: Path, dtype: torch.dtype
) -> tuple[StageRecords, StageShapes]:
    """Read the data of a stage, and the shapes that its memory depends on; no weight is read.

    Records that are skipped are noted in the run's directory.
    """
    config, tokenizer = describe_directory(base_directory)
    records = read_records(recipe.stage(stage), config, tokenizer, recipe.seed)
    output.note_skipped(recipe.resolved_output_dir, stage, records.skipped)
    table = planned_parameters(recipe, stage, config, dtype)
    shared = records.sharing(recipe.stage(stage))
    return records, StageShapes(recipe, stage, config, table, dtype, records.longest, shared)


def stage_facts(
    recipe: Recipe, stage: StageName, loaded: LoadedModel, data: StageData, parent: Path | None, steps: int
) -> dict[str, Any]:
    """Collect what the manifest says of a trained stage."""
    settings = recipe.stage(stage)
    return {
        "stage": stage,
        "parent_sha256": file_sha256(parent / WEIGHTS) if parent else None,
        "quantization": recipe.quantization.model_dump(),
        "template": {"name": settings.template, "system": settings.system},
        "images": image_facts(recipe, settings, loaded),
        "data": {
            "sha256": fingerprint(data.encoded.records),
            "records": len(data.encoded),
            "validation_records": len(data.validation),
            "skipped_records": len(data.skipped),
            "answer_prompt": settings.data.answer_prompt,
            "merge_turns": settings.data.merge_turns,
        },
        "seen": {
            "steps": steps,
            "conversations": data.plan.num_conversations,
            "questions": sum(step.questions for step in data.counts),
            "supervised_tokens": sum(step.supervised_tokens for step in data.counts),
            "computed_tokens": data.plan.num_computed_tokens,
        },
    }


def start_stage(recipe: Recipe, stage: StageName, loaded: LoadedModel, parent: Path | None) -> Any:
    """Give the base the projector (and, going on from an instruct artifact, the LoRA) of `parent`; wrap it."""
    if parent is not None:
        manifest = read_manifest(parent)
        check_base(manifest, loaded.identity.weights_sha256, str(loaded.directory), parent)
        if manifest.stage == "instruct" and stage == "instruct":
            check_adapter(parent, recipe.adapter)
            loaded.model = PeftModel.from_pretrained(loaded.model, str(parent), is_trainable=True)
            train_only_what_is_saved(loaded.model)
            return loaded.model
        load_projector(parent, loaded.model)
    loaded.model = build_stage(loaded.model, stage, recipe.adapter)
    return loaded.model


def closing_metrics(trainer: PackedTrainer) -> dict[str, float]:
    """Return the last logged training loss and, with a validation set, the loss on it at the end."""
    history = trainer.state.log_history
    losses = [row["loss"] for row in history if "loss" in row]
    metrics = {"train_loss": float(losses[-1])} if losses else {}
    if trainer.eval_dataset is not None:
        at_the_end = [row for row in history if "eval_loss" in row and row["step"] == trainer.state.global_step]
        last = at_the_end[-1] if at_the_end else trainer.evaluate()
        metrics |= {key: last[key] for key in ("eval_loss", "eval_loss_blind", "image_gain") if key in last}
    return metrics


def read_log(directory: Path) -> list[dict[str, Any]]:
    """Read the run's log."""
    path = directory / output.TRAIN_LOG
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def write_summary(directory: Path, summary: dict[str, Any]) -> None:
    """Write the run's summary."""
    (directory / output.SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
