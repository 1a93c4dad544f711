"""Preference pairs in data: LLaVA JSON with `rejected`, and columns as RLHF-V and RLAIF-V have them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_llava.conversation.encode import IGNORE_INDEX
from lora_llava.data.load import load_records
from lora_llava.data.packing import PlanItem, RowSettings, conversations, make_plan
from lora_llava.data.pairs import encode_pair
from lora_llava.data.record import Record
from lora_llava.data.rows import build_row
from lora_llava.data.stage import size_of
from lora_llava.errors import DataError
from lora_llava.recipe.columns import ColumnSettings
from lora_llava.recipe.stages import DataSettings
from tests.helpers.pairs import TEXTS, pair, pair_record

QUESTION, CHOSEN, REJECTED = "Is there a dog?", "No.", "Yes, on the sofa."


def load(directory: Path, entries: list[Any], **settings: Any) -> list[Record]:
    Image.new("RGB", (8, 8)).save(directory / "7.png")
    path = directory / "pairs.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    return load_records(DataSettings(path=str(path), **settings))


def llava(**more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": CHOSEN}]
    return {"id": "a", "image": "7.png", "conversations": turns, **more}


def columns(question: str = "question", chosen: str = "chosen", rejected: str = "rejected") -> ColumnSettings:
    return ColumnSettings(image="image", question=question, chosen=chosen, rejected=rejected)


def test_llava_json_has_the_chosen_answer_as_its_answer_and_rejected_next_to_it(tmp_path: Path) -> None:
    [with_pair, without] = load(tmp_path, [llava(rejected=REJECTED), llava()])
    assert with_pair.turns == without.turns
    assert with_pair.turns[-1].text == CHOSEN
    assert (with_pair.rejected, without.rejected) == (REJECTED, None)


def test_a_rejected_that_is_no_text_is_no_pair(tmp_path: Path) -> None:
    [record] = load(tmp_path, [llava(rejected=[{"role": "assistant", "content": "Yes."}])])
    assert record.rejected is None


def test_half_of_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="rejected: character 1 is half of a surrogate pair"):
        load(tmp_path, [llava(rejected="\ud800")])


@pytest.mark.parametrize("as_text", [False, True], ids=["columns", "JSON in one column"])
def test_columns_equal_llava_json(tmp_path: Path, as_text: bool) -> None:
    texts = {"question": QUESTION, "chosen": CHOSEN, "rejected": REJECTED}
    [expected] = load(tmp_path, [llava(rejected=REJECTED)])
    # As RLAIF-V and as RLHF-V are published.
    entry = {"image": "7.png", "text": json.dumps(texts)} if as_text else {"image": "7.png", **texts}
    [record] = load(tmp_path, [entry], columns=columns("text", "text", "text") if as_text else columns())
    assert (record.turns, record.rejected) == (expected.turns, expected.rejected)
    assert record.image is not None and expected.image is not None
    assert record.image.identity == expected.image.identity


@pytest.mark.parametrize("text", ["no JSON", "[1]", None, 3])
def test_one_column_without_a_json_object_is_named(tmp_path: Path, text: Any) -> None:
    with pytest.raises(
        DataError, match=r"record 1: text: is .*, must be a JSON object with question, chosen, rejected"
    ):
        load(tmp_path, [{"image": "7.png", "text": text}], columns=columns("text", "text", "text"))


def test_a_missing_answer_is_named(tmp_path: Path) -> None:
    entries = [{"image": "7.png", "question": QUESTION, "chosen": CHOSEN, "rejected": None}]
    with pytest.raises(DataError, match="record 1: rejected: is empty, must be text"):
        load(tmp_path, entries, columns=columns())
    text = json.dumps({"question": QUESTION, "rejected": REJECTED})
    with pytest.raises(DataError, match="record 1: text: chosen: is empty, must be text"):
        load(tmp_path, [{"image": "7.png", "text": text}], columns=columns("text", "text", "text"))


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"question": "q", "chosen": "c"}, "belong together"),
        ({"question": "q", "rejected": "r"}, "belong together"),
        ({"question": "q", "answer": "a", "chosen": "c", "rejected": "r"}, "with question alone"),
        ({"chosen": "c", "rejected": "r"}, "with question alone"),
        ({"messages": "m", "chosen": "c", "rejected": "r"}, "with question alone"),
        ({"question": "q"}, "or question, chosen and rejected"),
    ],
)
def test_columns_of_pairs_come_together(given: dict[str, str], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        ColumnSettings(**given)


@pytest.mark.fault("records: a pair whose two answers are equal")
@pytest.mark.parametrize("rejected", ["no", " no\n"])
def test_equal_answers_are_refused(rejected: str) -> None:
    with pytest.raises(DataError, match=r"pairs\.json, record 1: rejected: equals the chosen answer; write") as raised:
        pair("<image>\nIs it?", "no", rejected)
    assert raised.value.kind == "pair"


@pytest.mark.fault("records: a pair that is longer than the limit")
def test_a_pair_is_cut_as_long_as_its_answers_differ_before() -> None:
    texts = ("<image>\nWhat?", "It is red and round " * 8, "It is red and blue " * 8)
    whole = pair(*texts)
    assert not whole.is_cut
    assert whole.rejected is not None
    cut = pair(*texts, max_length=whole.prefix_length + 2)
    assert cut.is_cut
    assert cut.rejected is not None
    assert [len(one.input_ids) for one in cut.branches] == [whole.prefix_length + 2] * 2
    with pytest.raises(DataError, match=f"equals the chosen answer within max_length {whole.prefix_length}"):
        pair(*texts, max_length=whole.prefix_length)


def test_an_empty_rejected_answer_and_a_missing_one_are_named() -> None:
    with pytest.raises(DataError, match="record 1: rejected: turn 2: the answer is empty"):
        pair("<image>\nIs it?", "no", "  ")
    record = pair_record("<image>\nIs it?", "no", "x")
    with pytest.raises(DataError, match="record 1: rejected: is missing, or no text"):
        encode_pair(replace(record, rejected=None), max_length=9)


def test_a_pair_is_one_item_with_its_prefix_once() -> None:
    for texts in TEXTS:
        encoded = pair(*texts)
        chosen, rejected = encoded.branches
        shared = encoded.prefix_length
        assert chosen.input_ids[:shared] == rejected.input_ids[:shared]
        assert chosen.input_ids[shared] != rejected.input_ids[shared]
        size = size_of(encoded)
        assert size.length == len(build_row([[encoded]])["input_ids"][0])
        assert size.length + size.shared == len(chosen.input_ids) + len(rejected.input_ids)
        assert size.num_supervised == chosen.num_supervised + rejected.num_supervised
        assert size.prefix_length == 0


def test_a_row_says_which_target_belongs_to_which_answer() -> None:
    pairs = [pair(*texts) for texts in TEXTS]
    row = build_row([[one] for one in pairs])
    for number, branch in enumerate(branch for one in pairs for branch in one.branches):
        own = row["answers"] == number
        labels = [label for label in branch.labels if label != IGNORE_INDEX]
        assert row["shift_labels"][own].tolist() == labels
        # The positions count from the start of the conversation, as in a row by itself.
        positions = row["position_ids"][0, row["target_positions"][own]].tolist()
        assert positions == [index - 1 for index, label in enumerate(branch.labels) if label != IGNORE_INDEX]
    assert "answers" not in build_row([])


def test_a_plan_counts_pairs_and_never_cuts_one() -> None:
    items = [PlanItem(90 + number, 0, -1, shared=60) for number in range(7)]
    plan = make_plan(items, RowSettings(200, 8), batch_size=3, num_steps=3, seed=0)
    assert [len(list(conversations(step))) for step in plan.steps] == [3, 3, 1]
    assert all(len(tree) == 1 for step in plan.steps for row in step for tree in row)
    assert plan.num_separate_tokens - plan.num_computed_tokens == 7 * 60
