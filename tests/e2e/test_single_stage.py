"""One stage by itself, as a notebook trains it."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from lora_llava.artifact import read_manifest
from lora_llava.recipe.file import load_recipe
from lora_llava.run_directory.claim import claimed
from lora_llava.training.prepare import prepare_base
from lora_llava.training.run import run_recipe
from lora_llava.training.stage import Stage
from lora_llava.training.train import train_stage
from tests.helpers.runs import write_data, write_recipe

FEW = ("stages.instruct.max_steps=2", "stages.instruct.num_sample_answers=0")


def test_a_stage_trains_as_in_a_run_and_logs_where_each_value_is_from(tmp_path: Path, tiny_base: Path) -> None:
    write_data(tmp_path)
    path = write_recipe(tmp_path, {"model_name_or_path": str(tiny_base)}, ["instruct"])
    recipe = load_recipe(path, FEW)
    shown = io.StringIO()
    with claimed(recipe.resolved_output_dir, recipe.plain()):
        base_directory, base = prepare_base(recipe, recipe.resolved_output_dir, {})
        stage = Stage(recipe, "instruct", base_directory, base)
        seen, _ = train_stage(stage, Console(file=shown, width=200))
    assert seen["steps"] == 2

    whole = load_recipe(path, [*FEW, f"output_dir={tmp_path / 'whole'}"])
    run_recipe(whole, Console(quiet=True))
    of_run = read_manifest(tmp_path / "whole" / "instruct")
    assert read_manifest(stage.directory).adapter_sha256 == of_run.adapter_sha256

    lines = shown.getvalue().splitlines()
    assert "instruct: batch_size: 9 (recipe)" in lines
    assert "instruct: attn_implementation: sdpa_by_tree (auto, on a CPU)" in lines
    [planned] = [line for line in lines if "tokens_per_micro_batch" in line]
    assert planned.startswith(
        "instruct: tokens_per_micro_batch: 400 (recipe), gradient_checkpointing: none (auto, from "
    )
