"""Train one stage, top to bottom: data, plan, resuming, model, checks, training, artifact. Read this page first."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from transformers import set_seed

from lora_llava.artifact import read_manifest
from lora_llava.data.stage import StageData, StageRecords, cache_offer, length_lines, plan_records, read_records
from lora_llava.formats.llava_hf import expected_shapes
from lora_llava.formats.peft_adapter import Adapter
from lora_llava.modeling.attention import set_attention
from lora_llava.modeling.base import LoadedModel, load_base, undo_double_quantization
from lora_llava.modeling.fused.layer import fuse_layers, graph_lengths, why_not_compiled
from lora_llava.modeling.metadata import describe_directory
from lora_llava.modeling.packed import llava_in
from lora_llava.modeling.recompute import set_recompute
from lora_llava.modeling.stages import build_stage, check_stage, freeze_unsaved
from lora_llava.modeling.structure import PartParameters, image_tokens
from lora_llava.planning.attention import pick_attention
from lora_llava.planning.calibration import measure_speed
from lora_llava.planning.memory_plan import (
    GIB,
    MemoryPlan,
    StageShapes,
    has_room_for_scales,
    plan_line,
    plan_memory,
    stage_shapes,
    usable_bytes,
    with_possible_graphs,
)
from lora_llava.planning.speed import Machine
from lora_llava.planning.tables import parameter_table_view
from lora_llava.recipe.stages import trains_lora
from lora_llava.run_directory import output
from lora_llava.system.device import peak_memory_bytes, pick_device, pick_dtype, precision_line
from lora_llava.system.progress import phase
from lora_llava.system.ranks import by_first, largest, least
from lora_llava.system.text import counted
from lora_llava.training.build import make_trainer
from lora_llava.training.checkpoints.differences import Resume, run_facts
from lora_llava.training.checkpoints.files import Checkpoint, DamagedCheckpointError, read_verified
from lora_llava.training.checkpoints.kept import KeptStep, choose_kept
from lora_llava.training.checkpoints.resume import (
    check_unchanged,
    find_checkpoint,
    prepare_log,
    stored_memory_plan,
    stored_speed,
)
from lora_llava.training.checkpoints.saver import CheckpointSaver
from lora_llava.training.checkpoints.stage_artifact import StageArtifact, seen_until
from lora_llava.training.checkpoints.state import load_weights
from lora_llava.training.checks.faster_paths import check_fused, try_graphs
from lora_llava.training.checks.first_row import check_first_row
from lora_llava.training.checks.longest_row import out_of_memory_named, trial_lines, try_longest_row
from lora_llava.training.checks.non_finite import skip_limit
from lora_llava.training.objectives.reference import attach_reference
from lora_llava.training.parallel.lockstep import is_in_lockstep
from lora_llava.training.parallel.offload import check_offload, offload_line
from lora_llava.training.parallel.sharding import sharded, sharding_line
from lora_llava.training.stage import Stage
from lora_llava.training.start import check_adapter, check_parent, load_projector
from lora_llava.training.trainer import PackedTrainer


def train_stage(
    stage: Stage, console: Console, *, memory: int | None = None, resume: Resume = "no"
) -> tuple[dict[str, Any], float]:
    """Train one stage and save its artifact.

    `memory`: bytes of the card to plan for; None: what is free. Returns the stage's part of the run's summary, and
    the seconds that the stage took over all sessions. Raises LoraLlavaError's subclasses; after a signal
    RunInterruptedError.
    """
    started = time.monotonic()
    dtype = pick_dtype(stage.recipe.precision, pick_device())
    set_seed(stage.seed)

    # 1. Look at what it starts from, and read the data, before the weights: a mistake shows at once.
    records, shapes = _read_data(stage, dtype)

    # 2. Plan what fits: the checkpoint's plan if there is one, so that sums round alike; else the fastest.
    checkpoint = by_first(lambda: find_checkpoint(stage, resume, console))
    machine, measured = _measure_machine(stage, shapes, checkpoint, memory)
    stored = stored_memory_plan(checkpoint, stage, None if memory is None else machine.usable)
    plan = with_possible_graphs(stored or plan_memory(shapes, machine), shapes, machine)
    data = plan_records(records, stage.settings, plan.tokens_per_micro_batch, stage.seed)
    source = "auto, from the checkpoint" if stored else f"auto, from {machine.usable / GIB:.1f} GiB"
    lines = [*_data_lines(stage, data), plan_line(plan, shapes, source), *measured, _sharing_line(stage)]
    _print_lines(stage, lines, console)

    # 3. Resume exactly, or refuse, or list the guarantees that are lost.
    facts = by_first(lambda: run_facts(stage, shapes, data, plan, machine))
    exact = check_unchanged(checkpoint, stage, facts, len(data.plan.steps), resume, console)
    by_first(lambda: prepare_log(stage, checkpoint))

    # 4. Load the base, add what the stage trains, and build the trainer over the planned rows.
    loaded, parameters = _build_model(stage, plan, machine, dtype, console)
    console.print(parameter_table_view(parameters, f"Parameters, stage {stage.name}"))
    trainer = make_trainer(stage, loaded, data, plan.optim, dtype, console)
    saver = CheckpointSaver(StageArtifact(stage, loaded, data), plan, facts, started, checkpoint, exact=exact)

    with out_of_memory_named(shapes, machine, plan), sharded(trainer.model, shapes.shards):
        # 5. Check before the first step: the longest row fits, and packing does not change the logits.
        _check_rows(stage, trainer, shapes, data, plan, console)
        if stage.settings.trains_on_pairs:
            attach_reference(stage, trainer, data, facts, checkpoint, resume, console)

        # 6. Train; then prove that the base is untouched, choose the weights to keep, and save the artifact.
        phase(f"{stage.name}: training for {counted(len(data.plan.steps), 'step')}")
        trainer.train_and_save(saver)
        kept = _finish(trainer, saver, len(data.plan.steps), console)
    seen = {**seen_until(data, kept.last_step), **kept.metrics, **saver.cost()}
    memory_facts = {"memory_plan": asdict(plan), "peak_memory_bytes": largest(peak_memory_bytes())}
    return {**seen, **memory_facts, "parameters": [asdict(part) for part in parameters]}, saver.seconds


def _read_data(stage: Stage, dtype: torch.dtype) -> tuple[StageRecords, StageShapes]:
    """Check what a stage starts from; read its records, and the shapes that its memory depends on, but no weight.

    Skipped records are listed in the run's directory.
    """
    by_first(lambda: check_parent(stage))
    check_offload(stage, dtype)
    phase(f"{stage.name}: reading the data")
    config, tokenizer = describe_directory(stage.base_directory)
    records = read_records(stage.settings, tokenizer, image_tokens(config), stage.seed)
    by_first(lambda: output.note_skipped(stage.run_directory, stage.name, records.skipped))
    shapes = stage_shapes(stage.recipe, stage.name, config, dtype, records)
    return records, shapes


def _measure_machine(
    stage: Stage, shapes: StageShapes, checkpoint: Checkpoint | None, memory: int | None
) -> tuple[Machine, list[str]]:
    """Choose the attention, and measure memory and speed of the device; also return lines for the console.

    The speed is that of the checkpoint if there is one. It is assumed on a CPU, where it would change row lengths, and
    with them the rounding of sums, from run to run for little gain. Processes must plan alike: the first one's choice
    and speed, and the smallest memory, are those of all.
    """
    device, dtype = pick_device(), pick_dtype(stage.recipe.precision, pick_device())
    setting, config = stage.recipe.attn_implementation, shapes.config.text_config
    attention, why = by_first(lambda: pick_attention(setting, config, device, dtype))
    lines = [f"attn_implementation: {attention} ({why})"]
    if why_fp16 := precision_line(stage.recipe.precision, dtype):
        lines.append(why_fp16)
    # A stage before may have left its model in a cycle of references, where it would seem to be in use.
    gc.collect()
    usable, speed = least(usable_bytes(device.type, memory)), None
    if checkpoint is not None:
        speed = stored_speed(checkpoint)
    elif device.type == "cuda":
        speed, line = by_first(lambda: measure_speed(shapes, attention, device))
        lines.append(line)
    return Machine(device.type, usable, attention, speed), lines


def _data_lines(stage: Stage, data: StageData) -> list[str | None]:
    """Summarize the data of a stage and its steps; None for a line that does not apply."""
    batch = None if stage.settings.batch_size == "auto" else f"batch_size: {data.length.batch_size:,} (recipe)"
    lines = length_lines(stage.name, stage.settings, data)
    return [data.summary(), batch, *lines, cache_offer(stage.settings, data)]


def _sharing_line(stage: Stage) -> str | None:
    """Return a line about how several processes share the model or the optimizer, if there is something to say."""
    return sharding_line(stage) or offload_line(stage)


def _print_lines(stage: Stage, lines: Sequence[str | None], console: Console) -> None:
    """Print the lines that are not empty, each with the name of the stage."""
    text = "\n".join(f"{stage.name}: {line}" for line in lines if line)
    console.print(text, soft_wrap=not console.is_terminal)


def _build_model(
    stage: Stage, plan: MemoryPlan, machine: Machine, dtype: torch.dtype, console: Console
) -> tuple[LoadedModel, list[PartParameters]]:
    """Load the base as the recipe and the memory plan say, and make it the model of the stage."""
    dequantized = ", dequantized once" if plan.keep_dequantized else ""
    phase(f"{stage.name}: loading the base{f', in 4 bits{dequantized}' if stage.nf4 else ''}")
    loaded = load_base(
        stage.base_directory,
        stage.base,
        nf4=stage.nf4,
        double_quant=stage.quantization.double_quant,
        keep_dequantized=plan.keep_dequantized,
        dtype=dtype,
        device=pick_device(),
    )
    # The artifact must name the base by its final path.
    loaded.directory = output.final_path(stage.run_directory, stage.base_directory)
    model = _add_trained_parts(stage, loaded)
    parameters = check_stage(model, stage.name, nf4=stage.nf4 and not plan.keep_dequantized)
    if has_room_for_scales(plan, loaded.config):
        undo_double_quantization(model)
    if reason := fuse_layers(model):
        _print_lines(stage, [f"decoder layers train through PEFT's path, not fused: {reason}"], console)
    elif reason := why_not_compiled(model):
        _print_lines(stage, [f"elementwise parts of the layers are not compiled: {reason}"], console)
    set_recompute(model, plan.recompute.policy, plan.recompute.full_layers)
    set_attention(llava_in(model), machine.attention)
    return loaded, parameters


def _add_trained_parts(stage: Stage, loaded: LoadedModel) -> Any:
    """Add what the stage trains, starting from the parent's projector, and from its LoRA if both stages train one."""
    if stage.parent is not None:
        manifest = read_manifest(stage.parent)
        if trains_lora(manifest.stage) and stage.settings.trains_lora:
            check_adapter(stage.parent, stage.adapter)
            Adapter(stage.parent).check(expected_shapes(loaded.config))
            loaded.model = PeftModel.from_pretrained(loaded.model, str(stage.parent), is_trainable=True)
            freeze_unsaved(loaded.model)
            return loaded.model
        load_projector(stage.parent, loaded.model)
    loaded.model = build_stage(loaded.model, stage.name, stage.adapter)
    return loaded.model


