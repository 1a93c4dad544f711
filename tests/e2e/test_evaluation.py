"""Evaluations through the command line: every turn, a sample of the base, the start, own keys and sentences."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image

from lora_llava.artifact import load_artifact
from lora_llava.cli import cli
from lora_llava.conversation.templates import get_template
from lora_llava.data.questions import load_questions
from lora_llava.generation.answers import PromptFormat, generate_answers
from lora_llava.recipe.stages import DataSettings

COLORS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}


def run(*args: str, status: int = 0) -> str:
    result = CliRunner().invoke(cli, list(args))
    assert result.exit_code == status, result.output
    return result.output


def read(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def write_data(directory: Path, name: str = "data.json") -> None:
    """Write twelve pictures in a folder: two questions each in one record, a key of their own, some without answers."""
    (directory / "ward").mkdir(exist_ok=True)
    records: list[dict[str, Any]] = []
    for number in range(12):
        word, color = list(COLORS.items())[number % 3]
        Image.new("RGB", (20, 20), color).save(directory / "ward" / f"{number}.png")
        turns = ["<image>\ncolor?", word, "is it red?", "yes" if word == "red" else "no", "why?"]
        turns = turns[: (4, 5, 1)[number // 3 % 3 if name != "data.json" else 0]]
        conversation = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(turns)]
        records.append({"image": f"ward/{number}.png", "patient": f"p{number % 2}", "conversations": conversation})
    (directory / name).write_text(json.dumps(records), encoding="utf-8")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A folder with data, a first run, and one that started from it under another template."""
    directory = tmp_path_factory.mktemp("evaluation")
    write_data(directory)
    write_data(directory, "test.json")
    stage = {"max_length": 256, "tokens_per_micro_batch": 256, "batch_size": 4, "max_steps": 3, "learning_rate": 0.01}
    recipe: dict[str, Any] = {
        "name": "first",
        "output_dir": "first",
        "base": {"model_name_or_path": str(tiny_base)},
        "quantization": {"type": "none"},
        "adapter": {"r": 4, "lora_alpha": 8.0},
        "stages": {"instruct": {"data": {"path": "data.json"}, **stage}},
    }
    (directory / "first.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    (directory / "first.txt").write_text(run("finetune", str(directory / "first.yaml")), encoding="utf-8")
    recipe |= {"name": "second", "output_dir": "second", "start_from": "first/instruct"}
    recipe["evaluation"] = {
        "data": {"path": "test.json"},
        "max_new_tokens": 3,
        "by": ["patient"],
        "base_questions": 6,
        "blind_questions": 4,
    }
    (directory / "second.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    (directory / "shown.txt").write_text(run("finetune", str(directory / "second.yaml")), encoding="utf-8")
    return directory


def test_a_run_ends_with_the_commands_for_its_artifact(project: Path) -> None:
    artifact = project / "first" / "instruct"
    assert (
        (project / "first.txt")
        .read_text(encoding="utf-8")
        .endswith(
            f"Next:\n  lora-llava chat {artifact} --image IMAGE\n  lora-llava eval {artifact} --data FILE\n"
            f"  lora-llava merge {artifact} first-merged\n"
        )
    )
    # A recipe with an evaluation has done the second.
    assert "lora-llava eval" not in (project / "shown.txt").read_text(encoding="utf-8")


def test_k13_every_answered_turn_is_asked_and_the_rest_counted(project: Path) -> None:
    figures = read(project / "second" / "evaluation" / "accuracy.json")
    # Of twelve records six have two answers, three a third question without one, three no answer.
    assert (figures["records"], figures["questions"]) == (12, 18)
    assert figures["passed_over"] == {"records_without_an_answer": 3, "last_questions_without_an_answer": 3}
    assert "3 of 12 records have no answer" in (project / "shown.txt").read_text(encoding="utf-8")
    rows = read(project / "second" / "evaluation" / "predictions.jsonl")
    assert [(row["question"], row["turn"]) for row in rows[:2]] == [("color?", 1), ("is it red?", 2)]


def test_k37_base_start_and_result_stand_beside_each_other(project: Path) -> None:
    figures = read(project / "second" / "evaluation" / "accuracy.json")
    for name, count in (("base", 6), ("start", 18), ("tuned", 18), ("majority", 18)):
        assert figures[name]["questions"] == count
        assert figures[name]["low"] <= figures[name]["accuracy"] <= figures[name]["high"]
    shown = " ".join((project / "shown.txt").read_text(encoding="utf-8").split())
    assert re.search(r"tuned against the start: [+-]\d+\.\d points \(95 % interval", shown)
    rows = read(project / "second" / "evaluation" / "predictions.jsonl")
    # What the start answers here is what it answers by itself.
    loaded, manifest = load_artifact(project / "first" / "instruct", device=torch.device("cpu"), dtype=torch.float32)
    asked = load_questions(DataSettings(path=str(project / "test.json"))).questions
    alone = generate_answers(
        loaded,
        [question.record for question in asked],
        PromptFormat(get_template(**manifest.template), "pad"),
        max_new_tokens=3,
    )
    assert [row["start"]["prediction"] for row in rows] == alone


def test_k68_the_base_is_asked_a_sample_and_compared_on_it(project: Path) -> None:
    figures = read(project / "second" / "evaluation" / "accuracy.json")
    assert figures["comparisons"]["tuned_over_base"]["questions"] == 6
    assert figures["tuned_on_base_questions"]["questions"] == 6
    rows = read(project / "second" / "evaluation" / "predictions.jsonl")
    asked = [row["image"] for row in rows if "base" in row]
    assert len(asked) == 6
    assert len(set(asked)) == 3, "whole images"
    assert "base (6)" in (project / "shown.txt").read_text(encoding="utf-8")


def test_k38_own_keys_and_folders_reach_the_predictions(project: Path) -> None:
    rows = read(project / "second" / "evaluation" / "predictions.jsonl")
    assert (rows[0]["image"], rows[0]["patient"]) == ("ward/0.png", "p0")
    by = read(project / "second" / "evaluation" / "accuracy.json")["by"]["patient"]
    assert sum(value["tuned"]["questions"] for value in by.values()) == 18
    assert set(by) == {"p0", "p1"}


def test_k38_eval_by_a_key_and_a_key_that_is_not_there(project: Path, tmp_path: Path) -> None:
    artifact, data = (
        str(project / "second" / "instruct"),
        ["--data", str(project / "test.json"), "--max-new-tokens", "2"],
    )
    shown = run("eval", artifact, *data, "--by", "patient", "--no-base", "--output", str(tmp_path / "a"))
    assert "by patient" in shown
    refused = CliRunner().invoke(cli, ["eval", artifact, *data, "--by", "patiet", "--output", str(tmp_path / "b")])
    assert refused.exit_code == 1
    assert "Did you mean patient?" in refused.stderr
    assert not (tmp_path / "b").exists()


def test_k13_references_that_cannot_match_are_said_before_anything_is_asked(project: Path, tmp_path: Path) -> None:
    write_data(project, "long.json")
    records = read(project / "long.json")
    for record in records:
        record["conversations"][1:] = [{"from": "gpt", "value": "one two three four five six"}]
    (project / "long.json").write_text(json.dumps(records), encoding="utf-8")
    args = ["--data", str(project / "long.json"), "--max-new-tokens", "2", "--no-base", "--output", str(tmp_path / "a")]
    shown = " ".join(run("eval", str(project / "second" / "instruct"), *args).split())
    assert shown.index("12 of 12 references are longer than max_new_tokens 2") < shown.index("answers, tuned:")
    assert "Token F1 in %" in shown
    assert read(tmp_path / "a" / "accuracy.json")["metric"] == "token_f1"
    assert all(
        "cut" in row["tuned"] for row in read(tmp_path / "a" / "predictions.jsonl") if row["tuned"]["prediction"]
    )


def test_eval_takes_a_start(project: Path, tmp_path: Path) -> None:
    args = ["--data", str(project / "test.json"), "--max-new-tokens", "3", "--no-base", "--metric", "vqa_v2"]
    args += ["--start", str(project / "first" / "instruct"), "--output", str(tmp_path / "a")]
    assert "VQA v2" in run("eval", str(project / "second" / "instruct"), *args)
    before = read(project / "second" / "evaluation" / "predictions.jsonl")
    after = read(tmp_path / "a" / "predictions.jsonl")
    assert [row["start"]["prediction"] for row in after] == [row["start"]["prediction"] for row in before]
    assert [row["tuned"]["prediction"] for row in after] == [row["tuned"]["prediction"] for row in before]
