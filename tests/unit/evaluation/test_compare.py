"""The parts of the comparison that need no model."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lora_llava.conversation.encode import Turn
from lora_llava.data.questions import Question
from lora_llava.data.record import ImageSource, Record
from lora_llava.evaluation import compare
from lora_llava.evaluation.notes import outcome_notes, question_notes
from lora_llava.evaluation.outcome import Answers, Outcome, prediction_rows, score_all, summarize
from lora_llava.evaluation.sample import blind_subset, spread_subset, varied_samples
from lora_llava.evaluation.scoring.confusion import confusion
from lora_llava.evaluation.scoring.metrics import Metric, difference
from lora_llava.system.progress import Bar


def question(image: str | None, answer: str = "yes", **extra: Any) -> Question:
    source = None if image is None else ImageSource(image, Path(image), None)
    turns = (Turn("user", "<image>\n?"), Turn("assistant", answer))
    return Question(Record("id", source, turns, "here", extra=tuple(extra.items())), (answer,))


def outcome(references: list[str], tuned: list[str], metric: Metric = "exact_match", **others: list[str]) -> Outcome:
    """Make the outcome of answers to questions on two images; the others may have been asked the first ones only."""
    questions = [question(f"{number % 2}.png", answer, part=number % 3) for number, answer in enumerate(references)]
    answers = {
        name: Answers(range(len(texts)), texts, score_all(metric, questions[: len(texts)], texts))
        for name, texts in {**others, "tuned": tuned}.items()
    }
    return Outcome(questions, metric, answers)


def test_the_blind_subset_is_of_whole_images() -> None:
    questions = [question("a"), question("b"), question(None), question("a"), question("c"), question("b")]
    assert blind_subset(questions, 1) == [0, 3]
    assert blind_subset(questions, 2) == [0, 3]
    assert blind_subset(questions, 3) == [0, 1, 3, 5]
    assert blind_subset(questions, 100) == [0, 1, 3, 4, 5]


def test_k68_the_base_is_asked_whole_images_spread_over_the_set() -> None:
    questions = [question(str(number // 10)) for number in range(2000)]
    chosen = spread_subset(questions, 300)
    assert len(chosen) == 300
    images = [questions[place].image for place in chosen]
    assert len(set(images)) == 30
    assert all(images.count(image) == 10 for image in set(images))
    assert min(chosen) < 100
    assert max(chosen) > 1900
    assert spread_subset(questions, None) == spread_subset(questions, 5000) == list(range(2000))


def test_k68_the_sample_is_neither_too_small_nor_too_large() -> None:
    assert len(spread_subset([question(None)] * 1000, 300)) == 300
    assert len(spread_subset([question("one")] * 1000, 300)) == 300
    few = spread_subset([question("one")] * 900 + [question("two")] * 100, 300)
    assert 300 <= len(few) <= 600
    uneven = [question(str(number)) for number in range(100) for _ in range(1 + number % 7)]
    assert 100 <= len(spread_subset(uneven, 100)) <= 110


def test_samples_are_of_different_images_and_answers() -> None:
    questions = [question(str(number // 4), ("yes", "no", "red", "2")[number % 4]) for number in range(80)]
    chosen = varied_samples(questions, 12)
    assert len({questions[place].image for place in chosen}) == 12
    assert {questions[place].answer for place in chosen} == {"yes", "no", "red", "2"}
    assert chosen[-1] >= 72, "spread over the whole set"
    assert len(varied_samples(questions[:6], 12)) == 2
    assert varied_samples([question(None)], 12) == []
    assert set(varied_samples(questions, 12, among=[1, 2, 9])) <= {1, 2, 9}


def test_an_interruption_leaves_no_part_of_the_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "samples.png"
    path.write_bytes(b"the last one")

    def stopped(path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "contact_sheet", stopped)
    monkeypatch.setattr(compare, "open_image", lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        compare._write_samples(path, outcome(["yes"], ["no"]))
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("samples.png", b"the last one")]


def test_the_summary_counts_points_on_the_same_questions() -> None:
    truth = ["yes", "no", "red", "2"]
    made = outcome(truth, ["yes", "no", "red", "3"], base=["yes", "yes"], blind=["yes", "yes"])
    result = summarize(made)
    assert (result["questions"], result["images"], result["metric"]) == (4, 2, "exact_match")
    assert (result["tuned"]["accuracy"], result["base"]["accuracy"]) == (0.75, 0.5)
    assert (result["base"]["questions"], result["tuned_on_base_questions"]["accuracy"]) == (2, 1.0)
    assert result["points_gained"] == 50.0
    assert result["comparisons"]["tuned_over_base"]["questions"] == 2
    assert result["blind"]["accuracy"] == 0.5
    assert result["tuned_on_blind_questions"]["accuracy"] == 1.0
    assert result["points_gained_over_blind"] == 50.0
    assert result["tuned"]["by_type"]["closed"]["correct"] == 2
    assert isinstance(result["tuned"]["correct"], int)
    alone = summarize(outcome(truth, truth))
    assert not {"points_gained", "base", "blind", "start"} & set(alone)
    assert "tuned_on_base_questions" not in summarize(outcome(truth, truth, base=truth))


def test_k37_the_result_is_compared_with_its_start() -> None:
    truth = ["yes", "no"] * 30
    made = outcome(truth, ["yes"] * 60, base=["It is so."] * 60, start=truth)
    result = summarize(made)
    assert [result[name]["accuracy"] for name in ("base", "start", "tuned")] == [0, 1, 0.5]
    assert result["comparisons"]["tuned_over_start"]["points"] == -50
    first, *_ = outcome_notes(made, 16)
    assert first.startswith("tuned against the start: -50.0 points (95 % interval -6")
    assert first.endswith("on 60 questions: it got worse.")


def test_k64_the_majority_answer_stands_beside() -> None:
    truth = ["yes"] * 11 + ["no"] * 9
    made = outcome(truth, ["yes"] * 20, base=["Yes, there is one here."] * 20)
    result = summarize(made)
    assert result["majority"]["accuracy"] == result["tuned"]["accuracy"] == 0.55
    assert result["points_gained"] == 55.0
    notes = "\n".join(outcome_notes(made, 16))
    assert "tuned against the most frequent answer: +0.0 points" in notes
    assert "it does not beat always giving that" in notes
    assert "The base gives long answers: 55 % of them contain the reference" in notes
    assert result["base_holds_reference"] == 0.55


@pytest.mark.parametrize(
    ("base", "tuned", "said"),
    [
        ("Yes, there is one here.", "yes", True),
        ("Yes, there is one here.", "no", False),
        ("There is one right here.", "yes", False),
        ("There is one right here.", "no", False),
        ("It is not yes at all.", "yes", False),
    ],
)
def test_k64_the_form_of_the_base_explains_a_gain_alone(base: str, tuned: str, said: bool) -> None:
    notes = "\n".join(outcome_notes(outcome(["yes"] * 20, [tuned] * 20, base=[base] * 20), 16))
    assert ("The base gives long answers" in notes) == said


@pytest.mark.parametrize(
    ("blind", "said"),
    [
        (["yes", "no"] * 20, "it may not look at the images"),
        (["red"] * 40, "points (95 % interval +"),
        (None, None),
    ],
)
def test_k64_a_model_that_does_not_look_is_told(blind: list[str] | None, said: str | None) -> None:
    truth = ["yes", "no"] * 20
    made = outcome(truth, truth, **({} if blind is None else {"blind": blind}))
    notes = [note for note in outcome_notes(made, 16) if "no images" in note]
    if said is None:
        assert notes == []
    else:
        assert said in notes[0]
        assert ("may not look" in notes[0]) == ("may not look" in said)


def test_k64_gains_and_losses_are_said_in_one_tone() -> None:
    truth, wrong = ["yes", "no"] * 20, ["no", "yes"] * 20
    for tuned, blind, sign, verdict in ((truth, wrong, "+", "."), (wrong, truth, "-", ": it answers better without")):
        [note] = [one for one in outcome_notes(outcome(truth, tuned, blind=blind), 16) if "no images" in one]
        assert note.startswith(f"tuned against no images: {sign}100.0 points (95 % interval ")
        assert (f"{sign}87.3" in note) and (f"{sign}100.0" in note)
        assert f"on 40 questions{verdict}" in note


def test_k64_rates_of_yes_by_hand() -> None:
    # Two of three are found among six that were said; Agresti and Min's interval of gaps 0, 0, -1, 1, 1, 1, 1, 0.
    made = confusion(["yes"] * 3 + ["no"] * 5, ["yes", "yes", "no", *["yes"] * 4, "no"])
    assert made is not None
    assert made.as_json() == {
        "answers": ["yes", "no", "other"],
        "references": ["yes", "no"],
        "counts": [[2, 1, 0], [4, 1, 0]],
        "yes": {"precision": 0.33333, "recall": 0.66667, "f1": 0.44444},
        "yes_bias": {"points": 37.5, "low": -14.26, "high": 74.26},
    }


@pytest.mark.parametrize(("answer", "rates"), [("no", (None, None, None)), ("yes", (0, None, 0))])
def test_k64_rates_that_are_undefined_are_none(answer: str, rates: tuple[float | None, ...]) -> None:
    made = confusion(["no", "no"], ["no", answer])
    assert made is not None
    assert made.yes == dict(zip(("precision", "recall", "f1"), rates, strict=True))


@pytest.mark.parametrize(("count", "has_table"), [(1, False), (2, True), (10, True), (11, False)])
def test_k64_a_table_has_two_to_ten_labels(count: int, has_table: bool) -> None:
    labels = [f"word{number}" for number in range(count)] * 2
    assert (confusion(labels, labels) is not None) == has_table


def test_k64_yes_and_no_have_a_confusion_matrix() -> None:
    made = confusion(["yes", "Yes.", "no", "no"], ["yes", "It is.", "yes", "No"])
    assert made is not None
    assert made.labels == ["yes", "no"]
    assert made.counts == [[1, 0, 1], [1, 1, 0]]
    assert made.yes == {"precision": 0.5, "recall": 0.5, "f1": 0.5}
    always = confusion(["yes", "no", "no"], ["no", "no", "no"])
    assert always is not None
    assert always.yes == {"precision": None, "recall": 0.0, "f1": 0.0}
    assert confusion(["a b c", "d e f"], ["a", "b"]) is None


def test_the_bias_towards_yes_is_that_of_the_counts() -> None:
    truth = ["yes"] * 40 + ["no"] * 60
    made = confusion(truth, ["yes"] * 39 + ["It is."] + ["yes"] * 12 + ["no"] * 48)
    assert made is not None
    assert made.yes_bias == difference([1.0] * 39 + [0.0] + [1.0] * 12 + [0.0] * 48, [1.0] * 40 + [0.0] * 60)
    assert made.as_json()["yes_bias"]["points"] == 11.0
    assert 0 < made.as_json()["yes_bias"]["low"] < 11 < made.as_json()["yes_bias"]["high"]
    fair = confusion(truth, truth)
    assert fair is not None
    assert fair.yes_bias is not None
    assert fair.yes_bias.mean == 0
    colors = confusion(["red", "blue"] * 4, ["red"] * 8)
    assert colors is not None
    assert colors.yes_bias is None
    assert "yes_bias" not in colors.as_json()


def test_k64_small_sets_of_labels_have_one_and_large_ones_that_of_yes_and_no() -> None:
    colors = ["red", "green", "blue"] * 4
    made = confusion(colors, ["red"] * 12)
    assert made is not None
    assert sorted(made.labels) == ["blue", "green", "red"]
    assert made.yes is None
    assert [sum(row) for row in made.counts] == [4, 4, 4]
    many = [str(number) for number in range(20)] * 2 + ["yes"]
    only = confusion(many, many)
    assert only is not None
    assert (only.labels, only.counts) == (["yes", "no"], [[1, 0, 0], [0, 0, 0]])
    options = confusion(["A", "B"] * 5, ["A. Pneumonia"] * 10)
    assert options is not None
    assert options.labels == ["A", "B"]
    assert options.counts == [[5, 0, 0], [5, 0, 0]]


def test_k38_accuracy_by_an_own_key_has_intervals_and_counts() -> None:
    truth = ["yes"] * 6
    result = summarize(outcome(truth, ["yes", "no"] * 3, base=["no"] * 3), by=["part", "missing"])
    assert list(result["by"]["part"]) == ["0", "1", "2"]
    assert result["by"]["part"]["0"]["tuned"]["questions"] == 2
    assert {"low", "high", "accuracy", "correct"} <= set(result["by"]["part"]["0"]["tuned"])
    assert result["by"]["part"]["0"]["base"]["questions"] == 1
    assert list(result["by"]["missing"]) == ["(none)"]


def test_k38_predictions_carry_own_keys_folders_and_turns() -> None:
    record = Record(
        "7",
        ImageSource("ward/a.png", Path("/x/ward/a.png"), None),
        (Turn("user", "<image>\n?"), Turn("assistant", "yes")),
        "here",
        extra=(("patient", 3), ("answer", "kept apart"), ("tuned", "too")),
    )
    asked = [Question(record, ("yes", "yeah"), 2, 5)]
    [row] = prediction_rows(Outcome(asked, "exact_match", {"tuned": Answers([0], ["yeah"], [1.0], frozenset({0}))}))
    assert row == {
        "id": "7",
        "image": "ward/a.png",
        "question": "?",
        "answer": "yes",
        "turn": 2,
        "references": ["yes", "yeah"],
        "patient": 3,
        "data_answer": "kept apart",
        "data_tuned": "too",
        "tuned": {"prediction": "yeah", "correct": True, "cut": True},
    }


def test_k13_references_that_cannot_match_are_counted() -> None:
    questions = [question("a", "one two three"), question("a", "yes")]

    def count(texts: Any) -> list[int]:
        return [len(text.split()) for text in texts]

    [note] = question_notes(questions, "exact_match", 2, count)
    assert note.startswith(
        "1 of 2 references is longer than max_new_tokens 2, so no answer can equal them: raise it to 3"
    )
    [note] = question_notes([question("a", "one two three")] * 12, "exact_match", 2, count)
    assert note.startswith("12 of 12 references are longer than max_new_tokens 2")
    assert question_notes(questions, "exact_match", 3, count) == []
    [note] = question_notes([question("a", "A"), question("a", "the")], "vqa_v2", 3, count)
    assert note.startswith("2 references ('A', 'the') normalize to nothing under VQA v2")
    assert question_notes([question("a", "A")], "exact_match", 3, count) == []
    [note] = question_notes([question("a", "?")], "exact_match", 3, count)
    assert note.startswith("1 reference ('?') normalizes to nothing under exact match")


def test_k13_answers_that_were_cut_are_counted() -> None:
    truth = ["yes", "no"]
    made = Outcome(
        [question("a", answer) for answer in truth],
        "exact_match",
        {"tuned": Answers([0, 1], ["Yes, there", "no"], [0, 1], frozenset({0}))},
    )
    assert "Answers cut at max_new_tokens 4: 1 of 2 of tuned." in list(outcome_notes(made, 4))
    assert summarize(made)["cut"] == {"tuned": 1}


def test_k13_long_references_are_scored_by_their_words() -> None:
    made = outcome(["the left lung is clear"], ["left lung clear"], "token_f1")
    assert summarize(made)["tuned"]["accuracy"] == pytest.approx(2 * 3 / (3 + 4), abs=1e-5)


def test_progress_is_plain_lines_off_a_terminal() -> None:
    text = io.StringIO()
    with Bar("answers", 100, Console(file=text)) as bar:
        for done in range(0, 101, 4):
            bar.update(done)
    lines = text.getvalue().splitlines()
    assert lines[-1] == "answers: 100/100"
    assert len(lines) == 10
    assert "\x1b" not in text.getvalue()