def _check_rows(
    stage: Stage, trainer: PackedTrainer, shapes: StageShapes, data: StageData, plan: MemoryPlan, console: Console
) -> None:
    """Try the longest row on CUDA, and compare the first packed row with its conversations one by one."""
    model, rows, device = trainer.model, trainer.train_dataset, pick_device()
    if is_in_lockstep():
        # The same ones in all processes.
        rows = rows.with_rows([row for step in data.plan.steps for row in step])
    dtype = pick_dtype(stage.recipe.precision, device)
    if device.type == "cuda" and any(rows.rows):
        setting = stage.recipe.attn_implementation
        trial = try_longest_row(model, rows, data.encoded.items, dtype, console, attn_implementation=setting)
        # Neither unfuses nor captures layers whose weights come and go.
        is_whole = not is_in_lockstep()
        if is_whole and (line := check_fused(model, rows, data.encoded.items, dtype)) is not None:
            _print_lines(stage, [line], console)
            trial = try_longest_row(model, rows, data.encoded.items, dtype, console, attn_implementation=setting)
        if plan.graphs:
            _print_lines(stage, [try_graphs(model, rows, data.encoded.items, dtype)], console)
            plan = replace(plan, graphs=bool(graph_lengths(model)))
            trial = try_longest_row(model, rows, data.encoded.items, dtype, console, attn_implementation=setting)
        _print_lines(stage, trial_lines(trial, shapes, plan), console)
    check_first_row(model, rows, dtype, device, skip_limit(stage.settings) > 0)


