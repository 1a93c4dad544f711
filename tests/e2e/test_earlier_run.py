"""What an earlier version wrote is read, asked, merged, exported, resumed and trained further.

`tests/fixtures/earlier_run/make.py` wrote the fixtures. The tests use commands and files alone: formats stay, modules
may move.
"""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch.testing import assert_close

from lora_llava.cli import cli
from tests.fixtures.earlier_run import make

FIXTURES = Path(make.__file__).parent
WEIGHTS, LOG = "adapter_model.safetensors", "train_log.jsonl"
CHECKPOINT = f"stopped/checkpoints/instruct/step-{make.STOP_AFTER}"
LOSSES = ("loss", "eval_loss", "eval_loss_blind")


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the fixtures, not to be written to."""
    return Path(shutil.copytree(FIXTURES, tmp_path_factory.mktemp("earlier") / "moved"))


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs were trained on a CPU, and a resumed run must be on the same device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def expected(earlier: Path) -> dict[str, Any]:
    return read_json(earlier / "expected.json")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def losses(directory: Path) -> list[tuple[str, int, list[float]]]:
    rows = [json.loads(line) for line in (directory / LOG).read_text(encoding="utf-8").splitlines()]
    return [(row["stage"], row["step"], [row[key] for key in LOSSES if key in row]) for row in rows]


def resume_option(artifact: Path) -> str:
    """Return `--resume`, unless the libraries are not those of the fixtures: then results are equal only nearly."""
    versions = read_json(artifact / "manifest.json")["versions"]
    return "--resume" if all(version(name) == there for name, there in versions.items()) else "--resume-anyway"


def test_its_artifact_answers_as_it_did(earlier: Path, expected: dict[str, Any]) -> None:
    image = earlier / make.IMAGE
    answer = make.run("chat", earlier / "finished/instruct", "--image", image, "--max-new-tokens", "4", make.QUESTION)
    assert answer == expected["answer"]


def test_k34_what_its_manifest_does_not_tell_is_said_in_one_line(earlier: Path) -> None:
    done = CliRunner().invoke(cli, ["chat", str(earlier / "finished/instruct"), make.QUESTION, "--max-new-tokens", "1"])
    assert done.exit_code == 0
    assert done.stderr.count("Note: ") == done.stderr.count("is from an earlier version") == 1


def test_its_artifact_is_merged_to_the_same_weights(earlier: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    make.run("merge", earlier / "finished/instruct", tmp_path / "merged", "--dtype", "float32")
    norms = make.norms(tmp_path / "merged")
    assert norms.keys() == expected["merged_norms"].keys()
    assert norms == pytest.approx(expected["merged_norms"], rel=1e-5)


@pytest.mark.parametrize(("layout", "name"), [("hf", "model.safetensors"), ("gguf", "*.gguf")])
def test_its_artifact_is_exported(earlier: Path, tmp_path: Path, layout: str, name: str) -> None:
    make.run("export", earlier / "finished/instruct", tmp_path / "exported", "--format", layout)
    assert list((tmp_path / "exported").glob(name))


def test_its_checkpoint_is_an_artifact(earlier: Path, tmp_path: Path) -> None:
    make.run("merge", earlier / CHECKPOINT, tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_its_stopped_run_is_resumed_to_what_an_uninterrupted_one_wrote(earlier: Path, tmp_path: Path) -> None:
    shutil.copytree(earlier, tmp_path / "copy")
    stopped, finished = tmp_path / "copy/stopped", tmp_path / "copy/finished"
    assert not (stopped / "instruct").exists()
    make.run("finetune", stopped / "recipe.yaml", resume_option(finished / "instruct"))
    for stage in ("align", "instruct"):
        assert_close(load_file(stopped / stage / WEIGHTS), load_file(finished / stage / WEIGHTS), rtol=1e-4, atol=1e-5)
    # New lines follow the old ones, whose times are unchanged: no step was trained again.
    assert (stopped / LOG).read_bytes().startswith((earlier / "stopped" / LOG).read_bytes())
    ours, theirs = losses(stopped), losses(finished)
    assert [row[:2] for row in ours] == [row[:2] for row in theirs]
    assert [row[2] for row in ours] == [pytest.approx(row[2], rel=1e-4) for row in theirs]
    summary = read_json(stopped / "summary.json")
    assert summary["instruct"]["steps"] == make.INSTRUCT_STEPS
    assert summary["instruct"]["best_step"] == read_json(finished / "summary.json")["instruct"]["best_step"]


def test_its_finished_run_has_nothing_left_to_do(earlier: Path, tmp_path: Path) -> None:
    shutil.copytree(earlier, tmp_path / "copy")
    finished = tmp_path / "copy/finished"
    make.run("finetune", finished / "recipe.yaml", resume_option(finished / "instruct"))
    for name in ("align/manifest.json", "instruct/manifest.json", LOG):
        assert (finished / name).read_bytes() == (earlier / "finished" / name).read_bytes()
    before, after = (read_json(one / "summary.json") for one in (earlier / "finished", finished))
    assert {stage: after[stage] for stage in ("align", "instruct")} == {
        stage: before[stage] for stage in ("align", "instruct")
    }


def test_its_artifact_is_trained_further(earlier: Path, tmp_path: Path) -> None:
    start = earlier / "finished/instruct"
    overrides = ["stages.align=null", "stages.instruct.max_steps=1", f"output_dir={tmp_path / 'run'}"]
    make.run("finetune", earlier / "recipe.yaml", *overrides, f"start_from={start}")
    parent = read_json(start / "manifest.json")["adapter_sha256"]
    assert read_json(tmp_path / "run/instruct/manifest.json")["parent_sha256"] == parent
