"""Build the trainer of a stage from its settings."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from rich.console import Console
from transformers import TrainingArguments

from lora_llava.data.rows import PackedRows, ReadImage
from lora_llava.data.stage import StageData
from lora_llava.modeling.base import LoadedModel
from lora_llava.recipe.schedule import logging_interval
from lora_llava.recipe.stages import PreferSettings
from lora_llava.run_directory import output
from lora_llava.system.processes import available_cores
from lora_llava.system.ranks import is_first, rank, world_size
from lora_llava.training.checks.blind import BlindCheck, make_image_check
from lora_llava.training.checks.check import Check
from lora_llava.training.checks.frozen_weights import FrozenWeights
from lora_llava.training.checks.monitor import StageMonitor
from lora_llava.training.checks.non_finite import NonFiniteGuard
from lora_llava.training.checks.preference import PreferenceWatch
from lora_llava.training.checks.samples import SampleAnswers
from lora_llava.training.checks.trained_weights import TrainedWeights
from lora_llava.training.feature_cache import use_features
from lora_llava.training.log import TrainingLog
from lora_llava.training.objectives.objective import TokenLoss
from lora_llava.training.objectives.preference import PreferenceObjective
from lora_llava.training.parallel.offload import offloads
from lora_llava.training.stage import Stage
from lora_llava.training.trackers import run_name, tracker_callbacks
from lora_llava.training.trainer import PackedTrainer

_NUM_WORKERS = (2, 4)
"""Fewest and most worker processes that `auto` takes on CUDA: an image takes 10 to 20 ms to decode, a row 100 to 500 ms
to compute."""
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - not written to; its size is asked
_MIN_SHARED_BYTES = 2**29
"""Workers hand over rows, 1.3 MiB an image, in shared memory; two rows of each worker are ready ahead."""


def pick_num_workers(setting: int | str, device: str) -> tuple[int, str]:
    """Return the number of the data loader's workers, and the reason; an empty one if the setting or a CPU decides."""
    if isinstance(setting, int):
        return setting, ""
    if device != "cuda":
        return 0, ""
    if _SHARED_MEMORY.is_dir() and (free := shutil.disk_usage(_SHARED_MEMORY).free) < _MIN_SHARED_BYTES:
        needed = f"workers need {_MIN_SHARED_BYTES >> 20} MiB; start the container with --shm-size=1g, or set a number"
        return 0, f"auto: {_SHARED_MEMORY} has {free >> 20} MiB free, {needed}"
    least, most = _NUM_WORKERS
    return max(least, min(most, available_cores() - 1)), "auto"


def _image_reader(stage: Stage, loaded: LoadedModel, data: StageData) -> ReadImage:
    """Return the function that turns the image of a record into pixels or cached features for the model."""
    transform, cache = stage.image_transform(loaded), stage.settings.cache_image_features
    if cache == "off":
        return transform
    directory = stage.run_directory / output.FEATURES if cache == "disk" else None
    return use_features(loaded.model, [*data.encoded.records, *data.validation.records], transform, directory)


def make_trainer(
    stage: Stage, loaded: LoadedModel, data: StageData, optim: str, dtype: torch.dtype, console: Console
) -> PackedTrainer:
    """Build the trainer of a stage over its planned rows."""
    settings, recipe = stage.settings, stage.recipe
    read_image = _image_reader(stage, loaded, data)
    rows = [row for step in data.plan.steps for row in step[rank() :: world_size()]]
    train, validation = PackedRows(rows, data.encoded.records, data.encoded, read_image, data.encoded.sources), None
    if data.validation:
        validation = PackedRows(data.validation_rows, data.validation.records, data.validation, read_image)
    guard = NonFiniteGuard.by_settings(train, stage.name, settings, dtype)
    args = _training_arguments(stage, data, optim, dtype)
    args.dataloader_num_workers, why = pick_num_workers(settings.dataloader_num_workers, args.device.type)
    if why:
        console.print(f"{stage.name}: dataloader_num_workers: {args.dataloader_num_workers} ({why})")
    log_file = TrainingLog(stage.name, stage.run_directory / output.TRAIN_LOG, data.counts, console)
    objective = PreferenceObjective(settings) if isinstance(settings, PreferSettings) else TokenLoss()
    checks = _make_checks(stage, loaded, data, guard, validation)
    if isinstance(objective, PreferenceObjective):
        watch = PreferenceWatch(objective, dtype, starts_at_zero=recipe.adapter.lora_dropout == 0)
        checks.insert(0, watch)
    trainer = PackedTrainer(
        loaded.model,
        args,
        train,
        validation,
        mm_projector_lr=getattr(settings, "mm_projector_lr", None),
        checks=checks,
        callbacks=[log_file, *(tracker_callbacks(recipe, stage.name, args) if is_first() else ())],
    )
    trainer.objective, trainer.offloads = objective, offloads(stage)
    return trainer


def _make_checks(
    stage: Stage, loaded: LoadedModel, data: StageData, guard: NonFiniteGuard, validation: PackedRows | None
) -> list[Check]:
    """List the checks of a stage, in the order in which the trainer asks them."""
    settings = stage.settings
    # Without the images, the log-probabilities of pairs have no reference to be compared with.
    sampled = None if settings.trains_on_pairs else validation
    sample = make_image_check(sampled, stage.image_transform(loaded)) if sampled else None
    questions = data.validation.records[: settings.num_sample_answers]
    keeps_best = settings.keep == "best"
    return [
        guard,
        BlindCheck(sample),
        *([SampleAnswers(loaded, questions, stage.template, stage.aspect_ratio)] if questions else []),
        StageMonitor(data.counts, settings.max_grad_norm, guard.skipped, keeps_best=keeps_best),
        TrainedWeights(stage.name, guard.skipped, guard.overflowed),
        FrozenWeights(stage.name),
    ]


def _training_arguments(stage: Stage, data: StageData, optim: str, dtype: torch.dtype) -> TrainingArguments:
    """Translate the settings of a stage for `transformers`."""
    settings, recipe = stage.settings, stage.recipe
    interval = data.eval_interval(settings)
    return TrainingArguments(
        output_dir=str(stage.current_checkpoints),
        run_name=run_name(recipe, stage.name),
        project=recipe.name,
        # The plan is the data loader: one pass over it is the whole stage.
        max_steps=len(data.plan.steps),
        # Shown by trackers only, which would show the default of 3.
        num_train_epochs=settings.num_train_epochs,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=data.plan.rows_per_step // world_size(),
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=data.length.num_warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        optim=optim,
        logging_steps=logging_interval(settings, len(data.plan.steps)),
        eval_strategy="no" if interval is None else "steps",
        eval_steps=interval,
        save_steps=len(data.plan.steps) if settings.save_steps == "auto" else settings.save_steps,
        seed=recipe.seed,
        bf16=dtype == torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        report_to=recipe.report_to,
    )
