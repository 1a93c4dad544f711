"""The preflight of the machine: processes, the Hub out of reach; and shapes that are worked out from config.json."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlavaConfig

from lora_llava.conversation.chat_template import chat_template
from lora_llava.conversation.templates import get_template
from lora_llava.formats.llava_hf import expected_shapes, meta_model
from lora_llava.formats.names import HEAD, canonical_name
from lora_llava.formats.shapes import LlavaShape
from lora_llava.modeling.structure import num_image_tokens
from lora_llava.planning.memory_plan import GIB, usable_bytes
from lora_llava.planning.preflight import environment
from lora_llava.recipe.stages import InstructSettings, PreferSettings
from lora_llava.system import ranks
from tests.helpers.broken import COMMANDS, INSTRUCT, Project, command
from tests.helpers.tiny import tiny_config


def built_shapes(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """Shapes by canonical name of the model that transformers builds; a tied head is not stored."""
    state = meta_model(config).state_dict()
    shapes = {canonical_name(name): tuple(tensor.shape) for name, tensor in state.items()}
    if config.tie_word_embeddings:
        shapes.pop(HEAD)
    return shapes


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"text_config.attention_bias": True, "text_config.mlp_bias": True},
        {"text_config.tie_word_embeddings": True},
        {"multimodal_projector_bias": False, "vision_feature_select_strategy": "full"},
        {"text_config.head_dim": 20, "text_config.num_key_value_heads": 4, "vision_config.image_size": 42},
    ],
)
def test_shapes_are_those_that_transformers_builds(changes: dict[str, object]) -> None:
    config = tiny_config().to_dict()
    for key, value in changes.items():
        place, _, name = key.rpartition(".")
        (config[place] if place else config)[name] = value
    shape = LlavaShape.of(config)
    built = LlavaConfig.from_dict(config)
    assert dict(shape.tensors()) == expected_shapes(built) == built_shapes(built)
    assert shape.num_image_tokens == num_image_tokens(built)


def test_shapes_of_a_config_that_leaves_everything_out() -> None:
    config = {"model_type": "llava"}
    built = LlavaConfig.from_dict(config)
    assert dict(LlavaShape.of(config).tensors()) == expected_shapes(built) == built_shapes(built)


@pytest.mark.parametrize(
    "variable", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"]
)
@pytest.mark.parametrize("name", COMMANDS)
def test_k27_several_processes_are_refused_in_each(
    project: Project, name: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in ("0", "1"):
        monkeypatch.setenv(variable, "2")
        monkeypatch.setenv("RANK", rank)
        result = command(name, project)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"Error: {variable}: is 2")
    assert not (project.directory / "run").exists()


def test_k27_one_process_of_a_launcher_is_no_problem(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert command("dry run", project).exit_code == 0


def test_a_dry_run_plans_for_the_cards_that_are_asked_for(project: Project) -> None:
    one, two = command("dry run", project), command("dry run", project, "--gpus", "2")
    assert (one.exit_code, two.exit_code) == (0, 0), two.output
    assert "On 2 cards: each holds the whole model and computes its part of every step." in two.stdout
    assert "cards: each" not in one.stdout
    # Steps are the same, and their rows come in pairs.
    counts = [re.findall(r"(\d+) optimizer steps?.*; (\d+) micro-batch", result.stdout) for result in (one, two)]
    assert [steps for steps, _ in counts[0]] == [steps for steps, _ in counts[1]]
    assert counts[0] != counts[1]
    assert all(int(rows) % 2 == 0 for _, rows in counts[1])
    assert ranks.world_size() == 1


def test_a_card_smaller_than_the_context_of_cuda_has_nothing_to_plan_with() -> None:
    assert usable_bytes("cuda", GIB // 2) == 0


def test_a_card_of_several_leaves_memory_to_their_links() -> None:
    alone = usable_bytes("cuda", 12 * GIB)
    with ranks.planned_for(2):
        assert alone - GIB < usable_bytes("cuda", 12 * GIB) < alone
        assert usable_bytes("cpu", 12 * GIB) > alone


@pytest.fixture
def tried(project: Project, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Connections that were tried on a machine without a network."""
    tried: list[object] = []

    def refuse(*args: object, **_: object) -> None:
        tried.append(args)
        raise OSError("the network was touched")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(project.directory / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(project.directory / "cache"))
    return tried


