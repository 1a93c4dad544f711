"""A run over two sources, with system prompts of records: losses by source, and the same run again from its recipe."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from rich.console import Console

from lora_llava.artifact import read_manifest
from lora_llava.recipe.file import load_recipe
from lora_llava.training.run import run_recipe
from tests.helpers.runs import write_data, write_recipe


def test_a_run_mixes_two_sources_and_tells_their_losses_apart(tmp_path: Path, tiny_base: Path) -> None:
    write_data(tmp_path)
    records = json.loads((tmp_path / "train.json").read_text())
    held = [record for record in records if record["image"] == records[-1]["image"]]
    rest = [record for record in records if record["image"] != records[-1]["image"]]
    # The same images under another system prompt: no tree may hold both.
    for name, system in (("own", {}), ("brief", {"system": "Be brief."})):
        for part, chosen in ((name, rest), (f"held_{name}", held)):
            (tmp_path / f"{part}.json").write_text(json.dumps([{**record, **system} for record in chosen]))
    path = write_recipe(tmp_path, {"model_name_or_path": str(tiny_base)}, ["instruct"])
    recipe = yaml.safe_load(path.read_text())
    own = {"path": "own.json", "image_root": "images", "validation": {"path": "held_own.json"}}
    brief = {"path": "brief.json", "image_root": "images", "validation": {"path": "held_brief.json"}, "share": 0.5}
    recipe["stages"]["instruct"] |= {"data": [own, brief], "max_steps": 2, "num_sample_answers": 0}
    path.write_text(yaml.safe_dump(recipe))

    run_recipe(load_recipe(path), Console(quiet=True))
    lines = [json.loads(line) for line in (tmp_path / "run" / "train_log.jsonl").read_text().splitlines()]
    validation = [line for line in lines if "eval_loss" in line][-1]
    losses = [validation["eval_loss/own.json"], validation["eval_loss/brief.json"]]
    assert min(losses) < validation["eval_loss"] < max(losses)

    again = load_recipe(tmp_path / "run" / "recipe.yaml", [f"output_dir={tmp_path / 'again'}"])
    assert len(again.stage("instruct").data.sources) == 2
    run_recipe(again, Console(quiet=True))
    first, second = (read_manifest(tmp_path / name / "instruct").adapter_sha256 for name in ("run", "again"))
    assert first == second
