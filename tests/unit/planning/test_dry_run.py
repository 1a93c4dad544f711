"""The dry run and the inspection, on a tiny base: nothing is written, no network is needed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from PIL import Image

from lora_llava.cli import cli
from lora_llava.formats.shapes import LlavaShape
from lora_llava.modeling.base import drop_unused_layers
from lora_llava.modeling.metadata import read_config
from lora_llava.modeling.stages import build_stage, parameter_table
from lora_llava.modeling.structure import LANGUAGE_MODEL, PROJECTOR, stage_parameters
from lora_llava.planning import dry_run as dry_run_module
from lora_llava.planning.memory import expected_memory, in_4_bits
from lora_llava.planning.memory_plan import StageShapes
from lora_llava.recipe.file import load_recipe
from lora_llava.recipe.settings import Recipe
from lora_llava.recipe.stages import DataSettings, PreferSettings
from lora_llava.system.ranks import world_size
from tests.helpers.tiny import tiny_llava
from tests.ways import shapes_of

WriteRecipe = Callable[..., Path]


@pytest.fixture
def write_recipe(tmp_path: Path, tiny_base: Path) -> WriteRecipe:
    """A function that writes data and a recipe over the tiny base, some settings replaced."""
    for number in range(2):
        Image.new("RGB", (40, 20), (number, 9, 9)).save(tmp_path / f"{number}.png")
    records = [
        {
            "id": f"q{place}",
            "image": f"{place // 3}.png",
            "conversations": [
                {"from": "human", "value": f"<image>\nWhat is {place}?"},
                {"from": "gpt", "value": "yes it is"},
            ],
        }
        for place in range(6)
    ]
    (tmp_path / "train.json").write_text(json.dumps(records), encoding="utf-8")

    def write(**changes: object) -> Path:
        stage = {"data": {"path": "train.json"}, "max_length": 256, "tokens_per_micro_batch": 256, "batch_size": 3}
        recipe = {
            "version": 1,
            "name": "tiny",
            "output_dir": "run",
            "base": {"model_name_or_path": str(tiny_base)},
            "adapter": {"r": 4, "lora_alpha": 8.0},
            "stages": {"align": stage, "instruct": copy.deepcopy(stage)},
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return path

    return write


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens a connection fails at once."""
    import socket

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def dry_run(*args: str) -> Result:
    return CliRunner().invoke(cli, ["finetune", *args, "--dry-run"])


def files_below(directory: Path) -> set[Path]:
    return set(directory.rglob("*"))


@pytest.mark.fault("recipe: a dry run that would write, or use the network")
def test_plan_parameters_and_memory_are_shown_and_nothing_is_written(
    write_recipe: WriteRecipe, tmp_path: Path, tiny_base: Path
) -> None:
    recipe = write_recipe()
    before = files_below(tmp_path) | files_below(tiny_base)
    result = dry_run(str(recipe))
    assert result.exit_code == 0, result.output
    assert files_below(tmp_path) | files_below(tiny_base) == before
    for text in ("Stage align", "Stage instruct", "6 conversations", "2 optimizer steps", "saved by packing"):
        assert text in result.output
    assert result.output.count("Memory to expect") == 2


def test_an_override_counts(write_recipe: WriteRecipe) -> None:
    result = dry_run(str(write_recipe()), "stages.instruct.max_steps=5", "stages.align=null")
    assert "5 optimizer steps" in result.output
    assert "Stage align" not in result.output


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_planned_parameters_are_those_of_the_built_model(
    write_recipe: WriteRecipe, tiny_base: Path, stage: str
) -> None:
    recipe: Recipe = load_recipe(write_recipe(quantization={"type": "none"}))
    [name] = [name for name in recipe.stage_names if name == stage]
    ours = stage_parameters(LlavaShape.of(read_config(tiny_base).to_dict()), name, recipe.adapter, torch.float32)
    model = tiny_llava()
    drop_unused_layers(model)
    theirs = parameter_table(build_stage(model, name, recipe.adapter))
    assert ours == theirs


