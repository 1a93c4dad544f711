"""One stage, top to bottom: data, plan, model, checks, training, artifact. The page to read first."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from transformers import set_seed

from lora_llava.artifact import check_adapter, check_base, load_projector, read_manifest
from lora_llava.data.stage import StageData, StageRecords, cache_offer, length_lines, plan_records, read_records
from lora_llava.modeling.attention import set_attention
from lora_llava.modeling.base import LoadedModel, load_base
from lora_llava.modeling.metadata import describe_directory
from lora_llava.modeling.packed import llava_in
from lora_llava.modeling.recompute import set_recompute
from lora_llava.modeling.stages import build_stage, check_stage, train_only_what_is_saved
from lora_llava.modeling.structure import PartRow, image_tokens
from lora_llava.planning.attention import pick_attention
from lora_llava.planning.memory_plan import (
    GIB,
    MemoryPlan,
    StageShapes,
    plan_line,
    plan_memory,
    stage_shapes,
    usable_bytes,
)
from lora_llava.planning.speed import Machine
from lora_llava.planning.tables import parameter_table_view
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
    prepare_log,
    stored_memory_plan,
)
from lora_llava.training.checkpoints.saver import Saver
from lora_llava.training.checkpoints.stage_artifact import StageArtifact, seen_until
from lora_llava.training.checkpoints.state import load_weights
from lora_llava.training.checks.first_row import check_first_row
from lora_llava.training.checks.longest_row import out_of_memory_named, trial_line, try_longest_row
from lora_llava.training.stage import Stage
from lora_llava.training.trainer import PackedTrainer


def train_stage(
    stage: Stage, console: Console, *, memory: int | None = None, resume: Resume = "no"
) -> tuple[dict[str, Any], float]:
    """Train one stage and save its artifact.

    `memory`: bytes of the card to plan for; None: what is free. Returns the stage's part of the summary, and the
    seconds it took over all sessions. Raises RunInterruptedError after a signal.
    """
    started = time.monotonic()
    device = pick_device()
    dtype = pick_dtype(stage.recipe.precision, device)
    set_seed(stage.recipe.seed)

    # 1. Read the data before the weights: a mistake in it shows at once.
    records, shapes = read_stage(stage, dtype)

    # 2. Plan what fits: as the checkpoint did if there is one, so that sums round alike; else the fastest.
    attention, why = pick_attention(stage.recipe.attn_implementation, shapes.config.text_config, device, dtype)
    machine = Machine(device.type, usable_bytes(device.type, memory), attention)
    checkpoint = find_checkpoint(stage, resume, console)
    stored = stored_memory_plan(checkpoint, stage, memory)
    plan = stored or plan_memory(shapes, machine)
    data = plan_records(records, stage.name, stage.settings, plan.tokens_per_micro_batch, stage.recipe.seed)
    source = "auto, as in the checkpoint" if stored else f"auto, from {machine.usable / GIB:.1f} GiB"
    announce(stage, data, [plan_line(plan, stage.settings, source), f"attention {attention}, {why}"], console)

    # 3. Resume exactly, or refuse, or say which guarantees are lost.
    facts = run_facts(stage, shapes, data, plan, machine)
    exact = check_unchanged(checkpoint, stage, facts, len(data.plan.steps), resume, console)
    prepare_log(stage, checkpoint)

    # 4. Load the base, add what the stage trains, and build the trainer over the planned rows.
    loaded, parameters = build_model(stage, plan, machine, dtype)
    console.print(parameter_table_view(parameters, f"Parameters, stage {stage.name}"))
    trainer = make_trainer(stage, loaded, data, plan.optim, dtype, console)
    saver = Saver(StageArtifact(stage, loaded, data), plan, facts, started, checkpoint, exact=exact)

    with out_of_memory_named(shapes, machine, plan):
        # 5. Check before the first step: the longest row fits, and a packed row has the loss of separate ones.
        if device.type == "cuda":
            tokens = try_longest_row(loaded.model, trainer.train_dataset, data.encoded.items, shapes, console)
            console.print(f"{stage.name}: {trial_line(tokens, plan)}")
        check_first_row(loaded.model, trainer.train_dataset, dtype, device, trainer.guard.most_skipped > 0)

        # 6. Train; then prove that the base is untouched, keep the best weights, and leave the artifact.
        trainer.train_and_save(saver)
    kept = finish(trainer, saver, len(data.plan.steps), console)
    seen = {**seen_until(data, kept.last_step), **kept.metrics, **saver.cost()}
    memory_facts = {"memory_plan": asdict(plan), "peak_memory_bytes": peak_memory_bytes()}
    return {**seen, **memory_facts, "parameters": [asdict(part) for part in parameters]}, saver.seconds


def read_stage(stage: Stage, dtype: torch.dtype) -> tuple[StageRecords, StageShapes]:
    """Read the data of a stage, and the shapes that its memory depends on; no weight is read.

    Records that are skipped are listed in the run's directory.
    """
    phase(f"{stage.name}: reading the data")
    config, tokenizer = describe_directory(stage.base_directory)
    records = read_records(stage.settings, tokenizer, stage.recipe.seed, **image_tokens(config))
    output.note_skipped(stage.run_directory, stage.name, records.skipped)
    return records, stage_shapes(stage.recipe, stage.name, config, dtype, records)


def announce(stage: Stage, data: StageData, decisions: Sequence[str], console: Console) -> None:
    """Print what the stage trains on, what was decided, and where each value that the recipe leaves open is from."""
    lines = [data.summary(), *length_lines(stage.name, stage.settings, data), *decisions]
    print_lines(stage, [*lines, cache_offer(stage.settings, data)], console)


def print_lines(stage: Stage, lines: Sequence[str | None], console: Console) -> None:
    """Print the lines that say something, each with the name of the stage."""
    text = "\n".join(f"{stage.name}: {line}" for line in lines if line)
    console.print(text, soft_wrap=not console.is_terminal)


def build_model(
    stage: Stage, plan: MemoryPlan, machine: Machine, dtype: torch.dtype
) -> tuple[LoadedModel, list[PartRow]]:
    """Load the base as recipe and memory plan ask for, and make it the model of the stage."""
    phase(f"{stage.name}: loading the base{', in 4 bits' if stage.nf4 else ''}")
    loaded = load_base(
        stage.base_directory,
        stage.base,
        nf4=stage.nf4,
        double_quant=stage.recipe.quantization.double_quant,
        keep_dequantized=plan.keep_dequantized,
        dtype=dtype,
        device=torch.device(machine.device),
    )
    # What is saved names the base by the path that it will have.
    loaded.directory = output.final_path(stage.run_directory, stage.base_directory)
    model = start_stage(stage, loaded)
    parameters = check_stage(model, stage.name, nf4=stage.nf4 and not plan.keep_dequantized)
    set_recompute(model, plan.recompute.policy, plan.recompute.full_layers)
    set_attention(llava_in(model), machine.attention)
    return loaded, parameters


def start_stage(stage: Stage, loaded: LoadedModel) -> Any:
    """Give the base the parent's projector (and LoRA, if an instruct stage starts from one); add what is trained."""
    if stage.parent is not None:
        manifest = read_manifest(stage.parent)
        check_base(manifest, stage.base.weights_sha256, str(loaded.directory), stage.parent)
        if manifest.stage == "instruct" and stage.name == "instruct":
            check_adapter(stage.parent, stage.recipe.adapter)
            loaded.model = PeftModel.from_pretrained(loaded.model, str(stage.parent), is_trainable=True)
            train_only_what_is_saved(loaded.model)
            return loaded.model
        load_projector(stage.parent, loaded.model)
    loaded.model = build_stage(loaded.model, stage.name, stage.recipe.adapter)
    return loaded.model


def finish(trainer: PackedTrainer, saver: Saver, num_steps: int, console: Console) -> KeptStep:
    """Choose the weights to keep, prove that the base is untouched, and save the artifact of the stage."""
    kept = keep_weights(trainer, saver, console)
    closing = [trainer.check_frozen(), str(saver), saver.stopped_early(kept.last_step, num_steps), str(kept)]
    print_lines(saver.stage, closing, console)
    saver.artifact.save(kept.step, kept.metrics)
    return kept


def keep_weights(trainer: PackedTrainer, saver: Saver, console: Console) -> KeptStep:
    """Choose the weights that a finished stage keeps, and load them if they are not those of its last step.

    Raises TrainingError if training changed no weight.
    """
    state = trainer.state
    if unchanged := trainer.check_trained():
        console.print(f"{saver.stage.name}: {unchanged}", soft_wrap=True)
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
        console.print(f"{saver.stage.name}: {text}", style="bold yellow", markup=False, soft_wrap=True)
        return choose_kept(state.log_history, state.global_step, "last")
    return kept
