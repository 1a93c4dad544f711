"""The artifact of stage `prefer` in every command that takes a model, and as the start of another run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result

from lora_llava.artifact import load_model, read_manifest
from lora_llava.cli import cli
from lora_llava.formats.names import WEIGHTS
from lora_llava.run_directory.output import read_log
from lora_llava.shipping.export import FORMATS
from lora_llava.system.files import file_sha256
from tests.helpers.artifacts import CPU, FILES, logits
from tests.helpers.pairs import write_preference_project

QUESTION = "What is the colour?"
ASKED = ("--data", "train.json", "--image-root", "images", "--max-new-tokens", "4")


def run(*args: object) -> Result:
    result = CliRunner().invoke(cli, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def project(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `instruct` and `prefer` over a base in NF4."""
    directory = tmp_path_factory.mktemp("prefer") / "project"
    path = write_preference_project(directory, tiny_base, "instruct")
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe["quantization"] = {"type": "nf4"}
    recipe["stages"]["prefer"] |= {"sft_weight": 0.2, "learning_rate": 0.02}
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    run("finetune", path)
    return directory


@pytest.fixture
def artifact(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project)
    return Path("run/prefer")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answers(model: Path, output: Path) -> list[tuple[str, float]]:
    """What `predict` writes of the answers of a model."""
    run("predict", model, *ASKED, "--output", output)
    return [(row["prediction"], row["logprob_sum"]) for row in lines(output)]


def test_predict_and_eval_and_chat_give_the_answers_of_its_weights(artifact: Path, tmp_path: Path) -> None:
    predicted = answers(artifact, tmp_path / "after.jsonl")
    # Those of the model it started from are others.
    before = answers(artifact.with_name("instruct"), tmp_path / "before.jsonl")
    differences = [abs(one[1] - other[1]) for one, other in zip(predicted, before, strict=True)]
    assert min(differences) > 1e-3

    run("eval", artifact, *ASKED, "--no-base", "--output", tmp_path / "eval")
    evaluated = lines(tmp_path / "eval" / "predictions.jsonl")
    assert [row["tuned"]["prediction"] for row in evaluated] == [text for text, _ in predicted]

    said = run("chat", artifact, "--image", "images/0.png", "--max-new-tokens", 4, QUESTION).stdout
    assert said.strip() == predicted[0][0].strip()


def test_a_merged_model_computes_the_same(artifact: Path, tmp_path: Path) -> None:
    run("merge", artifact, tmp_path / "merged")
    models = [load_model(one, device=CPU)[0].model for one in (artifact, tmp_path / "merged")]
    torch.testing.assert_close(*(logits(model) for model in models), rtol=0, atol=1e-4)
    started = load_model(artifact.with_name("instruct"), device=CPU)[0].model
    assert float((logits(started) - logits(models[0])).abs().max()) > 1e-2


@pytest.mark.parametrize("layout", FORMATS)
def test_every_export_takes_it(artifact: Path, tmp_path: Path, layout: str) -> None:
    tower = ("--vision-tower", "openai/clip-vit-large-patch14-336") if layout == "llava" else ()
    run("export", artifact, tmp_path / "out", "--format", layout, *tower)
    assert any((tmp_path / "out").iterdir())


def test_the_card_names_the_loss_and_the_pairs(artifact: Path) -> None:
    card = run("push", artifact, "me/tiny", "--dry-run").stdout
    assert "| preference loss |  | DPO, beta 0.1, SFT weight 0.2 |" in card
    assert "| conversations per step | 9 | 5 pairs |" in card
    assert "| prefer | `pairs.json` |" in card
    assert "started from" not in card
    of_instruct = run("push", artifact.with_name("instruct"), "me/tiny", "--dry-run").stdout
    assert "preference loss" not in of_instruct
    assert "pairs" not in of_instruct


def test_a_run_starts_from_it_and_pairs_are_made_with_it(artifact: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load(Path("tiny.yaml").read_text(encoding="utf-8"))
    del recipe["stages"]["instruct"], recipe["adapter"]
    recipe |= {"start_from": "run/prefer", "output_dir": str(tmp_path / "again")}
    Path("again.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    run("finetune", "again.yaml")
    # Its reference is the model that it starts from.
    assert read_log(tmp_path / "again")[0]["reward_margin"] == pytest.approx(0, abs=1e-5)
    made = tmp_path / "again" / "prefer"
    assert read_manifest(made).parent_sha256 == read_manifest(artifact).adapter_sha256
    assert read_manifest(artifact).adapter_sha256 == file_sha256(artifact / WEIGHTS)
    assert {path.name for path in made.iterdir()} == FILES
    card = run("push", made, "me/tiny", "--dry-run").stdout
    assert "It started from an earlier artifact, whose training is not described here." in card

    settings = ("--max-new-tokens", 12, "--samples", 8, "--temperature", 0.5, "--max-records", 12)
    run("pairs", artifact, *ASKED[:4], *settings, "--output", tmp_path / "pairs.json")
    assert json.loads((tmp_path / "pairs.json").read_text(encoding="utf-8"))
