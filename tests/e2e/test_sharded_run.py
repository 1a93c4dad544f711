"""Runs of two processes whose frozen weights are in two parts: everything they leave is equal to the bit."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lora_llava.formats.names import WEIGHTS
from lora_llava.recipe.file import load_recipe
from lora_llava.system.ranks import planned_for
from lora_llava.training.parallel.sharding import sharding_line
from lora_llava.training.stage import Stage
from tests.helpers.processes import run_together
from tests.helpers.resuming import log_of, outcome, write_project
from tests.helpers.sharded_runs import main


@pytest.fixture(scope="module")
def runs(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The directory of the runs, and how much of the weights each process held."""
    project = tmp_path_factory.mktemp("sharded")
    write_project(project, tiny_base)
    ended = run_together(project / "output", partial(main, project), 2, timeout=400)
    assert [one.code for one in ended] == [0, 0], ended
    return project, [json.loads(one.out.splitlines()[-1]) for one in ended]


Runs = tuple[Path, list[dict[str, Any]]]


def without_samples(found: dict[str, Any]) -> dict[str, Any]:
    log = [{key: value for key, value in row.items() if key != "samples"} for row in found["log"]]
    return found | {"log": log}


def test_losses_norms_weights_and_states_are_those_of_whole_models(runs: Runs) -> None:
    directory, held = runs
    parts = outcome(directory / "parts")
    assert parts == without_samples(outcome(directory / "whole"))
    assert any("eval_loss_blind" in row for row in parts["log"])
    for first, second in zip(held[0]["parts"], held[1]["parts"], strict=True):
        assert 0 < second <= first
    assert [sum(pair) for pair in zip(held[0]["parts"], held[1]["parts"], strict=True)] == held[0]["whole"]


@pytest.mark.fault("checkpoints: a resumed run that differs from an uninterrupted one")
def test_a_sharded_run_that_was_stopped_goes_on_with_whole_models(runs: Runs) -> None:
    directory, _ = runs
    assert without_samples(outcome(directory / "stopped")) == outcome(directory / "parts")


@pytest.mark.fault("training: a loss of NaN or infinity")
def test_the_guard_names_and_skips_records_of_either_process(runs: Runs) -> None:
    directory, _ = runs
    log = log_of(directory / "skipped")
    warnings = [row["warning"] for row in log if "left out" in row.get("warning", "")]
    assert warnings
    # The image has four questions, of which a step has some.
    named = r"Not finite by themselves are \d of \d records?: train\.json, record \d+ \(id q5-\d\)"
    assert all(re.search(named, text) for text in warnings), warnings
    assert (directory / "skipped" / "instruct" / WEIGHTS).is_file()


def test_a_run_says_what_sharding_means_for_it(runs: Runs) -> None:
    directory, _ = runs

    def line(processes: int, *overrides: str) -> str | None:
        recipe = load_recipe(directory / "tiny.yaml", overrides)
        stage: Any = Stage(recipe, "instruct", directory, None)  # type: ignore[arg-type]
        with planned_for(processes):
            return sharding_line(stage)

    assert line(2) is None
    assert line(1, "distributed.shard=true") == (
        "distributed.shard: no effect in a single process; start several with --gpus"
    )
    assert "no sample answers" in (line(2, "distributed.shard=true") or "")
