"""Preference pairs in data: LLaVA JSON with `rejected`, and columns as RLHF-V and RLAIF-V have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_llava.data.load import load_records
from lora_llava.data.record import Record
from lora_llava.errors import DataError
from lora_llava.recipe.columns import ColumnSettings
from lora_llava.recipe.stages import DataSettings

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