@pytest.mark.parametrize("name", COMMANDS)
def test_k63_offline_is_found_out_once(project: Project, tried: list[object], name: str) -> None:
    columns = "columns={question: q, answer: a}"
    result = command(
        name,
        project,
        "base.model_name_or_path=someone/some-model",
        f"{INSTRUCT}.data={{path: someone/some-data, {columns.replace('=', ': ')}}}",
    )
    assert result.exit_code == 2
    for words in (
        "base.model_name_or_path: someone/some-model is not a directory, is not in the Hub's cache, and the Hub",
        f"{INSTRUCT}.data.path: someone/some-data is not here, is not in the Hub's cache, and the Hub cannot be",
    ):
        assert words in result.stderr
    assert len(tried) == 1
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_k63_a_base_in_the_cache_needs_no_network(project: Project, tried: list[object]) -> None:
    repository = project.directory / "cache" / "models--someone--some-model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    shutil.copytree(project.base, repository / "snapshots" / ("0" * 40))
    result = command("dry run", project, "base.model_name_or_path=someone/some-model")
    assert result.exit_code == 0, result.output
    assert "Memory to expect" in result.stdout
    assert len(tried) == 1


def test_k63_a_misspelled_directory_is_no_hub_id(project: Project, tried: list[object]) -> None:
    result = command("dry run", project, "base.model_name_or_path=bsae")
    assert "Did you mean base?" in result.stderr
    assert result.exit_code == 2
    assert len(tried) <= 1


def test_k63_the_whole_refusal_is_quick(project: Project) -> None:
    """Time of the processor, not of the clock: other tests run at the same time."""
    project.edit("base/config.json", quantization_config={"quant_method": "gptq"})
    for arguments in COMMANDS.values():
        before = os.times()
        done = subprocess.run(
            [sys.executable, "-c", "from lora_llava.cli import cli; cli()", *arguments, str(project.recipe)],
            capture_output=True,
            text=True,
            check=False,
        )
        after = os.times()
        assert done.returncode == 2, done.stderr
        assert "quantized already (gptq)" in done.stderr
        assert after.children_user + after.children_system - before.children_user - before.children_system < 3


def test_k10_a_template_other_than_the_bases_is_told_by_all_three(project: Project) -> None:
    jinja = chat_template(get_template("chatml"), "</s>")
    (project.base / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    for name in COMMANDS:
        limits = [] if name == "check" else [f"{INSTRUCT}.max_steps=1", "stages.align.max_steps=1"]
        said = command(name, project, *limits, f"output_dir=./{name[:3]}").stdout
        line = next(line for line in said.splitlines() if line.startswith(f"Note: {INSTRUCT}.template: "))
        assert "it is chatml; to train in the base's own format, set template: chatml" in line


@pytest.mark.parametrize("is_installed", [True, False])
def test_deepspeed_is_looked_for_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, is_installed: bool) -> None:
    monkeypatch.setattr(environment, "_is_installed", lambda name: name != "deepspeed" or is_installed)
    for engine in ("torch", "deepspeed"):
        asked: Any = SimpleNamespace(recipe=SimpleNamespace(distributed=SimpleNamespace(engine=engine)))
        problems = list(environment.libraries_are_installed(asked))
        assert bool(problems) == (engine == "deepspeed" and not is_installed)
        assert all("pip install 'lora-llava[deepspeed]'" in str(one) for one in problems)


@pytest.mark.parametrize(("how", "key"), [({"shard": True}, "shard"), ({"offload": True}, "engine"), ({}, None)])
def test_a_stage_of_pairs_is_not_divided_between_processes(how: dict[str, bool], key: str | None) -> None:
    distributed = SimpleNamespace(**{"shard": False, "offload": False, **how})
    stages = {"instruct": InstructSettings, "prefer": PreferSettings}
    recipe = SimpleNamespace(distributed=distributed, stage_names=list(stages), stage=stages.__getitem__)
    asked: Any = SimpleNamespace(recipe=recipe)
    assert list(environment.stages_can_be_divided(asked)) == []
    with ranks.planned_for(2):
        problems = [str(problem) for problem in environment.stages_can_be_divided(asked)]
    assert [problem.split(" trains on pairs")[0] for problem in problems] == (
        [f"distributed.{key}: stage prefer"] if key else []
    )