def _finish(trainer: PackedTrainer, saver: CheckpointSaver, num_steps: int, console: Console) -> KeptStep:
    """Choose the weights to keep, prove that the base is untouched, and save the artifact of the stage."""
    kept = _keep_weights(trainer, saver, console)
    closing = [*trainer.before_save(), str(saver), saver.stopped_early(kept.last_step, num_steps), str(kept)]
    _print_lines(saver.stage, closing, console)
    by_first(lambda: saver.artifact.save(kept.step, kept.metrics))
    return kept


def _keep_weights(trainer: PackedTrainer, saver: CheckpointSaver, console: Console) -> KeptStep:
    """Choose the weights that a finished stage keeps, and load them if they are not those of its last step.

    Raises TrainingError if training changed no weight.
    """
    state = trainer.state
    for line in filter(None, trainer.after_training()):
        console.print(f"{saver.stage.name}: {line}", soft_wrap=True)
    if trainer.eval_dataset is not None and not any(
        "eval_loss" in row and row["step"] == state.global_step for row in state.log_history
    ):
        # Earlier versions saved the last step before they validated it.
        trainer.evaluate()
    kept = choose_kept(state.log_history, state.global_step, saver.settings.keep)
    if kept.step == state.global_step:
        return kept
    try:
        load_weights(read_verified(saver.parent / f"step-{kept.step}").directory, trainer.model)
    except DamagedCheckpointError as error:
        text = f"the checkpoint of the best step, {kept.step:,}, cannot be used ({error}); the last weights are kept"
        console.print(f"{saver.stage.name}: {text}", style="bold yellow", markup=False, soft_wrap=True)
        return choose_kept(state.log_history, state.global_step, "last")
    return kept
