"""One identity: what is loaded is what was trained, or the field that differs is named."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

import lora_llava.artifact as artifact_module
import lora_llava.shipping.export.gguf.lora as gguf_lora
import lora_llava.shipping.merge.run as merge_run
from lora_llava.artifact import load_model
from lora_llava.cli import cli
from lora_llava.data.questions import QuestionSet
from lora_llava.errors import LoraLlavaError, ModelError
from lora_llava.evaluation.run import Candidate, evaluate_artifact
from lora_llava.generation.chat import Chat
from lora_llava.recipe.file import load_recipe
from lora_llava.recipe.settings import EvaluationSettings
from lora_llava.shipping.export import export
from lora_llava.system.files import file_sha256
from lora_llava.system.progress import shown_on
from lora_llava.training.run import run_recipe
from tests.helpers.artifacts import as_earlier
from tests.helpers.changed import (
    ADAPTER,
    ARTIFACT,
    BASE,
    CUT,
    MODEL,
    REFUSED,
    SAID,
    TAKEN,
    TOKENIZER,
    State,
    exchanged_ids,
    first,
    images,
    lora,
    nan,
    renamed,
    weights,
)
from tests.helpers.runs import write_data, write_recipe
from tests.helpers.tiny import save_tiny_base

RECIPE = "run/recipe.yaml"


class LoadingError(Exception):
    """Raised where weights would be loaded: every check has passed."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that can be copied: a base, data, a recipe, and a finished run."""
    directory = tmp_path_factory.mktemp("identity") / "project"
    directory.mkdir()
    save_tiny_base(directory / BASE)
    write_data(directory)
    recipe = write_recipe(directory, {"model_name_or_path": "base"}, ["instruct"])
    few = ["stages.instruct.max_steps=2", "stages.instruct.num_sample_answers=0"]
    few.append("stages.instruct.data.validation=null")
    run_recipe(load_recipe(recipe, few), Console(quiet=True))
    return directory


