"""Answers out: equal to an evaluation's, in the order of the data, and the same file after any stop."""

from __future__ import annotations

import csv
import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from rich.console import Console

from lora_llava.cli import cli
from lora_llava.evaluation.run import evaluate
from lora_llava.generation import predict as module
from lora_llava.generation.journal import Journal
from lora_llava.shipping.merge.run import merge_artifact
from tests.helpers.artifacts import make_artifact

COLORS = {"red": (250, 0, 0), "blue": (0, 0, 250), "green": (0, 250, 0)}
TEXTS = ("what color is it?", "what is it?", "is it red?")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    return make_artifact(tiny_base, tmp_path_factory.mktemp("predict") / "instruct")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with questions in three forms, in which questions about one image are not neighbors."""
    monkeypatch.chdir(tmp_path)
    records, lines = [], ["image,question,answer,id,=site"]
    for text in TEXTS:
        for name, color in COLORS.items():
            Image.new("RGB", (20, 20), color).save(tmp_path / f"{name}.png")
            turns = [{"from": "human", "value": f"<image>\n{text}"}, {"from": "gpt", "value": name}]
            records.append({"image": f"{name}.png", "conversations": turns, "site": "-1+1", "dose": 0.5})
            lines.append(f"{name}.png,{text},,p{len(lines)},@1")
    records.append({"conversations": [{"from": "human", "value": "what is it?"}]})
    Path("ask.json").write_text(json.dumps(records), encoding="utf-8")
    Path("ask.csv").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def predict(artifact: Path, *options: object, data: str = "ask.json", output: str = "out.jsonl") -> Result:
    command = ["predict", str(artifact), "--data", data, "--output", output, "--max-new-tokens", "6", "--max-rows", "2"]
    return CliRunner().invoke(cli, [*command, *map(str, options)])


def rows(name: str = "out.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]


def table(name: str) -> list[dict[str, str]]:
    with Path(name).open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_answers_are_those_of_an_evaluation(artifact: Path, data: Path) -> None:
    result = predict(artifact)
    assert result.exit_code == 0, result.output
    assert "10 answers in out.jsonl" in result.output
    settings = {"data": {"path": "ask.json"}, "max_new_tokens": 6}
    evaluate(artifact, settings, "evaluation", console=Console(quiet=True), compare_base=False)
    theirs = rows("evaluation/predictions.jsonl")
    ours = rows()
    assert [row["prediction"] for row in ours[:9]] == [row["tuned"]["prediction"] for row in theirs]
    assert [row["cut"] for row in ours[:9]] == [row["tuned"].get("cut", False) for row in theirs]
    assert [row["image"] for row in ours] == ["red.png", "blue.png", "green.png"] * 3 + [None]
    assert list(ours[0]) == ["id", "image", "question", "reference", "site", "dose", *module.FIELDS]
    assert (ours[0]["reference"], ours[0]["site"], ours[0]["dose"]) == ("red", "-1+1", 0.5)
    assert "reference" not in ours[9]
    assert len({row["prediction"] for row in ours}) > 3
    for row in ours:
        assert row["logprob_sum"] < 0
        assert row["logprob_mean"] == pytest.approx(row["logprob_sum"] / row["tokens"], abs=2e-6)
    assert sorted(path.name for path in data.glob("out*")) == ["out.jsonl"]


def test_a_table_keeps_its_columns_and_is_safe_in_a_spreadsheet(artifact: Path, data: Path) -> None:
    columns = ("--columns", "image=image,question=question")
    assert predict(artifact, *columns, data="ask.csv", output="out.csv").exit_code == 0
    assert predict(artifact, output="json.csv").exit_code == 0
    ours = table("out.csv")
    assert list(ours[0]) == ["id", "image", "question", "answer", "data_id", "'=site", *module.FIELDS]
    assert [row["data_id"] for row in ours] == [f"p{number}" for number in range(1, 10)]
    assert {row["'=site"] for row in ours} == {"'@1"}
    same = [(row["prediction"], row["logprob_sum"]) for row in table("json.csv")]
    assert [(row["prediction"], row["logprob_sum"]) for row in ours] == same[:9]
    assert {row["site"] for row in table("json.csv")} == {"'-1+1", ""}


def test_a_folder_is_asked_one_question(artifact: Path, data: Path, tiny_base: Path) -> None:
    merge_artifact(artifact, data / "merged", base_model=str(tiny_base))
    command = ["--images", ".", "--question", TEXTS[1], "--max-new-tokens", "6"]
    Path("notes.txt").write_text("no image")
    for model, output in ((artifact, "ours.csv"), (data / "merged", "merged.csv")):
        result = CliRunner().invoke(cli, ["predict", str(model), "--output", output, *command])
        assert result.exit_code == 0, result.output
        assert "left out, as no images: " in result.output
    assert predict(artifact).exit_code == 0
    known = {row["image"]: row["prediction"] for row in rows() if row["question"] == TEXTS[1]}
    ours = [(row["id"], row["image"], row["prediction"]) for row in table("ours.csv")]
    assert ours == [(name, name, known[name]) for name in ("blue.png", "green.png", "red.png")]
    assert [(row["id"], row["image"], row["prediction"]) for row in table("merged.csv")] == ours


def stopped_after(patch: pytest.MonkeyPatch, count: int, error: BaseException) -> list[int]:
    """Raise `error` instead of adding batch `count`; return the sizes of the batches that are added."""
    added: list[int] = []
    add = Journal.add

    def watched(self: Journal, answers: Any) -> None:
        if len(added) == count:
            raise error
        added.append(len(answers))
        add(self, answers)

    patch.setattr(Journal, "add", watched)
    return added


def test_a_stopped_prediction_continues_to_the_same_file(
    artifact: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        whole = stopped_after(patch, 99, KeyboardInterrupt())
        assert predict(artifact, output="whole.jsonl").exit_code == 0
    assert sum(whole) == 10
    assert len(whole) > 4
    for count in range(len(whole)):
        with monkeypatch.context() as patch:
            stopped_after(patch, count, KeyboardInterrupt())
            result = predict(artifact)
        assert result.exit_code == 130
        assert not Path("out.jsonl").exists()
        assert Path("out.jsonl.partial").exists() == (count > 0)
        state = f"stopped: {sum(whole[:count])} of 10 answers are in out.jsonl.partial; the same command continues"
        assert (state in result.output) == (count > 0)
        with monkeypatch.context() as patch:
            rest = stopped_after(patch, 99, KeyboardInterrupt())
            assert predict(artifact).exit_code == 0
        assert rest == whole[count:], "no answer is computed twice"
        assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
        assert not Path("out.jsonl.partial").exists()
        Path("out.jsonl").unlink()


def begin(artifact: Path, patch: pytest.MonkeyPatch, count: int = 2) -> None:
    """Leave the journal of a prediction that was stopped."""
    with patch.context() as inner:
        stopped_after(inner, count, KeyboardInterrupt())
        assert predict(artifact).exit_code == 130


def test_answers_of_another_model_or_data_are_not_mixed(
    artifact: Path, data: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(artifact, monkeypatch)
    other = make_artifact(tiny_base, data / "other", kind="rslora")
    for named, model, options in (
        ("the model", other, ()),
        ("the questions", artifact, ("--answer-prompt", "One word.")),
        ("max_new_tokens 6, now 7", artifact, ("--max-new-tokens", 7)),
        ("max_rows 2, now 3", artifact, ("--max-rows", 3)),
    ):
        result = predict(model, *options)
        assert result.exit_code == 2
        assert f"out.jsonl.partial has the first answers of another prediction; these differ: {named}" in result.output
    records = json.loads(Path("ask.json").read_text(encoding="utf-8"))
    records[0]["dose"] = 1
    Path("ask.json").write_text(json.dumps(records), encoding="utf-8")
    assert "these differ: the other columns. " in predict(artifact).output
    Path("out.jsonl.partial").unlink()
    assert predict(artifact).exit_code == 0
    result = predict(artifact)
    assert result.exit_code == 2
    assert "out.jsonl already exists and is not overwritten" in result.output


def test_a_damaged_image_stops_and_only_what_changed_is_asked_again(
    artifact: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert predict(artifact, output="whole.jsonl").exit_code == 0
    content = Path("green.png").read_bytes()
    Path("green.png").write_bytes(content[:40])
    result = predict(artifact)
    assert result.exit_code == 1
    assert "green.png: not an image of a known format" in result.output
    assert "answers are in out.jsonl.partial; the same command continues" in result.output
    Path("green.png").write_bytes(content)
    # Another image than the one that was answered.
    shutil.copy("blue.png", "red.png")
    with monkeypatch.context() as patch:
        added = stopped_after(patch, 99, KeyboardInterrupt())
        assert predict(artifact).exit_code == 0
    assert 3 < sum(added) < 10
    answers = {(row["image"], row["question"]): row["prediction"] for row in rows()}
    expected = {(row["image"], row["question"]): row["prediction"] for row in rows("whole.jsonl")}
    for text in TEXTS:
        assert answers["green.png", text] == expected["green.png", text]
        assert answers["red.png", text] == answers["blue.png", text] == expected["blue.png", text]


def test_a_full_disk_at_the_end_costs_no_answer(artifact: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_table", full)
        result = predict(artifact)
    assert result.exit_code == 1
    assert "The answers stay in out.jsonl.partial" in result.output
    assert not Path("out.jsonl").exists()
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_to_ask", None)
        assert predict(artifact).exit_code == 0, "nothing is left to ask"
    assert len(rows()) == 10


def test_bad_records_stop_or_are_listed(artifact: Path, data: Path) -> None:
    records = json.loads(Path("ask.json").read_text(encoding="utf-8"))
    records[1]["image"] = "gone.png"
    records[2]["conversations"] = 5
    Path("ask.json").write_text(json.dumps(records), encoding="utf-8")
    result = predict(artifact)
    assert result.exit_code == 1
    assert "ask.json, record 3: conversations: is a number" in result.output
    assert list(data.glob("out*")) == []
    result = predict(artifact, "--on-bad-record", "skip")
    assert result.exit_code == 0
    assert (
        "2 records left out, listed in out.jsonl.skipped.jsonl: ask.json, record 2: image: 'gone.png'" in result.output
    )
    assert [row["record"] for row in rows("out.jsonl.skipped.jsonl")] == [2, 3]
    assert len(rows()) == 8
    Path("out.jsonl").unlink()
    assert "out.jsonl.skipped.jsonl already exists" in predict(artifact, "--on-bad-record", "skip").output
    assert (
        "more than max_bad_records 1"
        in predict(artifact, "--on-bad-record", "skip", "--max-bad-records", 1, output="b.csv").output
    )


def test_the_only_split_of_a_directory_is_asked(artifact: Path, data: Path) -> None:
    rows_of_table = [{"image": f"{name}.png", "question": "what color is it?"} for name in COLORS]
    Path("set").mkdir()
    pq.write_table(pa.Table.from_pylist(rows_of_table), "set/train.parquet")
    options = ("--columns", "image=image,question=question", "--image-root", ".")
    result = predict(artifact, *options, data="set")
    assert result.exit_code == 0, result.output
    assert "Note: the questions are those of train, the only split of set" in result.output
    assert [row["image"] for row in rows()] == [f"{name}.png" for name in COLORS]
    # With two, the command does not choose, but says how to.
    pq.write_table(pa.Table.from_pylist(rows_of_table), "set/validation.parquet")
    for arguments in ([], ["--split", "tset"]):
        result = predict(artifact, *options, *arguments, data="set", output="other.jsonl")
        assert result.exit_code == 1
        assert "it has train, validation. Name one of them: in a recipe with split, in a command with --split" in (
            " ".join(result.output.split())
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "out.csv"], "give --data, or --images with --question"),
        (["--output", "out.csv", "--data", "a.json", "--images", "."], "give --data, or --images with --question"),
        (["--output", "out.csv", "--data", "a.json", "--question", "a?"], "--question goes with --images"),
        (["--output", "out.csv", "--images", "."], "--question goes with --images"),
        (["--output", "out.xlsx", "--data", "ask.json"], "output out.xlsx: its name must end in .csv or .jsonl"),
        (["--output", "ask.csv", "--data", "ask.json"], "ask.csv already exists and is not overwritten"),
        (["--output", "ask.csv/x.csv", "--data", "ask.json"], "is not a directory; give another name"),
        (["--output", "out.csv", "--data", "ask.csv"], "ask.csv: columns: is missing; it has image, question, answer"),
        (["--output", "out.csv", "--data", "ask.csv", "--columns", "image=image"], "--columns: give question, or"),
        (["--output", "out.csv", "--images", ".", "--question", " "], "write a text without <image>"),
        (["--output", "out.csv", "--images", "gone", "--question", "a?"], "gone: does not exist"),
    ],
)
def test_a_command_line_that_cannot_work_is_refused(
    artifact: Path, data: Path, options: list[str], message: str
) -> None:
    result = CliRunner().invoke(cli, ["predict", str(artifact), *options])
    assert result.exit_code in (1, 2)
    assert message in result.output
    assert list(data.glob("out*")) == []
