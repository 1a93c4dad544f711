"""Sets of every size with the defaults: what is said, and that weights move; what cannot learn is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

import lora_llava.training.run as run_module
from lora_llava.cli import cli
from lora_llava.errors import RecipeError, TrainingError
from lora_llava.formats.names import WEIGHTS
from lora_llava.recipe.file import load_recipe
from tests.helpers.runs import COLORS, watched_run, write_data, write_recipe

STEPS = {1: 1, 2: 2, 5: 5, 10: 10, 50: 50, 200: 50}
WARMUP = {1: "none", 2: "1", 5: "1", 10: "1", 50: "2", 200: "2"}


def write_set(directory: Path, base: Path, count: int, **stage: Any) -> Path:
    """Write `count` different records and a recipe with nothing but its data; return the recipe's path."""
    write_data(directory)
    records = []
    for number in range(count):
        name = list(COLORS)[number % 4]
        turns = [{"from": "human", "value": f"<image>\nWhat is {number}?"}, {"from": "gpt", "value": f"{name} thing"}]
        records.append({"id": str(number), "image": f"{number % 12}.png", "conversations": turns})
    (directory / "train.json").write_text(json.dumps(records), encoding="utf-8")
    data = {"path": "train.json", "image_root": "images"}
    recipe = {
        "version": 1,
        "name": "defaults",
        "output_dir": "run",
        "base": {"model_name_or_path": str(base)},
        "stages": {"instruct": {"data": data, **stage}},
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def moved(run: Any) -> set[str]:
    """Kinds of the trained tensors that changed: lora_B, and the projector's weights."""
    changed = {name for name in run.stages["instruct"].changed if "original_module" not in name}
    return {
        "lora_B" if "lora_B" in name else "projector" if "multi_modal_projector" in name else "" for name in changed
    }


@pytest.mark.parametrize("count", STEPS)
def test_k5_any_number_of_records_learns_with_defaults(tiny_base: Path, tmp_path: Path, count: int) -> None:
    path = write_set(tmp_path, tiny_base, count)
    steps = f"{STEPS[count]} optimizer step{'' if count == 1 else 's'}, {WARMUP[count]} of them warmup"
    dry = CliRunner().invoke(cli, ["finetune", str(path), "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert steps in dry.output
    assert f"batch_size: {4 if count == 200 else 1} (auto: {count} record" in dry.output
    run = watched_run(path)
    for text in (steps, f"batch_size: {4 if count == 200 else 1} (auto: {count} record"):
        assert text in run.text
    assert (
        ("can change the model only a little" in run.text)
        == ("can change the model only a little" in dry.output)
        == (count < 20)
    )
    assert moved(run) >= {"lora_B", "projector"}
    rows = [row for row in run.log if "loss" in row]
    assert rows[-1]["step"] == STEPS[count]
    assert len(rows) >= min(10, STEPS[count])
    assert all(row["learning_rate"] > 0 for row in rows)


def test_k5_llavas_batch_on_few_records_learns_and_a_longer_stage_is_proposed(tiny_base: Path, tmp_path: Path) -> None:
    path = write_set(tmp_path, tiny_base, 48, batch_size=128, logging_steps=10)
    proposal = (
        "1 optimizer step can change the model only a little; with stages.instruct.batch_size=2 "
        "stages.instruct.num_train_epochs=3: 72 steps"
    )
    check = CliRunner().invoke(cli, ["check", str(path), "--output", str(tmp_path / "report")])
    dry = CliRunner().invoke(cli, ["finetune", str(path), "--dry-run"])
    run = watched_run(path)
    for text in (check.output, dry.output, run.text):
        assert "1 optimizer step, none of them warmup" in text
        assert proposal in text
    assert moved(run) >= {"lora_B", "projector"}
    assert [row["step"] for row in run.log if "loss" in row] == [1]
    assert run.summary["instruct"]["batch_size"] == 128


def test_k5_weights_that_did_not_change_are_an_error(tiny_base: Path, tmp_path: Path) -> None:
    path = write_set(tmp_path, tiny_base, 10)
    # Adam's epsilon makes nothing of such gradients.
    tiny = ["stages.instruct.max_grad_norm=1.0e-30", "stages.instruct.weight_decay=0"]
    with pytest.raises(TrainingError, match=r"nothing was learned: not one weight of .* changed in 10 steps"):
        watched_run(path, *tiny)
    assert not (tmp_path / "run" / "instruct" / WEIGHTS).exists()
    # Nor after going on from the checkpoint of the last step.
    with pytest.raises(TrainingError, match="nothing was learned"):
        run_module.run_recipe(load_recipe(path, tiny), run_module.Console(quiet=True), resume="exact")


def test_k5_a_rate_that_moves_nothing_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    path = write_set(tmp_path, tiny_base, 5)
    with pytest.raises(RecipeError, match="learning_rate 1e-12 is too small to change fp32 weights"):
        load_recipe(path, ["stages.instruct.learning_rate=1.0e-12"])
    assert load_recipe(path, ["stages.instruct.learning_rate=1.0e-9"])


def test_k5_a_part_that_did_not_change_is_named(tiny_base: Path, tmp_path: Path) -> None:
    path = write_set(tmp_path, tiny_base, 10)
    records = json.loads((tmp_path / "train.json").read_text(encoding="utf-8"))
    for record in records:
        del record["image"]
        record["conversations"][0]["value"] = "What is it?"
    (tmp_path / "texts.json").write_text(json.dumps(records), encoding="utf-8")
    run = watched_run(path, f"stages.instruct.data.path={tmp_path / 'texts.json'}")
    assert "not one weight of projector changed in 10 steps: no record has an image, its gradient was 0" in run.text
    assert moved(run) == {"lora_B", ""}


def test_k5_the_chosen_batch_is_compared_on_resume(tiny_base: Path, tmp_path: Path) -> None:
    write_data(tmp_path)
    path = write_recipe(tmp_path, {"model_name_or_path": str(tiny_base)}, ["instruct"])
    auto = ["stages.instruct.batch_size=auto", "stages.instruct.max_steps=4", "stages.instruct.eval_steps=null"]
    summary = watched_run(path, *auto).summary
    assert summary["instruct"]["batch_size"] == 1
    again = run_module.run_recipe
    console = run_module.Console(quiet=True)
    same = ["stages.instruct.batch_size=1", *auto[1:]]
    assert again(load_recipe(path, same), console, resume="exact")["instruct"] == summary["instruct"]
    other = ["stages.instruct.batch_size=2", *auto[1:]]
    with pytest.raises(TrainingError, match=r"stages\.instruct\.batch_size: auto then, 2 now"):
        again(load_recipe(path, other), console, resume="exact")
    # Without the artifact it resumes from a checkpoint, which knows what `auto` came to.
    for file in (tmp_path / "run" / "instruct").iterdir():
        file.unlink()
    (tmp_path / "run" / "instruct").rmdir()
    with pytest.raises(TrainingError, match=r"stages\.instruct\.batch_size: 1 then, 2 now"):
        again(load_recipe(path, other), console, resume="exact")
    assert again(load_recipe(path, same), console, resume="exact")["instruct"]["batch_size"] == 1


def test_k40_identical_records_are_said(tiny_base: Path, tmp_path: Path) -> None:
    path = write_set(tmp_path, tiny_base, 10)
    records = json.loads((tmp_path / "train.json").read_text(encoding="utf-8"))
    again = [{**record, "id": f"again {record['id']}"} for record in records[:3]]
    (tmp_path / "train.json").write_text(json.dumps(records + again), encoding="utf-8")
    dry = CliRunner().invoke(cli, ["finetune", str(path), "--dry-run"])
    assert "3 of 13 records repeat another: same image, same text" in dry.output
    (tmp_path / "train.json").write_text(json.dumps(records), encoding="utf-8")
    assert "repeat another" not in CliRunner().invoke(cli, ["finetune", str(path), "--dry-run"]).output
