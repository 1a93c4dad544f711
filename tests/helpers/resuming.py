"""Runs that are stopped and go on, and what two of them must have in common to the bit."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import lora_llava.training.run as run_module
from lora_llava.formats.names import WEIGHTS
from lora_llava.recipe.file import load_recipe
from lora_llava.run_directory import output
from lora_llava.system.files import file_sha256
from lora_llava.training.checkpoints import saver as resumable
from lora_llava.training.checkpoints.differences import Resume
from lora_llava.training.run import run_recipe
from lora_llava.training.trainer import PackedTrainer
from tests.helpers.runs import write_data, write_recipe

TIMES = ("seconds", "questions_per_second", "supervised_tokens_per_second")
"""Fields of the log that no run repeats."""
STATE = ("optimizer.json", "optimizer.safetensors", "scheduler.json", "random.json", "random.safetensors")
STAGES = ("align", "instruct")
AtStep = Callable[[PackedTrainer], None]

SETTINGS = (
    # Dropout draws random numbers in every step; lines of the log, checkpoints and validations meet at few steps.
    "adapter.lora_dropout=0.1", "stages.align.logging_steps=2", "stages.instruct.logging_steps=2",
    "stages.align.num_train_epochs=3", "stages.instruct.num_train_epochs=2", "stages.instruct.eval_steps=4",
    "stages.align.save_steps=3", "stages.instruct.save_steps=3",
)  # fmt: skip
"""9 steps in `align`, 10 in `instruct`."""


class Stopped(BaseException):
    """Ends a run at once, as no handler expects."""


def write_project(directory: Path, base: Path) -> Path:
    """Write data and a recipe of both stages; return the recipe's path."""
    write_data(directory)
    return write_recipe(directory, {"model_name_or_path": str(base)})


def train(
    recipe: Path,
    directory: Path,
    *overrides: str,
    resume: Resume = "no",
    best_share: float = math.inf,
    settings: Sequence[str] = SETTINGS,
) -> tuple[dict[str, Any], str]:
    """Run, or continue; return the summary and what was shown.

    `best_share`: share of the time that saving the best may take; of so short a run it takes most.
    """
    shown = io.StringIO()
    loaded = load_recipe(recipe, (*settings, f"output_dir={directory}", *overrides))
    with pytest.MonkeyPatch.context() as patch:
        # The picture takes as long as the training.
        patch.setattr(run_module, "plot_loss", lambda *_: None)
        patch.setattr(resumable, "MAX_BEST_SHARE", best_share)
        summary = run_recipe(loaded, Console(file=shown, width=200), resume=resume)
    return summary, shown.getvalue()


def at_step(patch: pytest.MonkeyPatch, stage: str, step: int, act: AtStep) -> None:
    """Have `act` done once while optimizer step `step` of `stage` is computed."""
    original = PackedTrainer.training_step
    acts = [act]

    def training_step(self: PackedTrainer, *args: Any, **options: Any) -> Any:
        if self.args.output_dir.endswith(stage) and self.state.global_step == step - 1 and acts:
            acts.pop()(self)
        return original(self, *args, **options)

    patch.setattr(PackedTrainer, "training_step", training_step)


def stop(_: PackedTrainer) -> None:
    """End the run where it stands."""
    raise Stopped


def stopped_run(recipe: Path, directory: Path, stage: str, step: int, settings: Sequence[str] = SETTINGS) -> Path:
    """Run until a step of a stage is computed, and return the run's directory."""
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, stage, step, stop)
        with pytest.raises(Stopped):
            train(recipe, directory, settings=settings)
    return directory


def log_of(directory: Path) -> list[dict[str, Any]]:
    """Read the log without its times."""
    return [{key: row[key] for key in row if key not in TIMES} for row in output.read_log(directory)]


def outcome(directory: Path) -> dict[str, Any]:
    """Collect what a run must leave to the bit: weights, the state at each stage's last step, and the log."""
    found: dict[str, Any] = {"log": log_of(directory)}
    for stage in STAGES:
        found[stage] = file_sha256(directory / stage / WEIGHTS)
        checkpoints = (directory / "checkpoints" / stage).glob("step-*")
        last = max(checkpoints, key=lambda one: int(one.name.removeprefix("step-")))
        found[f"{stage}, last"] = last.name
        found |= {f"{stage}, {name}": file_sha256(last / name) for name in STATE}
        state = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))
        found[f"{stage}, trainer"] = state["global_step"], state["epoch"], state["total_flos"]
    return found