@pytest.fixture
def project(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def loading(*_: Any, **__: Any) -> Any:
        raise LoadingError

    for module, name in ((artifact_module, "load_base"), (merge_run, "write_weights"), (gguf_lora, "write_gguf")):
        monkeypatch.setattr(module, name, loading)
    return Path(shutil.copytree(trained, tmp_path / "project"))


def resume(project: Path, console: Console) -> None:
    run_recipe(load_recipe(project / RECIPE), console, resume="exact")


def chat(project: Path, _: Console) -> None:
    Chat.open(project / ARTIFACT)


def evaluate(project: Path, console: Console) -> None:
    settings = EvaluationSettings.model_validate({"data": {"path": str(project / "train.json")}})
    candidate = Candidate(project / ARTIFACT)
    evaluate_artifact(candidate, QuestionSet((), 0), settings, directory=project / "eval", console=console)


def merge(project: Path, _: Console) -> None:
    merge_run.merge_artifact(project / ARTIFACT, project / "merged")


def export_lora(project: Path, _: Console) -> None:
    export(project / ARTIFACT, project / "exported", "gguf-lora")


COMMANDS: dict[str, Callable[[Path, Console], None]] = {
    "resume": resume,
    "chat": chat,
    "eval": evaluate,
    "merge": merge,
    "export": export_lora,
}


@dataclass
class Told:
    """What a command made of a project."""

    text: str
    refused: bool


def tell(project: Path, command: str) -> Told:
    """Run a command up to where it would load weights."""
    shown = io.StringIO()
    with shown_on(Console(file=shown, width=1000)) as console:
        try:
            COMMANDS[command](project, console)
        except LoadingError:
            pass
        except LoraLlavaError as error:
            return Told(str(error), refused=True)
    notes = [line for line in shown.getvalue().splitlines() if line.startswith("Note: ")]
    return Told("\n".join(notes), refused=False)


@pytest.mark.parametrize("name", REFUSED)
def test_k34_a_change_that_decides_an_answer_is_refused_by_name(project: Path, name: str) -> None:
    change, reason = REFUSED[name]
    change(project)
    for command in COMMANDS:
        told = tell(project, command)
        assert told.refused, f"{command} takes it"
        assert reason in told.text, f"{command}: {told.text}"


@pytest.mark.parametrize("name", SAID)
def test_k34_a_change_that_the_kit_does_not_use_is_said(project: Path, name: str) -> None:
    change, reason = SAID[name]
    change(project)
    for command in COMMANDS:
        told = tell(project, command)
        assert not told.refused, f"{command}: {told.text}"
        assert reason in told.text, f"{command}: {told.text}"


@pytest.mark.parametrize("name", TOKENIZER)
def test_k34_another_tokenizer_of_the_base_is_said_and_not_trained_with(project: Path, name: str) -> None:
    change, reason = TOKENIZER[name]
    change(project)
    for command in COMMANDS:
        told = tell(project, command)
        assert told.refused == (command == "resume"), f"{command}: {told.text}"
        assert reason in told.text, f"{command}: {told.text}"


@pytest.mark.parametrize("name", TAKEN)
def test_k34_a_change_that_decides_nothing_is_taken(project: Path, name: str) -> None:
    TAKEN[name](project)
    for command in COMMANDS:
        assert tell(project, command) == Told("", refused=False), command


def arguments(project: Path) -> dict[str, list[str]]:
    """The command lines of all commands that load a model."""
    artifact, data = str(project / ARTIFACT), str(project / "train.json")
    return {
        "resume": ["finetune", str(project / RECIPE), "--resume"],
        "chat": ["chat", artifact, "What?"],
        "eval": [
            "eval",
            artifact,
            "--data",
            data,
            "--image-root",
            str(project / "images"),
            "--output",
            f"{project}/eval",
        ],
        "merge": ["merge", artifact, str(project / "merged")],
        "export": ["export", artifact, str(project / "exported"), "--format", "vllm"],
    }


BY_COMMAND: dict[str, tuple[str, list[str]]] = {
    "config field": ("rms_norm_eps", ["text_config.rms_norm_eps is 1e-05, the adapter was trained with 1e-06"]),
    "image mean": ("image mean", ["image_mean is [0.5, 0.5, 0.5]"]),
    "image token": (
        "image token",
        ["image_token_index is 5", "<image> is 4 in its tokenizer, but 5 in its config.json"],
    ),
    "token id": ("artifact's tokenizer", ["tokenizer: vocabulary is not what the adapter was trained with"]),
    "weight": ("one weight", ["was trained on another base: weights", "the base's weights changed since"]),
    "tensor name": ("tensor renamed", ["self_attn.q_proj.weight is missing"]),
    "tensor name of the adapter": ("lora_A renamed", ["was altered", "has lora_B, must have lora_A, lora_B"]),
    "alpha": ("lora_alpha", ["adapter config: lora_alpha is 16, the adapter was trained with 8.0"]),
    "template": ("template", ["template: name is chatml, the adapter was trained with vicuna_v1"]),
    "chat template": ("artifact's chat template", ["chat template: text is not what the adapter was trained with"]),
}
"""A change of each group that is tried by the command lines, and how they name it: the preflight has its own words."""


@pytest.mark.parametrize("group", BY_COMMAND)
def test_k34_every_command_names_the_field(project: Path, group: str) -> None:
    name, reasons = BY_COMMAND[group]
    REFUSED[name][0](project)
    for command, line in arguments(project).items():
        done = CliRunner().invoke(cli, line)
        assert done.exit_code in (1, 2), f"{command}: {done.output}"
        assert any(reason in done.stderr for reason in reasons), f"{command}: {done.output}"
        assert "LoadingError" not in done.output
        assert "/../" not in done.output, "a path is not normalized"
        assert not any((project / made).exists() for made in ("merged", "exported", "eval"))


def test_k34_every_command_names_another_tokenizer_of_the_base(project: Path) -> None:
    change, reason = TOKENIZER["ids exchanged"]
    change(project)
    for command, line in arguments(project).items():
        done = CliRunner().invoke(cli, line)
        assert reason in done.output, f"{command}: {done.output}"
        # Where the artifact's own tokenizer asks, the command continues, and in this test comes to weights or its end.
        continues = done.exit_code == 0 or "LoadingError" in done.output
        assert continues == (command != "resume"), f"{command}: {done.output}"


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "resume"])
@pytest.mark.parametrize(
    ("path", "change_state", "reason"),
    [
        (ADAPTER, renamed("lora_A", "lora_X"), "has lora_B, must have lora_A, lora_B"),
        (ADAPTER, nan, "holds NaN or infinity"),
        (
            ADAPTER,
            lambda state: [state.pop(name) for name in list(state) if "layers.1.mlp.up_proj" in name],
            "is missing",
        ),
        (ADAPTER, lambda state: state.pop(first(state, "linear_2.bias")), "the projector is missing"),
    ],
    ids=["renamed", "NaN", "a layer less", "no bias"],
)
def test_k34_an_adapter_that_is_not_whole_is_refused(
    project: Path, command: str, path: str, change_state: Callable[[State], object], reason: str
) -> None:
    """Even where the manifest agrees, as of an artifact that another tool wrote."""
    weights(path, change_state)(project)
    as_earlier(project / ARTIFACT, adapter_sha256=file_sha256(project / path))
    told = tell(project, command)
    assert told.refused and reason in told.text, told.text


