"""finetune, eval and chat through the command line, on a tiny base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from PIL import Image

from lora_llava.artifact import load_artifact
from lora_llava.cli import cli
from lora_llava.conversation.templates import get_template
from lora_llava.data.load import load_records
from lora_llava.generation.answers import PromptFormat, generate_answers
from lora_llava.modeling.base import BaseIdentity, load_base
from lora_llava.recipe.stages import DataSettings

COLOURS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}
QUESTIONS = 9


def run(*args: str) -> Result:
    result = CliRunner().invoke(cli, list(args))
    assert result.exit_code == 0, result.output
    return result


def write_data(directory: Path, count: int) -> None:
    """Write images of one colour, three questions each."""
    records = []
    for number in range(count // 3):
        name, colour = list(COLOURS.items())[number % 3]
        Image.new("RGB", (20, 20), colour).save(directory / f"{number}.png")
        for place, (question, answer) in enumerate([("color?", name), ("is it red?", "yes"), ("how many?", "1")]):
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
            records.append({"id": f"{number}-{place}", "image": f"{number}.png", "conversations": turns})
    (directory / "data.json").write_text(json.dumps(records), encoding="utf-8")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """The directory of a run with both stages and an evaluation."""
    directory = tmp_path_factory.mktemp("commands")
    write_data(directory, QUESTIONS)
    stage = {"max_length": 256, "tokens_per_micro_batch": 256, "batch_size": 9, "logging_steps": 1}
    recipe = {
        "name": "tiny",
        "output_dir": "run",
        "base": {"model_name_or_path": str(tiny_base)},
        "quantization": {"type": "none"},
        "adapter": {"r": 4, "lora_alpha": 8.0},
        "stages": {
            "align": {"data": {"path": "data.json"}, **stage},
            "instruct": {"data": {"path": "data.json"}, **stage},
        },
        "evaluation": {"data": {"path": "data.json"}, "max_new_tokens": 3, "blind_questions": 4},
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    result = run("finetune", str(directory / "recipe.yaml"))
    assert "answers, tuned: 9/9" in result.output
    assert "samples.png" in result.output
    return directory / "run"


def test_the_summary_holds_the_evaluation(trained: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text(encoding="utf-8"))
    evaluation = summary["evaluation"]
    assert (evaluation["questions"], evaluation["images"]) == (QUESTIONS, 3)
    for name, count in (("base", 9), ("tuned", 9), ("blind", 6), ("tuned_on_blind_questions", 6)):
        one = evaluation[name]
        assert one["questions"] == count
        assert 0 <= one["low"] <= one["accuracy"] <= one["high"] <= 1
        assert set(one["by_type"]) == {"closed", "open", "yes/no", "number", "other"}
    assert set(summary["seconds"]) == {"base", "align", "instruct", "evaluation"}
    peaks = summary["peak_memory_bytes_by_phase"]
    assert peaks.keys() == summary["seconds"].keys()
    assert summary["peak_memory_bytes"] == max(peaks.values())
    assert (peaks["align"], peaks["instruct"]) == tuple(
        summary[name]["peak_memory_bytes"] for name in ("align", "instruct")
    )
    assert json.loads((trained / "evaluation" / "accuracy.json").read_text(encoding="utf-8")) == evaluation


def test_every_prediction_is_written(trained: Path) -> None:
    files = {path.name for path in (trained / "evaluation").iterdir()}
    assert files == {"accuracy.json", "predictions.jsonl", "samples.png"}
    lines = (trained / "evaluation" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["id"] for row in rows] == [f"{number}-{place}" for number in range(3) for place in range(3)]
    assert [row["image"] for row in rows[:4]] == ["0.png", "0.png", "0.png", "1.png"]
    assert [("blind" in row) for row in rows] == [True] * 6 + [False] * 3
    assert all({"base", "tuned"} <= set(row) for row in rows)


def test_eval_repeats_the_evaluation(trained: Path, tmp_path: Path) -> None:
    args = ["--data", str(trained.parent / "data.json"), "--max-new-tokens", "3", "--output", str(tmp_path / "new")]
    run("eval", str(trained / "instruct"), *args)
    before = json.loads((trained / "evaluation" / "accuracy.json").read_text(encoding="utf-8"))
    after = json.loads((tmp_path / "new" / "accuracy.json").read_text(encoding="utf-8"))
    assert {name: after[name] for name in ("base", "tuned")} == {name: before[name] for name in ("base", "tuned")}
    assert "blind" not in after


def test_eval_without_the_base(trained: Path, tmp_path: Path) -> None:
    args = ["--data", str(trained.parent / "data.json"), "--no-base", "--max-records", "2", "--max-new-tokens", "2"]
    run("eval", str(trained / "instruct"), *args, "--output", str(tmp_path / "new"))
    result = json.loads((tmp_path / "new" / "accuracy.json").read_text(encoding="utf-8"))
    assert result["questions"] == 2
    assert "base" not in result
    assert (tmp_path / "new" / "samples.png").is_file()


def test_chat_prints_answers_alone(trained: Path) -> None:
    image = str(trained.parent / "0.png")
    options = ["chat", str(trained / "instruct"), "--image", image, "--max-new-tokens", "4"]
    once = run(*options, "color?")
    talk = CliRunner().invoke(cli, options, input="color?\nis it red?\n\nnever asked\n")
    assert talk.exit_code == 0, talk.output
    assert talk.stdout.startswith(once.stdout)
    assert len(once.stdout) > 0


def test_chat_names_a_missing_image_before_it_loads_a_model(trained: Path) -> None:
    for name, hint in (("nowhere.png", "Correct the path."), ("recipe.yml", "Did you mean")):
        options = ["chat", str(trained / "instruct"), "--image", str(trained / name), "color?"]
        result = CliRunner().invoke(cli, options)
        assert result.exit_code == 1
        assert f"Error: --image {trained / name} does not exist. {hint}" in result.stderr


def test_a_second_run_needs_overwrite(trained: Path) -> None:
    result = CliRunner().invoke(cli, ["finetune", str(trained.parent / "recipe.yaml")])
    assert result.exit_code == 2
    assert "--overwrite" in result.stderr


def test_the_base_is_asked_as_it_was(trained: Path, tiny_base: Path) -> None:
    """Without its adapter, and with its own projector, the tuned model answers as the untouched base does."""
    device, dtype = torch.device("cpu"), torch.float32
    loaded, manifest = load_artifact(trained / "instruct", device=device, dtype=dtype)
    records = load_records(DataSettings(path=str(trained.parent / "data.json")))
    asked = {"form": PromptFormat(get_template(**manifest.template), "pad"), "max_new_tokens": 3}
    identity = BaseIdentity("tiny", None, "")
    base = load_base(tiny_base, identity, nf4=False, double_quant=False, dtype=dtype, device=device)
    rows = (trained / "evaluation" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    ours = [json.loads(row)["base"]["prediction"] for row in rows]
    assert ours == generate_answers(base, records, **asked)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "modules_to_save" in name or "lora_B" in name:
                parameter.add_(1.0)
    with loaded.model.disable_adapter():
        assert generate_answers(loaded, records, **asked) == ours


def test_k37_a_start_that_trained_on_captions_is_asked_questions_too(trained: Path, tmp_path: Path) -> None:
    args = ["--data", str(trained.parent / "data.json"), "--max-new-tokens", "3", "--start", str(trained / "align")]
    run("eval", str(trained / "instruct"), *args, "--output", str(tmp_path / "new"))
    lines = (tmp_path / "new" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    loaded, _ = load_artifact(trained / "align", device=torch.device("cpu"), dtype=torch.float32)
    records = load_records(DataSettings(path=str(trained.parent / "data.json")))
    asked = {"form": PromptFormat(get_template("vicuna_v1"), "pad"), "max_new_tokens": 3}
    assert [row["start"]["prediction"] for row in rows] == generate_answers(loaded, records, **asked)
    before = (trained / "evaluation" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [row["tuned"] for row in rows] == [json.loads(line)["tuned"] for line in before]
