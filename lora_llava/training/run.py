"""The assembly of a run, from a recipe to its artifacts, in the order in which things happen."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from transformers import set_seed

from lora_llava.artifact import check_adapter, check_base, load_projector, read_manifest
from lora_llava.device import describe_device, peak_memory_bytes, pick_device, pick_dtype
from lora_llava.errors import ArtifactError
from lora_llava.evaluation.figures import plot_loss
from lora_llava.modeling.attention import set_attention
from lora_llava.modeling.attention_choice import pick_attention
from lora_llava.modeling.base import BaseIdentity, LoadedModel, load_base
from lora_llava.modeling.describe import describe_directory
from lora_llava.modeling.packed import llava_in
from lora_llava.modeling.recompute import set_recompute
from lora_llava.modeling.stages import build_stage, check_stage, train_only_what_is_saved
from lora_llava.modeling.structure import PartRow
from lora_llava.progress import phase
from lora_llava.recipe import Recipe
from lora_llava.recipe_stages import StageName
from lora_llava.run_directory import output
from lora_llava.run_directory.claim import claimed
from lora_llava.training.build import make_trainer
from lora_llava.training.checkpoint import DamagedCheckpointError, verified
from lora_llava.training.cost import Machine
from lora_llava.training.differences import Resume, run_facts
from lora_llava.training.kept import KeptStep, choose_kept
from lora_llava.training.memory_plan import MemoryPlan, StageShapes, plan_memory, stage_shapes, usable_bytes
from lora_llava.training.plan import StageRecords, cache_offer, length_lines, plan_records, read_records
from lora_llava.training.prepare import prepare_base
from lora_llava.training.resumable import Saver
from lora_llava.training.resume import (
    as_finished,
    check_unchanged,
    find_checkpoint,
    refuse_another_run,
    resume_finished,
    stored_memory_plan,
    take_up,
)
from lora_llava.training.self_check import check_first_row
from lora_llava.training.stage_artifact import StageArtifact, seen_until
from lora_llava.training.state import load_weights
from lora_llava.training.tables import parameter_table_view
from lora_llava.training.trainer import PackedTrainer
from lora_llava.training.trial import out_of_memory_named, trial_line, try_longest_row


def run_recipe(
    recipe: Recipe,
    console: Console,
    *,
    overwrite: bool = False,
    memory: int | None = None,
    resume: Resume = "no",
) -> dict[str, Any]:
    """Train every stage of `recipe`, in `memory` bytes; each starts from the artifact of the one before.

    `resume`: go on with the run in `output_dir`, from its latest whole checkpoint. Returns the run's summary, which is
    also written to `summary.json`. Raises LoraLlavaError's subclasses.
    """
    if recipe.start_from is not None:
        _check_start(recipe.start_from)
    with claimed(recipe, overwrite=overwrite, resume=resume != "no"):
        return train_stages(recipe, console, memory, resume)


def train_stages(recipe: Recipe, console: Console, memory: int | None, resume: Resume) -> dict[str, Any]:
    """Train every stage of `recipe` in its directory, which is claimed; see `run_recipe`."""
    directory = recipe.resolved_output_dir
    summary: dict[str, Any] = {}
    if resume == "no":
        output.write_recipe(directory, recipe)
    else:
        refuse_another_run(recipe)
        summary = output.read_summary(directory)
    summary = {"name": recipe.name, "seconds": {}, **summary, "hardware": describe_device()}
    clock = time.monotonic()
    phase("Preparing the base")
    base_directory, identity = prepare_base(recipe, directory, summary)
    summary["seconds"]["base"] = round(time.monotonic() - clock + summary["seconds"].get("base", 0), 1)
    parent = recipe.start_from
    for stage in recipe.stage_names:
        if resume_finished(recipe, stage, identity, parent, summary, resume, console):
            recipe, parent = as_finished(recipe, stage), directory / stage
            continue
        output.write_summary(directory, summary)
        # It moves with the first checkpoint of the run, if the run assembled it.
        base_directory = output.present_path(directory, base_directory)
        summary[stage], seconds = train_stage(
            recipe, stage, base_directory, identity, parent, console, memory, resume=resume
        )
        summary.pop(output.EVALUATION, None)
        summary["seconds"][stage] = round(seconds, 1)
        parent = directory / stage
        with output.writing(directory, output.LOSS_PLOT) as picture:
            plot_loss(picture, output.read_log(directory))
    summary["peak_memory_bytes"] = max(peak_memory_bytes(), summary.get("peak_memory_bytes", 0))
    output.write_recipe(directory, recipe)
    output.write_summary(directory, summary)
    return summary


def _check_start(artifact: Path) -> None:
    try:
        read_manifest(artifact)
    except ArtifactError as error:
        raise ArtifactError(f"start_from: {error}") from error


def train_stage(
    recipe: Recipe,
    stage: StageName,
    base_directory: Path,
    identity: BaseIdentity,
    parent: Path | None,
    console: Console,
    memory: int | None = None,
    *,
    resume: Resume = "no",
) -> tuple[dict[str, Any], float]:
    """Train one stage from `parent`'s artifact (None: from the base as it is) and save its own.

    `memory`: bytes of the card to plan for; None: what is free. Returns the stage's part of the summary, and the
    seconds it took over all sessions. Raises RunInterruptedError after a signal.
    """
    started = time.monotonic()
    dtype = pick_dtype(recipe.precision, device := pick_device())
    set_seed(recipe.seed)
    # The data before the weights: a mistake in it shows at once.
    records, shapes = read_stage(recipe, stage, base_directory, dtype)
    attention, why = pick_attention(recipe.attn_implementation, shapes.config.text_config, device, dtype)
    machine = Machine(device.type, usable_bytes(device.type, memory), attention)
    found = find_checkpoint(recipe, stage, resume, console)
    chosen = stored_memory_plan(found, recipe, stage, memory) or plan_memory(shapes, machine)
    data = plan_records(records, stage, recipe.stage(stage), chosen.tokens_per_micro_batch, recipe.seed)
    facts = run_facts(stage, shapes, data, chosen, identity, parent, machine)
    exact = check_unchanged(found, recipe, facts, len(data.plan.steps), resume, console)
    take_up(recipe, stage, found)
    loaded, table = build_model(recipe, stage, base_directory, identity, parent, chosen, machine, dtype)
    console.print(parameter_table_view(table, f"Parameters, stage {stage}"))
    about = [data.summary(), *length_lines(stage, recipe.stage(stage), data), f"memory plan: {chosen}"]
    about += [f"attention {attention}, {why}", cache_offer(recipe.stage(stage), data) or ""]
    console.print("\n".join(f"{stage}: {line}" for line in about if line), soft_wrap=not console.is_terminal)
    trainer = make_trainer(recipe, stage, loaded, data, chosen.optim, dtype, console)
    artifact = StageArtifact(recipe, stage, loaded, data, parent)
    saver = Saver(artifact, chosen, facts, started, found, exact=exact)
    with out_of_memory_named(shapes, machine, chosen):
        if device.type == "cuda":
            tokens = try_longest_row(loaded.model, trainer.train_dataset, data.encoded.items, shapes, console)
            console.print(f"{stage}: {trial_line(tokens, chosen)}")
        check_first_row(loaded.model, trainer.train_dataset, dtype, device, trainer.guard.most_skipped > 0)
        trainer.train_and_save(saver)
    kept = keep_weights(trainer, saver, console)
    closing = [trainer.check_frozen(), str(saver), saver.stopped_early(kept.last_step, len(data.plan.steps)), str(kept)]
    console.print("\n".join(f"{stage}: {line}" for line in closing if line), soft_wrap=not console.is_terminal)
    artifact.save(kept.step, kept.metrics)
    seen = {**seen_until(data, kept.last_step), **kept.metrics, **saver.cost()}
    memory_facts = {"memory_plan": asdict(chosen), "peak_memory_bytes": peak_memory_bytes()}
    return {**seen, **memory_facts, "parameters": [asdict(row) for row in table]}, saver.seconds


def build_model(
    recipe: Recipe,
    stage: StageName,
    base_directory: Path,
    identity: BaseIdentity,
    parent: Path | None,
    chosen: MemoryPlan,
    machine: Machine,
    dtype: torch.dtype,
) -> tuple[LoadedModel, list[PartRow]]:
    """Load the base as the recipe, and the plan of its memory, ask for, and make the model of the stage of it."""
    nf4 = recipe.quantization.type == "nf4"
    phase(f"{stage}: loading the base{', in 4 bits' if nf4 else ''}")
    loaded = load_base(
        base_directory,
        identity,
        nf4=nf4,
        double_quant=recipe.quantization.double_quant,
        keep_dequantized=chosen.keep_dequantized,
        dtype=dtype,
        device=torch.device(machine.device),
    )
    # What is saved names the base by the path that it has then.
    loaded.directory = output.final_path(recipe.resolved_output_dir, base_directory)
    model = start_stage(recipe, stage, loaded, parent)
    table = check_stage(model, stage, nf4=nf4 and not chosen.keep_dequantized)
    set_recompute(model, chosen.recompute.policy, chosen.recompute.full_layers)
    set_attention(llava_in(model), machine.attention)
    return loaded, table


def read_stage(
    recipe: Recipe, stage: StageName, base_directory: Path, dtype: torch.dtype
) -> tuple[StageRecords, StageShapes]:
    """Read the data of a stage, and the shapes that its memory depends on; no weight is read.

    Records that are skipped are noted in the run's directory.
    """
    phase(f"{stage}: reading the data")
    config, tokenizer = describe_directory(base_directory)
    records = read_records(recipe.stage(stage), config, tokenizer, recipe.seed)
    output.note_skipped(recipe.resolved_output_dir, stage, records.skipped)
    return records, stage_shapes(recipe, stage, config, dtype, records)


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


def keep_weights(trainer: PackedTrainer, saver: Saver, console: Console) -> KeptStep:
    """Choose the weights that a finished stage keeps, and load them if they are not those of its last step.

    Raises TrainingError if training changed no weight.
    """
    state = trainer.state
    if unchanged := trainer.check_trained():
        console.print(f"{saver.artifact.stage}: {unchanged}", soft_wrap=True)
    if trainer.eval_dataset is not None and not any(
        "eval_loss" in row and row["step"] == state.global_step for row in state.log_history
    ):
        # Checkpoints of older versions: the last step was validated after it was saved.
        trainer.evaluate()
    kept = choose_kept(state.log_history, state.global_step, saver.settings.keep)
    if kept.step == state.global_step:
        return kept
    try:
        load_weights(verified(saver.parent / f"step-{kept.step}").directory, trainer.model)
    except DamagedCheckpointError as error:
        text = f"the checkpoint of the best step, {kept.step:,}, cannot be used ({error}); the last weights are kept"
        console.print(f"{saver.artifact.stage}: {text}", style="bold yellow", markup=False, soft_wrap=True)
        return choose_kept(state.log_history, state.global_step, "last")
    return kept
