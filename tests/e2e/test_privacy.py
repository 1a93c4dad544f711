"""Nothing that a run or a check writes holds a path, a name or a secret of the machine it ran on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from lora_llava.cli import cli
from tests.helpers.faulty import plant, sound_data, write_recipe

USER = "canary-user-5b1e"
TOKEN = "hf_canaryTokenThatMustNotShow"
SECRETS = {"HF_TOKEN": TOKEN, "WANDB_API_KEY": "canary-wandb-77", "USER": USER, "CANARY_ANYTHING": "canary-env-91"}


@pytest.fixture(scope="module")
def traces(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The home of a user after a check and a run with skipped records, and what both printed."""
    home = tmp_path_factory.mktemp("home") / USER
    project = home / "project"
    shutil.copytree(tiny_base, project / "base")
    images, train, tested = sound_data()
    plant(images, train, tested)
    sound = [one for one in tested if one["id"] not in ("leak-0", "leak-1", "near", "patient")]
    recipe = write_recipe(project, "./base", images, train, sound)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        patch.setenv("HOME", str(home))
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        printed = CliRunner().invoke(cli, ["check", recipe.name, "--workers", "1"]).output
        skip = ["stages.instruct.data.on_bad_record=skip", "stages.instruct.data.max_bad_records=50"]
        skip += ["stages.instruct.logging_steps=1"]
        done = CliRunner().invoke(cli, ["finetune", recipe.name, *skip, "stages.instruct.max_steps=2"])
    assert done.exit_code == 0, done.output
    return project / "run", printed + done.output


def test_no_file_holds_a_secret_or_an_absolute_path(traces: tuple[Path, str]) -> None:
    run, _ = traces
    files = [path for path in run.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"check.html", "check.json", "instruct.jsonl", "skipped.jsonl", "manifest.json", "recipe.yaml"} <= names
    assert {"adapter_model.safetensors", "summary.json", "train_log.jsonl", "predictions.jsonl"} <= names
    for path in files:
        content = path.read_bytes()
        if path.name == "adapter_config.json":
            # PEFT takes a relative path from the current directory, so that of the base is absolute; push drops it.
            base = json.loads(content)["base_model_name_or_path"]
            content = content.replace(json.dumps(base).encode(), b"null", 1)
        for canary in (*SECRETS.values(), str(run.parent), "/project/"):
            assert canary.encode() not in content, f"{path.relative_to(run)} holds {canary}"


def test_nothing_printed_holds_a_secret(traces: tuple[Path, str]) -> None:
    _, printed = traces
    for name, value in SECRETS.items():
        if name != "USER":
            assert value not in printed


def test_skipped_records_are_shown_at_the_end(traces: tuple[Path, str]) -> None:
    run, printed = traces
    lines = (run / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 15
    assert "15 bad records were skipped; skipped.jsonl says which and why" in printed
    assert '"part": "instruct"' in lines[0]
