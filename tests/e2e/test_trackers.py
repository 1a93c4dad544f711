"""Trackers: each stage is a run with its own name, steps and settings; wandb and mlflow are stand-ins."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import transformers.integrations.integration_utils as integrations

from tests.helpers.resuming import stopped_run, train

WANDB = """
__version__ = "0.99.0"
run, runs = None, []

class Config(dict):
    def update(self, values, allow_val_change=False):
        dict.update(self, values)

class Run:
    def __init__(self, project, name):
        self.project, self.name, self.id = project, name, "1"
        self.config, self.summary, self.steps, self.rows, self.finished = Config(), {}, [], [], False
    def _label(self, **_):
        pass

def init(project=None, name=None, **_):
    global run, config
    run = Run(project, name)
    config = run.config
    runs.append(run)

def log(row):
    assert run is not None, "no run is open"
    run.steps.append(row["train/global_step"])
    run.rows.append(row)

def define_metric(*_, **__):
    pass

def finish():
    global run
    run.finished, run = True, None
"""
MLFLOW = """
__version__ = "9.0.0"
from types import SimpleNamespace
import mlflow.utils.validation
run, runs, experiment = None, [], None

def is_tracking_uri_set():
    return True
def get_tracking_uri():
    return "file"
def set_experiment(name):
    global experiment
    experiment = name
def active_run():
    return run
def start_run(run_name=None, nested=False):
    global run
    run = SimpleNamespace(name=run_name, experiment=experiment, params={}, steps=[], info=SimpleNamespace(run_id="1"))
    runs.append(run)
def log_params(params, **_):
    for key, value in params.items():
        assert key not in run.params, key
        run.params[key] = value
def log_metrics(metrics, step, **_):
    run.steps.append(step)
def end_run(*_):
    global run
    run = None
"""


@pytest.fixture
def trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Packages that take the place of wandb and mlflow; returns where they are."""
    packages = tmp_path / "packages"
    for name, text in {
        "wandb/__init__.py": WANDB,
        "wandb/sdk/__init__.py": "",
        "wandb/sdk/lib/__init__.py": "",
        "wandb/sdk/lib/config_util.py": "class ConfigError(Exception):\n    pass\n",
        "mlflow/__init__.py": MLFLOW,
        "mlflow/utils/__init__.py": "",
        "mlflow/utils/validation.py": "MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH = 6000, 100\n",
    }.items():
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(packages)
    for name in ("is_wandb_available", "is_mlflow_available"):
        monkeypatch.setattr(integrations, name, lambda: True)
    for name in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "WANDB_LOG_MODEL", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    yield packages
    for name in [one for one in sys.modules if one.partition(".")[0] in ("wandb", "mlflow")]:
        del sys.modules[name]


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_k66_wandb_has_a_run_for_each_stage(project: Path, trackers: Path, tmp_path: Path) -> None:
    train(project, tmp_path / "run", "report_to=wandb")
    wandb = module("wandb")
    assert [(run.project, run.name, run.finished) for run in wandb.runs] == [
        ("tiny", "tiny-align", True),
        ("tiny", "tiny-instruct", True),
    ]
    for run, (epochs, rate, steps) in zip(wandb.runs, ((3.0, 0.01, 9), (2.0, 0.005, 10)), strict=True):
        assert run.steps == sorted(run.steps)
        assert run.steps[-1] == steps
        assert run.config["num_train_epochs"] == epochs
        assert run.config["learning_rate"] == rate
        assert run.config["recipe/adapter.r"] == 4
        assert str(tmp_path) not in str({key: run.config[key] for key in run.config if key.startswith("recipe/")})
        assert run.summary["train_loss"] > 0
    stages = [{key.split(".")[1] for key in run.config if key.startswith("recipe/stages.")} for run in wandb.runs]
    assert stages == [{"align"}, {"instruct"}]
    # The validation at the end is in the run, too.
    assert any("eval/loss" in row and row["train/global_step"] == 10 for row in wandb.runs[1].rows)


def test_k66_a_project_of_the_users_own_holds(
    project: Path, trackers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    train(project, tmp_path / "run", "report_to=[wandb]", "stages.instruct=null")
    assert [(run.project, run.name) for run in module("wandb").runs] == [("mine", "tiny-align")]


def test_k66_a_resumed_run_has_the_train_loss_of_all_its_steps(project: Path, trackers: Path, tmp_path: Path) -> None:
    train(project, tmp_path / "whole", "report_to=wandb", "stages.instruct=null")
    whole = module("wandb").runs[-1].summary["train_loss"]
    directory = stopped_run(project, tmp_path / "run", "align", 8)
    train(project, directory, "report_to=wandb", resume="exact")
    resumed = next(run for run in module("wandb").runs[1:] if run.name == "tiny-align")
    assert resumed.summary["train_loss"] == pytest.approx(whole, rel=1e-6)


def test_k66_mlflow_names_its_runs(project: Path, trackers: Path, tmp_path: Path) -> None:
    train(project, tmp_path / "run", "report_to=[mlflow]")
    runs = module("mlflow").runs
    assert [(run.experiment, run.name) for run in runs] == [("tiny", "tiny-align"), ("tiny", "tiny-instruct")]
    assert [run.params["num_train_epochs"] for run in runs] == [3.0, 2.0]
    assert runs[1].params["recipe.stages.instruct.batch_size"] == "9"
    assert [run.steps[-1] for run in runs] == [9, 10]
