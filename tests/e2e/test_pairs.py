"""`lora-llava pairs`: a file that loads as preference data, the same for the same seed."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from PIL import Image

from lora_llava.artifact import load_model
from lora_llava.cli import cli
from lora_llava.data.images.read import open_image
from lora_llava.data.load import load_records
from lora_llava.data.questions import load_questions
from lora_llava.evaluation.pairs import is_wrong
from lora_llava.generation.answers import generate_answers
from lora_llava.generation.asking import prompt_format
from lora_llava.recipe.stages import DataSettings
from tests.helpers.artifacts import CPU, make_artifact
from tests.helpers.tiny import EOS_ID

COLORS = {"red": (250, 0, 0), "blue": (0, 0, 250), "green": (0, 250, 0)}
TEXTS = ("what color is it?", "what is it?", "is it red?")
PROMPT = "One word."


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """An artifact whose answers end after a few tokens: a third of the vocabulary ends one."""
    directory = tmp_path_factory.mktemp("pairs")
    base = Path(shutil.copytree(tiny_base, directory / "base"))
    path = base / "generation_config.json"
    ends = {**json.loads(path.read_text(encoding="utf-8")), "eos_token_id": [EOS_ID, *range(100, 200)]}
    path.write_text(json.dumps(ends), encoding="utf-8")
    return make_artifact(base, directory / "instruct")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    records: list[dict[str, Any]] = []
    (tmp_path / "data" / "b").mkdir(parents=True)
    for name, color in COLORS.items():
        Image.new("RGB", (20, 20), color).save(tmp_path / "data" / "b" / f"{name}.png")
        turns = [
            {"from": speaker, "value": value}
            for index, text in enumerate(TEXTS)
            for speaker, value in (("human", text if index else f"<image>\n{text}"), ("gpt", name))
        ]
        records.append(
            {"id": f"r-{name}", "image": f"b/{name}.png", "conversations": turns, "patient": name, "kind": 5}
        )
    Path("data/train.json").write_text(json.dumps(records), encoding="utf-8")
    return tmp_path


def pairs(artifact: Path, *options: object, output: str = "pairs.json", data: str = "data/train.json") -> Result:
    command = ["pairs", str(artifact), "--data", data, "--output", output, "--max-rows", "4", "--max-new-tokens", "12"]
    return CliRunner().invoke(cli, [*command, *map(str, options)])


def written(name: str = "pairs.json") -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = json.loads(Path(name).read_text(encoding="utf-8"))
    return records


def settings(**more: Any) -> DataSettings:
    return DataSettings.model_validate({"path": "pairs.json", "image_root": "data", **more})


ALL = ("--other-image", 1, "--samples", 6, "--per-question", 2, "--answer-prompt", PROMPT)


def test_the_file_loads_as_preference_data(artifact: Path, data: Path) -> None:
    result = pairs(artifact, *ALL)
    assert result.exit_code == 0, result.output
    assert "to train on them: stages.prefer.data: {path: pairs.json, image_root: data}" in result.output
    records = load_records(settings(group="patient", answer_prompt=PROMPT))
    originals = load_questions(DataSettings(path="data/train.json", answer_prompt=PROMPT, group="patient")).questions
    asked = {(question.record.id, question.number): question for question in originals}
    for record, entry in zip(records, written(), strict=True):
        name, number, kind = record.id.split("/")[:3]
        question = asked[name, int(number)]
        # As in the data, with the text that the settings append, once.
        assert record.turns == question.record.turns
        assert record.image is not None
        assert record.image.label == f"b/{name[2:]}.png"
        assert (record.group, entry["kind"], entry["data_kind"]) == (name[2:], kind, 5)
        assert record.rejected
        assert is_wrong("exact_match", question, record.rejected)
        assert record.rejected != record.turns[-1].text
    assert len({record.id for record in records}) == len(records)
    counts = [sum(entry["kind"] == kind for entry in written()) for kind in ("sampled", "other_image")]
    assert min(counts) > 0
    kinds = f"{counts[0]} of wrong samples, {counts[1]} of answers to another image"
    assert f"{len(records)} pairs in pairs.json: {kinds}" in result.output


def test_the_same_seed_gives_the_same_pairs_in_any_batches(artifact: Path, data: Path) -> None:
    files = []
    for name, options in {"a": (), "b": ("--max-rows", 3), "c": ("--seed", 7), "d": ("--temperature", 3)}.items():
        assert pairs(artifact, *ALL, *options, output=f"{name}.json").exit_code == 0
        files.append(Path(f"{name}.json").read_text(encoding="utf-8"))
    assert files[0] == files[1]
    assert len(set(files)) == 3
    # A question's answers do not depend on the questions before it.
    records = json.loads(Path("data/train.json").read_text(encoding="utf-8"))
    Path("data/train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records[:2]), encoding="utf-8")
    command = (*ALL, "--other-image", 0)
    assert pairs(artifact, *command, output="whole.json").exit_code == 0
    assert pairs(artifact, *command, data="data/train.jsonl", output="part.json").exit_code == 0
    assert written("part.json") == [entry for entry in written("whole.json") if entry["patient"] != "green"]


def test_hard_negatives_are_the_answers_to_the_image_of_others(artifact: Path, data: Path) -> None:
    assert pairs(artifact, "--other-image", 1, "--samples", 1).exit_code == 0
    loaded, usage = load_model(artifact, device=CPU)
    hard = [entry for entry in written() if entry["kind"] == "other_image"]
    assert hard
    # Earlier answers describe a question's own image.
    assert {entry["id"].split("/")[1] for entry in hard} == {"1"}
    for entry in hard:
        answers = []
        for image in sorted({"red", "blue", "green"} - {entry["patient"]}):
            Path("one.json").write_text(json.dumps([{**entry, "image": f"b/{image}.png"}]), encoding="utf-8")
            records = load_records(settings(path="one.json"))
            answers += generate_answers(loaded, records, prompt_format(usage, artifact), max_new_tokens=12)
        assert entry["rejected"] in answers
    assert pairs(artifact, "--other-image", 0, "--samples", 6, output="none.json").exit_code == 0
    assert {entry["kind"] for entry in written("none.json")} == {"sampled"}


def test_embedded_images_are_written_into_the_file(artifact: Path, data: Path) -> None:
    records = json.loads(Path("data/train.json").read_text(encoding="utf-8"))
    for record in records:
        content = base64.b64encode(Path("data", record["image"]).read_bytes()).decode()
        record["image"] = f"data:image/png;base64,{content}"
    Path("data/inside.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    result = pairs(artifact, "--samples", 6, data="data/inside.jsonl", output="pairs.jsonl")
    assert result.exit_code == 0, result.output
    assert "stages.prefer.data: {path: pairs.jsonl}" in result.output
    for record in load_records(settings(path="pairs.jsonl", group="patient")):
        assert record.image is not None
        assert open_image(record.image).getpixel((3, 3)) == COLORS[str(record.group)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--temperature", 0), "is not in the range"),
        (("--temperature", "nan"), "is not a number"),
        (("--other-image", "nan"), "is not a number"),
        (("--other-image", 1.5), "is not in the range"),
        (("--samples", 0), "is not in the range"),
        (("--columns", "image=image,question=question"), "give question and answer"),
        (("--max-new-tokens", 1), "none of 9 questions gave a pair: 0 were answered right each time"),
    ],
)
def test_what_cannot_work_is_refused(artifact: Path, data: Path, options: tuple[object, ...], message: str) -> None:
    result = pairs(artifact, *options)
    assert result.exit_code in (1, 2)
    assert message in result.output
    assert not Path("pairs.json").exists()


def test_an_output_is_not_overwritten(artifact: Path, data: Path) -> None:
    Path("pairs.json").write_text("mine")
    assert "already exists and is not overwritten" in pairs(artifact).output
    assert "its name must end in .json or .jsonl" in pairs(artifact, output="pairs.csv").output
    assert Path("pairs.json").read_text() == "mine"


def test_stage_prefer_trains_on_the_pairs(artifact: Path, data: Path) -> None:
    assert pairs(artifact, *ALL).exit_code == 0
    recipe = {
        "version": 1,
        "name": "pairs",
        "output_dir": "run",
        "base": {"model_name_or_path": str(artifact.parent / "base")},
        "quantization": {"type": "none"},
        "adapter": {"r": 4, "lora_alpha": 8},
        "start_from": str(artifact),
        "stages": {
            "prefer": {
                "data": {"path": "pairs.json", "image_root": "data", "group": "patient", "answer_prompt": PROMPT},
                "learning_rate": 1e-3,
                "batch_size": 4,
                "logging_steps": 1,
                "num_sample_answers": 0,
                "dataloader_num_workers": 0,
            }
        },
    }
    Path("prefer.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    result = CliRunner().invoke(cli, ["finetune", "prefer.yaml"])
    assert result.exit_code == 0, result.output
    assert (data / "run" / "prefer" / "manifest.json").is_file()
    manifest = json.loads((data / "run" / "prefer" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["data"]["records"] == len(written())
    assert manifest["data"]["answer_prompt"] == PROMPT
