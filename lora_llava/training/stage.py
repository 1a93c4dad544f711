"""One stage, top to bottom: data, plan, model, checks, training, artifact. The page to read first."""

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
from lora_llava.data.stage import StageRecords, cache_offer, length_lines, plan_records, read_records
from lora_llava.modeling.attention import set_attention
from lora_llava.modeling.base import BaseIdentity, LoadedModel, load_base
from lora_llava.modeling.metadata import describe_directory
from lora_llava.modeling.packed import llava_in
from lora_llava.modeling.recompute import set_recompute
from lora_llava.modeling.stages import build_stage, check_stage, train_only_what_is_saved
from lora_llava.modeling.structure import PartRow, image_tokens
from lora_llava.planning.attention import pick_attention
from lora_llava.planning.memory_plan import MemoryPlan, StageShapes, plan_memory, stage_shapes, usable_bytes
from lora_llava.planning.speed import Machine
from lora_llava.planning.tables import parameter_table_view
from lora_llava.recipe.settings import Recipe
from lora_llava.recipe.stages import StageName
from lora_llava.run_directory import output
from lora_llava.system.device import peak_memory_bytes, pick_device, pick_dtype
from lora_llava.system.progress import phase
from lora_llava.training.build import make_trainer
from lora_llava.training.checkpoints.differences import Resume, run_facts
from lora_llava.training.checkpoints.files import DamagedCheckpointError, verified
from lora_llava.training.checkpoints.kept import KeptStep, choose_kept
from lora_llava.training.checkpoints.resume import (
    check_unchanged,
    find_checkpoint,
    stored_memory_plan,
    take_up,
)
from lora_llava.training.checkpoints.saver import Saver
from lora_llava.training.checkpoints.stage_artifact import StageArtifact, seen_until
from lora_llava.training.checkpoints.state import load_weights
from lora_llava.training.checks.first_row import check_first_row
from lora_llava.training.checks.longest_row import out_of_memory_named, trial_line, try_longest_row
from lora_llava.training.trainer import PackedTrainer


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
    records = read_records(recipe.stage(stage), tokenizer, recipe.seed, **image_tokens(config))
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
