"""An evaluation of several sources: what is asked, what is refused, and when it is made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lora_llava.artifact import Usage
from lora_llava.data.questions import Question, load_questions
from lora_llava.data.record import ImageSource, Record
from lora_llava.errors import DataError, RecipeError
from lora_llava.evaluation.identity import differing_facts, evaluation_facts
from lora_llava.evaluation.outcome import TUNED, Answers, Outcome, prediction_rows, score_all, summarize
from lora_llava.evaluation.sample import blind_subset
from lora_llava.formats.names import WEIGHTS
from lora_llava.generation.asking import as_trained
from lora_llava.recipe.file import load_recipe
from lora_llava.recipe.settings import EvaluationSettings
from lora_llava.recipe.stages import DataSettings

RECIPE = """
name: two
base: {model_name_or_path: some/llava}
stages: {instruct: {data: {path: a.json}}}
evaluation: {data: [{path: a.json}, {path: b.json, source: ours}]}
"""


def row(number: int, answer: str, **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"{number}?"}, {"from": "gpt", "value": answer}]
    return {"id": str(number), "conversations": turns, **more}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.json").write_text(json.dumps([row(number, "yes", source="column") for number in range(3)]))
    (tmp_path / "b.json").write_text(json.dumps([row(number, "no", ward="2") for number in range(2)]))
    (tmp_path / "open.json").write_text(json.dumps([row(number, "") for number in range(2)]))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / WEIGHTS).write_bytes(b"weights")
    return tmp_path


def settings(folder: Path, *sources: dict[str, Any]) -> DataSettings:
    data = [{**source, "path": str(folder / source["path"])} for source in sources]
    return EvaluationSettings.model_validate({"data": data}).data


def test_each_source_is_asked_and_named(folder: Path) -> None:
    asked = load_questions(settings(folder, {"path": "a.json"}, {"path": "b.json", "source": "ours"}), ["ward"])
    assert asked.num_records == 5
    names = [question.record.source for question in asked.questions]
    assert names == ["a.json"] * 3 + ["ours"] * 2
    # A single source is not named, and a column of the data keeps its name.
    alone = load_questions(settings(folder, {"path": "a.json"}))
    assert {question.record.source for question in alone.questions} == {""}
    assert alone.questions[0].described("answer", (), ())["source"] == "column"
    assert asked.questions[0].described("answer", (), ())["source"] == "a.json"
    assert asked.questions[0].described("answer", (), ())["data_source"] == "column"


def test_figures_of_the_sources_add_up(folder: Path) -> None:
    questions = load_questions(settings(folder, {"path": "a.json"}, {"path": "b.json"})).questions
    texts = ["yes", "no", "yes", "no", "yes"]
    answers = Answers(range(5), texts, score_all("exact_match", questions, texts))
    outcome = Outcome(questions, "exact_match", {TUNED: answers})
    by_source = summarize(outcome)["by_source"]
    assert {name: (one[TUNED]["correct"], one[TUNED]["questions"]) for name, one in by_source.items()} == {
        "a.json": (2, 3),
        "b.json": (1, 2),
    }
    assert [line["source"] for line in prediction_rows(outcome)] == ["a.json"] * 3 + ["b.json"] * 2
    of_one = Outcome(questions[:3], "exact_match", {TUNED: Answers(range(3), texts[:3], answers.scores[:3])})
    assert "by_source" not in summarize(of_one)


def test_a_source_without_any_answer_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"none of the 2 records of .*open\.json has an answer"):
        load_questions(settings(folder, {"path": "a.json"}, {"path": "open.json"}))


def test_a_key_must_be_in_one_of_the_sources(folder: Path) -> None:
    both = settings(folder, {"path": "a.json"}, {"path": "b.json"})
    assert {question.value("ward") for question in load_questions(both, ["ward"]).questions} == {"(none)", "2"}
    with pytest.raises(DataError, match=r"no record has the key or column 'wart'; .* Did you mean ward"):
        load_questions(both, ["wart"])


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ("[{path: a.json}, {path: b.json, weight: 2}]", r"data\.1\.weight: an evaluation asks each question once"),
        ("[{path: a.json, share: 0.2}, {path: b.json}]", r"data\.share: an evaluation asks each question once; remove"),
        ("{path: a.json, weight: 2}", r"data\.weight: an evaluation asks each question once; remove it"),
        ("[{path: a.json}, {path: b.json, merge_turns: 2}]", r"data\.1\.merge_turns applies to training only"),
        ("[{path: a.json, validation: {share: 0.1}}, {path: b.json}]", r"data\.validation applies to training only"),
        ("{path: a.json, source: x}", r"data\.source is for one of several sources; write data as a list of them"),
        ("[{path: a.json, source: x}, {path: b.json, source: x}]", r"source: two sources are named x; give each"),
        ("[{path: a.json}, {path: b.json, source: 'a/b'}]", r"data\.1\.source: must be a name of at most 40 letters"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_index(folder: Path, sources: str, message: str) -> None:
    text = RECIPE.replace("[{path: a.json}, {path: b.json, source: ours}]", sources)
    (folder / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(folder / "recipe.yaml")


def test_a_list_of_one_is_that_source(folder: Path) -> None:
    assert settings(folder, {"path": "a.json"}) == DataSettings(path=str(folder / "a.json"))
    with pytest.raises(ValidationError, match="valid dictionary"):
        EvaluationSettings.model_validate({"data": []})


def test_what_was_trained_fills_all_sources(folder: Path) -> None:
    usage = Usage.__new__(Usage)
    object.__setattr__(usage, "answer_prompt", "Briefly.")
    object.__setattr__(usage, "window", (0.0, 9.0))
    both = as_trained(settings(folder, {"path": "a.json"}, {"path": "b.json", "answer_prompt": "Own."}), usage)
    assert [source.answer_prompt for source in both.sources] == ["Briefly.", "Own."]
    assert [source.window for source in both.sources] == [[0.0, 9.0]] * 2


def test_it_is_made_again_if_a_source_or_its_name_changes_but_not_its_path(folder: Path) -> None:
    def facts(**changed: str) -> dict[str, Any]:
        text = (folder / "recipe.yaml").read_text()
        for old, new in changed.items():
            text = text.replace(old, new)
        (folder / "changed.yaml").write_text(text)
        recipe = load_recipe(folder / "changed.yaml")
        assert recipe.evaluation is not None
        return evaluation_facts(recipe, load_questions(recipe.evaluation.data), folder)

    before = json.loads(json.dumps(facts()))
    assert differing_facts(before, facts()) == []
    (folder / "b.json").rename(folder / "c.json")
    assert differing_facts(before, facts(**{"b.json": "c.json"})) == []
    renamed = differing_facts(before, facts(**{"b.json": "c.json", "ours": "theirs"}))
    assert renamed == ["evaluation.data (questions of each source)"]
    (folder / "c.json").write_text(json.dumps([row(0, "no")]))
    assert "evaluation.data (sha256 of the records)" in differing_facts(before, facts(**{"b.json": "c.json"}))


@pytest.mark.parametrize(("asked", "expected"), [(2, [0, 1, 4, 5]), (4, [0, 1, 4, 5]), (5, [0, 1, 2, 3, 4, 5, 6, 7])])
def test_each_source_has_its_part_of_the_questions_without_images(asked: int, expected: list[int]) -> None:
    """Four images of two questions each, the first two of one source, which alone give the first of all images."""

    def questions(*sources: str) -> list[Question]:
        images = [ImageSource(str(number), Path(f"/{number}.png"), None) for number in range(4)]
        return [
            Question(Record(str(number), images[number // 2], (), "", source=sources[number // 4]), ("yes",))
            for number in range(8)
        ]

    assert blind_subset(questions("a", "b"), asked) == expected
    # Where one has a single image, the other gives more.
    few = questions("a", "b")[2:]
    assert blind_subset(few, 6) == list(range(6))
    assert blind_subset(questions("", ""), asked) == list(range(2 * -(-asked // 2)))