@pytest.mark.parametrize("command", COMMANDS)
def test_k34_an_earlier_artifact_loads_with_a_line_on_what_is_not_compared(project: Path, command: str) -> None:
    as_earlier(project / ARTIFACT)
    told = tell(project, command)
    assert not told.refused
    assert "is from an earlier version" in told.text and "base config" in told.text
    images("image_mean", [0.5, 0.5, 0.5])(project)
    told = tell(project, command)
    assert told.refused and "image_mean is [0.5, 0.5, 0.5], the adapter was trained with" in told.text


def test_k34_lora_on_fewer_layers_than_trained_is_refused_without_a_record(project: Path) -> None:
    lora("target_modules", CUT)(project)
    as_earlier(project / ARTIFACT)
    told = tell(project, "chat")
    assert told.refused and "which adapter_config.json does not name" in told.text


def test_k34_start_from_is_refused_on_a_base_of_another_config(project: Path) -> None:
    overrides = [f"start_from={project / ARTIFACT}", f"output_dir={project / 'again'}"]
    recipe = load_recipe(project / "tiny.yaml", overrides)
    REFUSED["rms_norm_eps"][0](project)
    with pytest.raises(LoraLlavaError, match="rms_norm_eps is 1e-05, the adapter was trained with 1e-06"):
        run_recipe(recipe, Console(quiet=True))


def test_k34_the_artifacts_tokenizer_asks_and_is_merged(trained: Path, tmp_path: Path) -> None:
    project = Path(shutil.copytree(trained, tmp_path / "project"))
    asked = Chat.open(project / ARTIFACT).loaded.tokenizer("a bab")["input_ids"]
    merge_run.merge_artifact(project / ARTIFACT, project / "before")
    exchanged_ids(BASE)(project)
    assert Chat.open(project / ARTIFACT).loaded.tokenizer("a bab")["input_ids"] == asked
    merge_run.merge_artifact(project / ARTIFACT, project / "after")
    for name in ("tokenizer.json", "generation_config.json", "preprocessor_config.json", "model.safetensors"):
        assert (project / "after" / name).read_bytes() == (project / "before" / name).read_bytes(), name


def test_k34_a_whole_model_is_complete_and_finite(tiny_base: Path, tmp_path: Path) -> None:
    for name, change_state, reason in (
        ("missing", lambda state: state.pop(first(state)), "q_proj.weight is missing"),
        ("unexpected", lambda state: state.update(extra=torch.zeros(1)), "extra does not belong to it"),
        ("NaN", lambda state: state[first(state)].fill_(float("nan")), "q_proj.weight holds NaN or infinity"),
    ):
        shutil.copytree(tiny_base, tmp_path / name / BASE)
        weights(MODEL, change_state)(tmp_path / name)
        with pytest.raises(ModelError, match=reason):
            load_model(tmp_path / name / BASE, template="vicuna_v1")
