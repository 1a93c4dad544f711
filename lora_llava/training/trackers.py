"""Trackers (wandb, mlflow, ...): each stage is a separate run, named after the recipe, with the recipe's settings."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from lora_llava.recipe.fields import is_local, settings_of, value_at
from lora_llava.recipe.settings import Recipe
from lora_llava.recipe.stages import STAGES, StageName

_PROJECT_VARIABLES = {
    "wandb": "WANDB_PROJECT",
    "mlflow": "MLFLOW_EXPERIMENT_NAME",
    "comet_ml": "COMET_PROJECT_NAME",
    "swanlab": "SWANLAB_PROJECT",
    "clearml": "CLEARML_PROJECT",
}
"""Variables from which transformers reads a tracker's project; a value that the user has set wins."""
_STAY_OPEN = ("wandb", "swanlab")
"""Trackers whose run transformers leaves open; the next stage would write into it."""
_SOURCE_LOSS = re.compile(r"^(loss|eval_loss)/")
_BATCH = 100
"""Maximum number of parameters in one call to mlflow."""


def run_name(recipe: Recipe, stage: StageName) -> str:
    """Return the name of a stage's run in a tracker."""
    return f"{recipe.name}-{stage}"


def tracked_settings(recipe: Recipe, stage: StageName) -> dict[str, Any]:
    """Return the settings of a stage by key; local paths are cut to their last part."""
    left_out = ("card.", "evaluation.", *(f"stages.{other}." for other in STAGES if other != stage))
    settings = {}
    for setting in settings_of(Recipe):
        value = value_at(recipe, setting.key)
        if value is None or setting.key.startswith(left_out):
            continue
        if setting.may_be_path:
            value = (
                [_without_directory(path) for path in value] if isinstance(value, list) else _without_directory(value)
            )
        settings[f"recipe/{setting.key}"] = value
    return settings


def _without_directory(value: Any) -> Any:
    return Path(str(value)).name if is_local(str(value)) else value


def tracker_callbacks(recipe: Recipe, stage: StageName, args: TrainingArguments) -> list[TrainerCallback]:
    """Create the callbacks that report a stage to the trackers of `report_to`."""
    if recipe.report_to == "none":
        return []
    # First, since the others read the environment when they are created; but the last to be told of what happens.
    run = _TrackedRun(recipe, stage)
    return [*(_renaming(kind()) for kind in get_reporting_integration_callbacks(args.report_to)), run]


def _renaming(callback: Any) -> Any:
    """Return a tracker's callback that gets log lines with the names of `tracked_figures`."""
    on_log = callback.on_log

    def on_renamed_log(*args: Any, logs: Mapping[str, Any], **options: Any) -> None:
        on_log(*args, logs=tracked_figures(logs), **options)

    callback.on_log = on_renamed_log
    return callback


def tracked_figures(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a log line with losses by source as `loss_by_source/NAME`.

    MLflow keeps `loss` as a file and `loss/NAME` in a directory of that name, which cannot both exist.
    """
    return {_SOURCE_LOSS.sub(r"\1_by_source/", key): value for key, value in row.items()}


class _TrackedRun(TrainerCallback):  # type: ignore[misc]
    """Names the project of a stage's run, adds the recipe to its configuration, and ends the run with the stage.

    Create it before the trackers' callbacks, which read the environment when they are created.
    """

    def __init__(self, recipe: Recipe, stage: StageName) -> None:
        self.settings = tracked_settings(recipe, stage)
        self.trackers = [] if recipe.report_to == "none" else list(recipe.report_to)
        variables = {
            variable: recipe.name
            for tracker, variable in _PROJECT_VARIABLES.items()
            if tracker in self.trackers or "all" in self.trackers
        }
        if {"tensorboard", "all"} & set(self.trackers):
            place = recipe.resolved_output_dir / "tensorboard" / run_name(recipe, stage)
            variables["TENSORBOARD_LOGGING_DIR"] = str(place / time.strftime("%Y-%m-%d_%H-%M-%S"))
        self.variables = {name: value for name, value in variables.items() if name not in os.environ}
        os.environ.update(self.variables)
        self.not_ours = {name for name in _STAY_OPEN if _open_run(name) is not None}
        """Trackers with a run that was open before; whoever opened it ends it."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the recipe's settings to those of the training, which the trackers' callbacks have sent by now."""
        for name in ("wandb", "trackio", "swanlab"):
            config = getattr(sys.modules.get(name), "config", None) if name in self.trackers else None
            if config is not None:
                options = {} if name == "swanlab" else {"allow_val_change": True}
                config.update(self.settings, **options)
        if "mlflow" in self.trackers and (mlflow := sys.modules.get("mlflow")) is not None and mlflow.active_run():
            values = [(key.replace("/", "."), str(value)[:250]) for key, value in self.settings.items()]
            for start in range(0, len(values), _BATCH):
                mlflow.log_params(dict(values[start : start + _BATCH]))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the stage's run."""
        for name in _STAY_OPEN:
            if name not in self.not_ours and _open_run(name) is not None:
                sys.modules[name].finish()
        for name in self.variables:
            os.environ.pop(name, None)


def _open_run(tracker: str) -> Any:
    """Return the open run of a tracker; None if there is none, or the tracker is not imported."""
    module = sys.modules.get(tracker)
    if module is None:
        return None
    return module.get_run() if tracker == "swanlab" else module.run
