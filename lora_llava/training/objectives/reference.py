"""The reference of stage `prefer`: log-probabilities of all answers by the weights that the stage starts from.

They are computed in one pass before the first step, and stored with the run, two numbers a pair. So the training needs
neither a second adapter nor a second pass in each step.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lora_llava.data.packing import Row, conversations, plan_in_order
from lora_llava.data.rows import PackedRows
from lora_llava.data.stage import StageData
from lora_llava.errors import TrainingError
from lora_llava.modeling.attention import to_device
from lora_llava.modeling.packed import answer_log_probs
from lora_llava.run_directory import output
from lora_llava.run_directory.written import current
from lora_llava.system.device import autocast
from lora_llava.system.progress import counting, phase
from lora_llava.system.ranks import by_first, gathered
from lora_llava.system.text import counted, listed
from lora_llava.training.checkpoints.differences import Resume, refuse_or_warn
from lora_llava.training.checkpoints.files import Checkpoint
from lora_llava.training.checks.non_finite import forked_rng
from lora_llava.training.parallel.lockstep import own_indices
from lora_llava.training.stage import Stage
from lora_llava.training.trainer import PackedTrainer

FACT = "reference (sha256 of the log-probabilities)"
"""The stage's fact about its reference, after its key."""
_OF = "of"
"""Key of the file's metadata: a hash of all that the reference depends on."""
_TRAIN, _VALIDATION = "train", "validation"

Reference = dict[str, torch.Tensor]
"""Log-probabilities (N, 2), in fp64, of the chosen and rejected answers of the training and the validation records; NaN
for records that no step trains on."""


def attach_reference(
    stage: Stage,
    trainer: PackedTrainer,
    data: StageData,
    facts: dict[str, Any],
    checkpoint: Checkpoint | None,
    resume: Resume,
    console: Console,
) -> None:
    """Give the pairs of a stage their reference: the run's own if it is of the same model and data, else a new one.

    The weights of `trainer` must be those that the stage starts from. Adds the hash of the reference to `facts`. Raises
    TrainingError if a log-probability is not finite, and, as `refuse_or_warn` does, if the hash is not that of the
    checkpoint.
    """
    identity = _identity(stage, data, facts)
    reference = by_first(lambda: _stored(stage.run_directory, identity, data))
    if reference is None:
        reference = _compute(trainer, data)
        if stage.settings.on_non_finite == "error":
            _check_finite(reference[_TRAIN], data)
        by_first(lambda: _store(stage.run_directory, identity, reference))
    key = f"{stage.key}.{FACT}"
    facts[key] = _sha256(reference)
    if checkpoint is not None and (then := checkpoint.facts.get(key)) != facts[key]:
        refuse_or_warn([(key, then, facts[key])], stage, checkpoint.directory, resume, console)
    for records, name in ((data.encoded, _TRAIN), (data.validation, _VALIDATION)):
        records.reference = [(chosen, rejected) for chosen, rejected in reference[name].tolist()]


def _identity(stage: Stage, data: StageData, facts: Mapping[str, Any]) -> str:
    """Hash all that a reference depends on: weights, records, their format, how they are computed, which are used."""
    settings = stage.settings
    depends_on = {
        "facts": {key: value for key, value in facts.items() if not key.endswith((".optim", "processes", FACT))},
        "format": [settings.template, settings.system, stage.aspect_ratio, settings.max_length, settings.data.window],
        "quantization": stage.quantization.model_dump(),
        "used": sorted(_used(data)),
    }
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True, default=str).encode()).hexdigest()


def _used(data: StageData) -> set[int]:
    """Return the indices of the records that a step trains on."""
    return {index for step in data.plan.steps for index in conversations(step)}


def _compute(trainer: PackedTrainer, data: StageData) -> Reference:
    """Compute the log-probabilities of all answers that training and validation use, in evaluation mode."""
    phase("Computing the reference of each pair")
    train, held_out = trainer.train_dataset.with_rows(_used_rows(data)), trainer.eval_dataset
    trainer.model.eval()
    with forked_rng(trainer.device), torch.no_grad(), autocast(trainer.device, trainer.dtype):
        reference = {
            _TRAIN: _log_probs(trainer, train),
            _VALIDATION: torch.zeros(0, 2, dtype=torch.float64) if held_out is None else _log_probs(trainer, held_out),
        }
    trainer.model.train()
    return reference


def _used_rows(data: StageData) -> list[Row]:
    """Put every record that a step trains on in one row; rows are as long as those of the training."""
    items, used = data.encoded.items, sorted(_used(data))
    rows = [row for step in data.plan.steps for row in step]
    tokens = max(sum(items[index].length for index in conversations([row])) for row in rows)
    return plan_in_order([items[index] for index in used], tokens_per_row=tokens, indices=used)


def _log_probs(trainer: PackedTrainer, rows: PackedRows) -> torch.Tensor:
    """Compute the log-probabilities (N, 2), in fp64, of the answers of all records; NaN for those that are in no row.

    The rows are divided among the processes.
    """
    own = own_indices(len(rows))
    computed: dict[int, torch.Tensor] = {}
    with counting("reference", len(own)) as advance:
        for index, batch in zip(own, trainer.rows_loader(rows, own), strict=True):
            log_probs = answer_log_probs(trainer.model, to_device(batch, trainer.device)).cpu()
            computed |= zip(conversations([rows.rows[index]]), log_probs, strict=True)
            advance(1)
    values = torch.full((len(rows.records), 2), math.nan, dtype=torch.float64)
    for part in gathered(computed):
        for pair, log_probs in part.items():
            values[pair] = log_probs
    return values


def _check_finite(reference: torch.Tensor, data: StageData) -> None:
    """Raise TrainingError with the records whose log-probability is NaN or infinite."""
    records = data.encoded.records
    bad = [records[index].where for index in sorted(_used(data)) if not reference[index].isfinite().all()]
    if bad:
        raise TrainingError(
            f"stage prefer: the model that the stage starts from has log-probabilities that are not finite for "
            f"{counted(len(bad), 'pair')}: {listed(bad, separator='; ')}. Repair these records, or exclude them "
            "(data.exclude); if it is every pair, replace the base or start_from"
        )


def _stored(directory: Path, identity: str, data: StageData) -> Reference | None:
    """Read the reference of the run; None if there is none with this identity."""
    path = current(directory) / output.REFERENCE
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get(_OF) != identity:
                return None
            reference = {name: file.get_tensor(name) for name in (_TRAIN, _VALIDATION)}
    except (OSError, SafetensorError):
        return None
    shapes = {_TRAIN: (len(data.encoded), 2), _VALIDATION: (len(data.validation), 2)}
    fits = all(reference[name].shape == shape for name, shape in shapes.items())
    return reference if fits else None


def _store(directory: Path, identity: str, reference: Reference) -> None:
    """Write the reference of the run."""
    with output.writing(directory, output.REFERENCE) as path:
        save_file(reference, path, metadata={_OF: identity})


def _sha256(reference: Reference) -> str:
    digest = hashlib.sha256()
    for name in (_TRAIN, _VALIDATION):
        digest.update(reference[name].numpy().tobytes())
    return digest.hexdigest()