def test_quantised_weights_take_half_a_byte_and_their_scales(write_recipe: WriteRecipe, tiny_base: Path) -> None:
    config, recipe = read_config(tiny_base), load_recipe(write_recipe())
    plain = stage_parameters(LlavaShape.of(config.to_dict()), "instruct", recipe.adapter, torch.float32)
    nf4 = in_4_bits(plain, config, recipe.quantization, torch.float32)
    before, after = ({row.part: row for row in table} for table in (plain, nf4))
    quantized = after[LANGUAGE_MODEL].quantized
    linears = [part for part in tiny_llava().model.language_model.modules() if isinstance(part, torch.nn.Linear)]
    assert quantized == sum(part.weight.numel() for part in linears)
    assert before[LANGUAGE_MODEL].bytes - after[LANGUAGE_MODEL].bytes == pytest.approx(quantized * (4 - 0.516), abs=1)
    assert after[PROJECTOR] == before[PROJECTOR]


@pytest.mark.parametrize(("optim", "state"), [("adamw_torch", 8), ("paged_adamw_8bit", 2)])
def test_trained_parameters_take_gradients_and_optimizer_state(
    write_recipe: WriteRecipe, tiny_base: Path, optim: str, state: int
) -> None:
    recipe = load_recipe(write_recipe())
    table = stage_parameters(LlavaShape.of(read_config(tiny_base).to_dict()), "align", recipe.adapter, torch.float32)
    for row, memory in zip(table, expected_memory(optim, table), strict=True):
        assert memory.gradients == 4 * row.trainable
        assert memory.optimizer == state * row.trainable
        assert bool(row.trainable) == (row.part == PROJECTOR)


@pytest.mark.parametrize("base", ["./nowhere", "someone/some-model"])
def test_k63_without_the_base_nothing_is_planned(
    write_recipe: WriteRecipe, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    result = dry_run(str(write_recipe(base={"model_name_or_path": base})))
    assert result.exit_code == 2
    assert "base.model_name_or_path: " in result.stderr
    assert Path(base).name in result.stderr
    assert result.stdout == "Recipe tiny: align, then instruct.\n"


def test_a_base_that_does_not_fit_is_an_error(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    result = dry_run(str(write_recipe(base={"model_name_or_path": "./other"})))
    assert result.exit_code == 2
    assert "model_type is 'bert'" in result.stderr


def test_a_mistake_in_local_data_is_an_error(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe()
    (tmp_path / "0.png").unlink()
    result = dry_run(str(recipe))
    assert result.exit_code == 2
    assert "0.png" in result.stderr


def test_inspect_shows_what_is_learned(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe()
    before = files_below(tmp_path)
    result = CliRunner().invoke(cli, ["inspect", str(recipe), "--index", "4"])
    assert result.exit_code == 0, result.output
    assert "(id q4), stage instruct" in result.output
    assert "<image> x 4" in result.output
    supervised = "".join(result.output.split("«")[1].split("»")[0].split("\N{LIGHT VERTICAL BAR}"))
    assert supervised == " yes it is</s>"
    for name in ("input_ids", "position_ids", "segments", "target_positions", "pixel_values", "40 x 20 pixels"):
        assert name in result.output
    assert files_below(tmp_path) == before


def test_inspect_takes_a_stage(write_recipe: WriteRecipe) -> None:
    result = CliRunner().invoke(cli, ["inspect", str(write_recipe()), "--stage", "align"])
    assert "template plain" in result.output
    assert "What" not in result.output.split("only read")[0], "the plain template drops the question"


def test_inspect_names_a_record_that_is_not_there(write_recipe: WriteRecipe) -> None:
    result = CliRunner().invoke(cli, ["inspect", str(write_recipe()), "--index", "6"])
    assert result.exit_code == 1
    assert "there is no record 6" in result.stderr


def test_sharding_is_proposed_only_where_a_run_accepts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[tuple[int, int]] = []

    def too_small(shapes: StageShapes, attention: str, size: int) -> None:
        planned.append((shapes.shards, world_size()))

    monkeypatch.setattr(dry_run_module, "_plan_for_card", too_small)
    shapes = shapes_of("7B", 16)
    assert dry_run_module._cards_needed(shapes, "auto", 12) is None
    assert planned == [(2, 2), (4, 4)], "with the memory that links between cards take"
    pairs = PreferSettings(data=DataSettings(path="pairs.json"))
    for other in (replace(shapes, offloads=True), replace(shapes, settings=pairs)):
        assert dry_run_module._cards_needed(other, "auto", 12) is None
    assert len(planned) == 2
