"""A run that is not what it was does not go on unseen: every difference is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lora_llava.cli import cli
from lora_llava.errors import TrainingError
from lora_llava.recipe.file import load_recipe
from lora_llava.recipe.schedule import rate_factor
from lora_llava.training import prepare
from lora_llava.training.checkpoints import differences
from tests.helpers.resuming import (
    log_of,
    train,
)
from tests.helpers.tiny import save_tiny_base


@pytest.mark.fault("checkpoints: a resume with other settings, or on another base")
@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["stages.instruct.batch_size=8"], r"stages\.instruct\.batch_size: 9 then, 8 now"),
        (["stages.instruct.packing=none"], r"stages\.instruct\.packing: tree then, none now"),
        (["seed=7"], r"stage align has changed since .*\n  seed: 42 then, 7 now"),
        (["stages.instruct.learning_rate=1e-4"], r"stages\.instruct\.learning_rate: 0\.005 then, 0\.0001 now"),
        (
            ["stages.instruct.template=chatml", "stages.instruct.tokens_per_micro_batch=300"],
            r"template: vicuna_v1 then, chatml now\n(.*\n)*.*tokens_per_micro_batch: 400 then, 300 now",
        ),
    ],
)
def test_other_settings_are_refused_by_name(project: Path, halted: Path, overrides: list[str], named: str) -> None:
    before = (halted / "recipe.yaml").read_bytes()
    with pytest.raises(TrainingError, match=named) as error:
        train(project, halted, *overrides, resume="exact")
    assert "--resume-anyway, which gives up" in str(error.value)
    assert (halted / "recipe.yaml").read_bytes() == before


@pytest.mark.fault("records: changed between a run and its resume")
def test_other_data_are_refused(project: Path, broken_off: Path, tmp_path: Path) -> None:
    data = project.parent / "train.json"
    records = json.loads(data.read_text(encoding="utf-8"))
    records[5]["conversations"][1]["value"] += " indeed"
    (tmp_path / "other.json").write_text(json.dumps(records), encoding="utf-8")
    moved = [f"stages.instruct.data.path={tmp_path / 'same.json'}"]
    shutil.copy(data, tmp_path / "same.json")
    with pytest.raises(
        TrainingError, match=r"stages\.instruct\.data.* \(sha256 of the records\): \w{64} then, \w{64} "
    ):
        train(project, broken_off, f"stages.instruct.data.path={tmp_path / 'other.json'}", resume="exact")
    # The same data elsewhere are the same data.
    train(project, broken_off, *moved, resume="exact")


@pytest.mark.fault("checkpoints: a resume with other settings, or on another base")
def test_another_base_is_refused(project: Path, halted: Path, tmp_path: Path) -> None:
    other = save_tiny_base(tmp_path / "other", seed=1)
    with pytest.raises(TrainingError, match=r"align was trained from .*base's weights changed.*Put the old"):
        train(project, halted, f"base.model_name_or_path={other}", resume="anyway")


@pytest.mark.fault("checkpoints: a resume with other settings, or on another base")
def test_another_number_of_processes_is_said(project: Path, broken_off: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(differences, "world_size", lambda: 2)
    _, shown = train(project, broken_off, resume="exact")
    words = "1 process then, 2 now: the steps hold the same conversations, and their sums round differently"
    assert f"instruct: {words}" in shown
    assert "resumes exactly" not in shown


def test_versions_of_libraries_are_among_what_must_not_change(
    project: Path, halted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = differences.library_versions()
    monkeypatch.setattr(differences, "library_versions", lambda: {**found, "torch": "1.0"})
    with pytest.raises(TrainingError, match=r"version of torch: .* then, 1\.0 now\n.*bit-identical"):
        train(project, halted, resume="exact")


@pytest.mark.fault("checkpoints: a resume with other settings, or on another base")
def test_resume_anyway_says_what_is_given_up(project: Path, broken_off: Path) -> None:
    rate, batch = "stages.instruct.learning_rate=0.001", "stages.instruct.batch_size=10"
    _, shown = train(project, broken_off, rate, batch, resume="anyway")
    assert "learning_rate: 0.005 then, 0.001 now" in shown
    assert "one learning_rate for the whole stage: it applies from here on" in shown
    assert "training continues at the same step of a new plan" in shown
    rows = [row for row in log_of(broken_off) if row["stage"] == "instruct" and "learning_rate" in row]
    rates = {row["step"]: row["learning_rate"] for row in rows}
    # Eight steps now. The log's rate is the one before the scheduler moves on: of the eighth step, by the new cosine.
    assert max(rates) == 8
    assert rates[8] == pytest.approx(0.001 * rate_factor("cosine", 8, 8, 1), rel=1e-9)
    assert rates[6] > 0.001


def test_more_steps_than_the_plan_has_now(project: Path, halted: Path) -> None:
    with pytest.raises(TrainingError, match="has 5 steps now, and 6 were trained already"):
        train(project, halted, "stages.instruct.max_steps=5", resume="anyway")


def test_nothing_to_resume(project: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="there is nothing to resume in output_dir"):
        train(project, tmp_path / "run", resume="exact")


def test_resume_and_overwrite_exclude_each_other(project: Path) -> None:
    for option in ("--resume", "--resume-anyway"):
        done = CliRunner().invoke(cli, ["finetune", str(project), option, "--overwrite"])
        assert done.exit_code == 2
        assert "give only one of them" in done.output


def test_a_run_in_the_way_is_refused_with_the_way_on(project: Path, halted: Path) -> None:
    with pytest.raises(TrainingError, match=r"holds a run already .*--resume continues it"):
        train(project, halted)


def test_an_assembled_base_is_kept_and_verified(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def assemble(settings: Any, directory: Path, seed: int) -> None:
        made.append(directory)
        shutil.copytree(recipe_base(project), directory, dirs_exist_ok=True)

    monkeypatch.setattr(prepare, "assemble", assemble)
    parts = "base={language_model: ./lm, vision_tower: ./tower}"
    summary: dict[str, Any] = {}
    loaded = load_recipe(project, [parts, f"output_dir={tmp_path / 'run'}"])
    directory, identity = prepare.prepare_base(loaded, tmp_path / "run", summary)
    assert prepare.prepare_base(loaded, tmp_path / "run", summary) == (directory, identity)
    [staging] = made
    assert staging.name == "base" and staging.parent.parent == tmp_path / "run"
    assert not staging.exists()
    assert summary == {"base_sha256": identity.weights_sha256}
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(TrainingError, match=r"base was altered: its weights are \w{64}, the run's are \w{64}"):
        prepare.prepare_base(loaded, tmp_path / "run", summary)


def recipe_base(project: Path) -> Path:
    path = load_recipe(project).base.model_name_or_path
    assert path is not None
    return Path(path)
