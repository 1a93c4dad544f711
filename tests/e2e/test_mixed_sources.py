"""Runs over two sources, with system prompts of records: losses by source, resumed runs, and the same run again."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from lora_llava.artifact import read_manifest
from lora_llava.data.load import load_split
from lora_llava.recipe.file import load_recipe
from lora_llava.training.run import run_recipe
from tests.helpers.resuming import log_of, stopped_run, train
from tests.helpers.runs import write_data, write_recipe

SETTINGS = ("stages.instruct.max_steps=20", "stages.instruct.logging_steps=2", "stages.instruct.save_steps=3")


def write_mix(directory: Path, base: Path, **settings: Any) -> Path:
    """Write a recipe over two sources, which have the same images under unlike system prompts: no tree holds both."""
    write_data(directory)
    records = json.loads((directory / "train.json").read_text())
    held = [record for record in records if record["image"] == records[-1]["image"]]
    rest = [record for record in records if record["image"] != records[-1]["image"]]
    for name, system in (("own", {}), ("brief", {"system": "Be brief."})):
        for part, chosen in ((name, rest), (f"held_{name}", held)):
            (directory / f"{part}.json").write_text(json.dumps([{**record, **system} for record in chosen]))
    path = write_recipe(directory, {"model_name_or_path": str(base)}, ["instruct"])
    recipe = yaml.safe_load(path.read_text())
    own = {"path": "own.json", "image_root": "images", "validation": {"path": "held_own.json"}}
    brief = {"path": "brief.json", "image_root": "images", "validation": {"path": "held_brief.json"}, "share": 0.5}
    asked = [{"path": f"held_{name}.json", "image_root": "images"} for name in ("own", "brief")]
    recipe["evaluation"] = {"data": [asked[0], {**asked[1], "source": "short answers"}], "max_new_tokens": 3}
    recipe["stages"]["instruct"] |= {"data": [own, brief], "num_sample_answers": 0, **settings}
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_a_run_mixes_two_sources_and_tells_their_losses_apart(tmp_path: Path, tiny_base: Path) -> None:
    shown = io.StringIO()
    run_recipe(load_recipe(write_mix(tmp_path, tiny_base, max_steps=2)), Console(file=shown, width=120))
    lines = [json.loads(line) for line in (tmp_path / "run" / "train_log.jsonl").read_text().splitlines()]
    validation = [line for line in lines if "eval_loss" in line][-1]
    losses = [validation["eval_loss/own.json"], validation["eval_loss/brief.json"]]
    assert min(losses) < validation["eval_loss"] < max(losses)
    trained = [line for line in lines if "loss" in line]
    assert len(trained) == 2
    for line in trained:
        losses = [line["loss/own.json"], line["loss/brief.json"]]
        assert min(losses) < line["loss"] < max(losses)

    check_answers_by_source(tmp_path / "run" / "evaluation", shown.getvalue())
    again = load_recipe(tmp_path / "run" / "recipe.yaml", [f"output_dir={tmp_path / 'again'}"])
    assert len(again.stage("instruct").data.sources) == 2
    run_recipe(again, Console(quiet=True))
    first, second = (read_manifest(tmp_path / name / "instruct").adapter_sha256 for name in ("run", "again"))
    assert first == second


def check_answers_by_source(directory: Path, shown: str) -> None:
    """The figures of the sources add up to those of all questions, and each answer names its source."""
    figures = json.loads((directory / "accuracy.json").read_text(encoding="utf-8"))
    names = {"held_own.json", "short answers"}
    assert figures["by_source"].keys() == names
    for model in ("base", "tuned"):
        for key in ("correct", "questions"):
            assert sum(figures["by_source"][name][model][key] for name in names) == figures[model][key]
    rows = [json.loads(line) for line in (directory / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = {name: [row for row in rows if row["source"] == name] for name in names}
    assert {len(of_source) for of_source in asked.values()} == {len(rows) / 2}
    for name, of_source in asked.items():
        assert sum(row["tuned"]["correct"] for row in of_source) == figures["by_source"][name]["tuned"]["correct"]
    assert "by source (95 % interval)" in shown
    assert "short answers" in shown


@pytest.mark.fault("checkpoints: a resumed run that differs from an uninterrupted one")
def test_k31_losses_by_source_of_a_resumed_run_are_those_of_an_uninterrupted_one(
    tmp_path: Path, tiny_base: Path
) -> None:
    """The checkpoint of step 3 is between the lines of steps 2 and 4."""
    recipe = write_mix(tmp_path, tiny_base, batch_size=2, branches_per_tree=1, eval_steps=20)
    train(recipe, tmp_path / "whole", settings=SETTINGS)
    stopped = stopped_run(recipe, tmp_path / "stopped", "instruct", 4, settings=SETTINGS)
    assert [line["step"] for line in log_of(stopped) if "loss" in line] == [2]
    train(recipe, stopped, settings=SETTINGS, resume="exact")
    whole, resumed = log_of(tmp_path / "whole"), log_of(stopped)
    assert whole == resumed
    named = [line for line in whole if "loss/own.json" in line and "loss/brief.json" in line]
    assert len(named) > 7


def test_the_recipe_against_forgetting_in_the_docs_runs(tmp_path: Path, tiny_base: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    text = page.partition("### Replay")[2].partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "replay.yaml").write_text(text, encoding="utf-8")
    write_data(tmp_path)
    (tmp_path / "general_images").mkdir()
    records = json.loads((tmp_path / "train.json").read_text())
    # Four questions about each image: those of the first seven, and those of the rest.
    for name, root, part in (("inspection", "images", records[:28]), ("general", "general_images", records[28:])):
        for image in {record["image"] for record in part}:
            (tmp_path / "images" / image).rename(tmp_path / root / image)
        (tmp_path / f"{name}.json").write_text(json.dumps(part[4:]))
        (tmp_path / f"{name}_test.json").write_text(json.dumps(part[:4]))
    tiny = [f"base.model_name_or_path={tiny_base}", "quantization.type=none", "adapter.r=4", "adapter.lora_alpha=8"]
    short = ["stages.instruct.max_steps=2", "stages.instruct.batch_size=8", "stages.instruct.num_sample_answers=0"]
    settings = [*tiny, *short, "evaluation.max_new_tokens=1"]
    recipe = load_recipe(tmp_path / "replay.yaml", settings)
    trained, validation = load_split(recipe.stage("instruct").data, recipe.seed)
    counts = Counter(record.source for record in trained)
    assert counts["replay"] / counts.total() == pytest.approx(0.2, abs=0.02)
    assert {record.source for record in validation} == {"inspection.json", "replay"}

    _, shown = train(tmp_path / "replay.yaml", tmp_path / "run", settings=settings)
    rows = log_of(tmp_path / "run")
    assert any("loss/replay" in row for row in rows)
    assert all("eval_loss/replay" in row for row in rows if "eval_loss" in row)
    figures = json.loads((tmp_path / "run" / "evaluation" / "accuracy.json").read_text(encoding="utf-8"))
    assert figures["by_source"]["replay"]["base"]["questions"] == 4
    assert "of replay " in shown
