"""Forms of data that other kits and tools write: read, or named for what they are with the way to have them read."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from lora_llava.data.load import load_records
from lora_llava.data.record import Record
from lora_llava.errors import DataError
from lora_llava.recipe.stages import DataSettings
from tests.helpers.faulty import encoded, scene

QA = {"image": "image", "question": "question", "answer": "answer"}
PNG = encoded(scene(1))
URL = "data:image/png;base64," + base64.b64encode(PNG).decode()
ASKED = ["<image>\nWhat?", "a cat"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(PNG)
    return tmp_path


def load(folder: Path, content: Any, name: str = "train.json", **settings: Any) -> list[Record]:
    path = folder / name
    if name.endswith(".parquet"):
        datasets.Dataset.from_list(content).to_parquet(path)
    elif name.endswith(".jsonl"):
        path.write_text("\n".join(map(json.dumps, content)), encoding="utf-8")
    elif not isinstance(content, bytes):
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    else:
        path.write_bytes(content)
    return load_records(DataSettings.model_validate({"path": str(path), **settings}))


def refused(folder: Path, content: Any, name: str = "train.json", **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(folder, content, name, **settings)
    return str(caught.value)


def texts(record: Record) -> list[str]:
    assert record.image is not None
    return [turn.text for turn in record.turns]


LLAVA_TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a cat"}]
CHAT_TURNS = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "a cat"}]


def parts(image: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": [image, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
    ]


# --- K17, K18: parquet


def test_k17_parquet_with_conversations_of_from_and_value(folder: Path) -> None:
    rows = [{"image": {"bytes": PNG, "path": None}, "conversations": LLAVA_TURNS}]
    (record,) = load(folder, rows, "t.parquet", columns={"image": "image", "messages": "conversations"})
    assert texts(record) == ASKED


def test_k18_a_column_holding_a_list_of_one_image(folder: Path) -> None:
    columns = QA | {"image": "images"}
    for cell in ({"bytes": PNG, "path": None}, "a.png"):
        (record,) = load(
            folder, [{"images": [cell], "question": "What?", "answer": "a cat"}], "t.parquet", columns=columns
        )
        assert texts(record) == ASKED
    rows = [{"images": [cell], "question": "What?", "answer": "a cat"} for cell in ("a.png", "b.png")]
    rows[1]["images"] = ["a.png", "b.png"]
    message = refused(folder, rows, "t.parquet", columns=columns)
    assert "record 2: images: holds 2 images. LLaVA-1.5 takes one image per conversation: write a record" in message


def test_k18_rows_with_an_empty_list_have_no_image(folder: Path) -> None:
    rows = [{"images": ["a.png"], "question": "Q", "answer": "A"}, {"images": [], "question": "Q", "answer": "A"}]
    assert [record.image is None for record in load(folder, rows, "t.parquet", columns=QA | {"image": "images"})] == [
        False,
        True,
    ]


def test_k18_trl_vision_form(folder: Path) -> None:
    rows = [{"messages": parts({"type": "image", "text": None}), "images": [{"bytes": PNG, "path": None}]}]
    (record,) = load(folder, rows, "t.parquet", columns={"image": "images", "messages": "messages"})
    assert texts(record) == ASKED


# --- K19: JSON, JSON Lines and CSV of other kits


@pytest.mark.parametrize(
    "record",
    [
        {"image": "a.png", "messages": CHAT_TURNS},
        {"images": ["a.png"], "messages": CHAT_TURNS},
        {"images": ["a.png"], "messages": [{"role": "user", "content": "<image>\nWhat?"}, CHAT_TURNS[1]]},
        {"images": ["a.png"], "conversations": LLAVA_TURNS},
        {"image": "a.png", "conversatons": LLAVA_TURNS},
        {"messages": parts({"type": "image_url", "image_url": {"url": URL}})},
        {"messages": parts({"type": "image_url", "image_url": "a.png"})},
        {"messages": parts({"type": "image", "image": "a.png"})},
        {"images": ["a.png"], "messages": parts({"type": "image"})},
        {"image": URL, "conversations": LLAVA_TURNS},
    ],
)
@pytest.mark.parametrize("name", ["t.json", "t.jsonl"])
def test_k19_conversations_of_other_kits_are_read_as_they_are(folder: Path, record: dict[str, Any], name: str) -> None:
    (found,) = load(folder, [record], name)
    assert texts(found) == ASKED
    assert found.image is not None
    assert (found.image.data or found.image.path.read_bytes() if found.image.path else found.image.data) == PNG


@pytest.mark.parametrize("name", ["t.json", "t.jsonl"])
@pytest.mark.parametrize(
    ("record", "columns"),
    [
        ({"image": "a.png", "question": "What?", "answer": "a cat"}, QA),
        (
            {"images": ["a.png"], "instruction": "What?", "output": "a cat"},
            {"image": "images", "question": "instruction", "answer": "output"},
        ),
        (
            {"Image": "a.png", "PatientID": 7, "Question": "What?", "Answer": "a cat"},
            {"image": "Image", "question": "Question", "answer": "Answer"},
        ),
        (
            {"img_name": "a.png", "q_lang": "en", "question": "What?", "answer": "a cat"},
            {"image": "img_name", "question": "question", "answer": "answer"},
        ),
    ],
)
def test_k19_flat_records_are_read_by_the_columns_that_the_error_proposes(
    folder: Path, record: dict[str, Any], columns: dict[str, str], name: str
) -> None:
    message = refused(folder, [record], name)
    written = ", ".join(f"{key}: {value}" for key, value in columns.items())
    assert f"conversations: is missing; it has {', '.join(record)}. " in message
    assert f"add to its data: columns: {{{written}}}" in message
    assert texts(load(folder, [record], name, columns=columns)[0]) == ASKED


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_k19_a_table_with_any_usual_delimiter(folder: Path, delimiter: str) -> None:
    lines = [["image", "question", "answer"], ["a.png", '"What, then; is\nit?"', "a cat"], ["", "No image?", "2"]]
    content = "\ufeff" + "\r\n".join(delimiter.join(line) for line in lines) + "\r\n"
    for name in ("t.csv", "t.tsv") if delimiter == "\t" else ("t.csv",):
        first, second = load(folder, content, name, columns=QA)
        assert texts(first) == ["<image>\nWhat, then; is\nit?", "a cat"]
        assert first.where == f"{name}, record 1 (line 3)"
        assert second.image is None
        assert second.turns[1].text == "2"


def test_k19_a_table_whose_columns_are_not_those_named_shows_them(folder: Path) -> None:
    content = "file;part_no;question;answer\na.png;7;What?;a cat\n"
    message = refused(folder, content, "t.csv", columns=QA)
    assert message == (
        "t.csv: columns: there is no 'image'; it has file, part_no, question, answer. "
        "To have it read: columns: {image: file, question: question, answer: answer}"
    )
    assert "no record has 'picture'" in refused(
        folder, [{"question": "Q", "answer": "A"}], columns=QA | {"image": "picture"}
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"image,question,answer\na.png,What?\n", "t.csv, line 2: has 2 fields, the first line has 3; quote"),
        (b"image,question,answer\na.png,\"What?,x\n", "not a table: "),
        (b"image,question,question\na.png,x,y\n", "column 'question' occurs twice"),
        (b"image,question,answer\na.png,\xe4,y\n", "not UTF-8 at byte 29 (as cp1252 it reads "),
        (b"", "t.csv: is empty"),
        (b"image,question,answer\na.png,What?,\n", "record 1 (line 2): answer: is empty, must be text"),
    ],
)  # fmt: skip
def test_k19_broken_tables_are_named_with_the_place(folder: Path, content: bytes, message: str) -> None:
    assert message in refused(folder, content, "t.csv", columns=QA)


def test_k19_an_old_spreadsheet_is_named_with_the_line_that_converts_it(folder: Path) -> None:
    message = refused(folder, b"PK", "t.xls", columns=QA)
    assert "t.xls: a .xls file is not read. Save it as CSV" in message
    assert """python -c 'import pandas; pandas.read_excel("t.xls").to_csv("t.csv", index=False)'""" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data": [{"question": "Q"}]}, "its records are under 'data'. Add to its data: records: data"),
        ({"v": "1", "train": [{"q": 1}], "test": [{"q": 2}]}, "Add to its data: records: train (or one of test)"),
        ({"1": {"question": "Q"}, "2": {"question": "Q"}}, "conversations: is missing; it has id, question. To have"),
        ({"images": [], "annotations": [{"id": 1}]}, "it is in COCO's form"),
        ([{"image": "a.png", "chosen": "a", "rejected": "b"}], "It is preference data"),
        ([{"image": "a.png", "texts": [{"user": "Q"}]}], "It has several questions in a row. Add to its data: each:"),
        ([{"images": ["a.png"], "texts": [{"user": "Q"}]}], "record 1 (entry 1, texts[0]): assistant: is empty"),
        ([{"video": "a.mp4", "conversation_id": 3}], "It is about a video"),
        (
            [{"pic": "a.png", "wer": "x"}],
            "name its keys: in its data in a recipe by columns: {image: KEY, question: KEY, answer: KEY}",
        ),
        ([{}], "it has no keys"),
    ],
)
def test_k19_other_forms_are_named_for_what_they_are(folder: Path, content: Any, message: str) -> None:
    assert message in refused(folder, content)


def test_k19_records_inside_an_object_are_read_by_the_setting_that_the_error_names(folder: Path) -> None:
    record = {"image": "a.png", "question": "What?", "answer": "a cat"}
    assert "records: data" in refused(folder, {"data": [record]}, columns=QA)
    for content, path in (({"data": [record]}, "data"), ({"a": {"b": [record]}}, "a.b"), ({"x7": record}, None)):
        assert texts(load(folder, content, columns=QA, records=path)[0]) == ASKED
    (keyed,) = load(folder, {"x7": {"answer": "a cat"}}, columns={"question": "id", "answer": "answer"})
    assert keyed.turns[0].text == "x7"


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "system", "content": "Be brief."}, *CHAT_TURNS]},
        {"messages": [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *CHAT_TURNS]},
        {"system": "Be brief.", "conversations": LLAVA_TURNS},
        {"conversations": [{"from": "system", "value": "Be brief."}, *LLAVA_TURNS]},
        {"system": "Be brief.", "messages": [{"role": "system", "content": "Be long."}, *CHAT_TURNS]},
    ],
)
def test_k19_system_texts_belong_to_their_record(folder: Path, record: dict[str, Any]) -> None:
    first, second = load(folder, [{"image": "a.png", **record}, {"image": "a.png", "conversations": LLAVA_TURNS}])
    assert texts(first) == ASKED
    assert (first.system, second.system) == ("Be brief.", None)


def test_k19_a_leading_turn_of_the_model_is_left_out_as_llava_does(folder: Path) -> None:
    for turns in (LLAVA_TURNS, CHAT_TURNS):
        key = "messages" if turns is CHAT_TURNS else "conversations"
        (record,) = load(folder, [{"image": "a.png", key: [turns[1], *turns]}])
        assert texts(record) == ASKED


def test_k19_several_images_are_refused_with_the_reason(folder: Path) -> None:
    assert "holds 2 images. LLaVA-1.5 takes one" in refused(
        folder, [{"images": ["a.png", "b.png"], "messages": CHAT_TURNS}]
    )


def test_k19_own_keys_of_a_flat_record_are_kept_for_an_evaluation(folder: Path) -> None:
    path = folder / "t.csv"
    path.write_text("image,question,answer,patient\na.png,What?,a cat,p7\n")
    data = DataSettings.model_validate({"path": str(path), "columns": QA, "group": "patient"})
    (record,) = load_records(data, extra=True)
    assert record.group == "p7"
    assert dict(record.extra) == {"patient": "p7"}


# --- K21, K24: paths


@pytest.mark.parametrize("name", ["t.json", "t.csv", "t.parquet"])
def test_k21_an_absolute_path_below_the_root_is_taken_in_every_form(folder: Path, name: str) -> None:
    row = {"image": str(folder / "a.png"), "question": "What?", "answer": "a cat"}
    content: Any = [row, row | {"image": "a.png"}]
    if name == "t.csv":
        content = f"image,question,answer\n{row['image']},What?,a cat\na.png,What?,a cat\n"
    first, second = load(folder, content, name, columns=QA)
    assert first.image is not None
    assert second.image is not None
    assert first.image.key == second.image.key == "a.png"
    assert load(folder, [{"image": row["image"], "conversations": LLAVA_TURNS}])[0].image == first.image


@pytest.mark.parametrize("name", ["t.json", "t.csv", "t.parquet"])
def test_k21_an_absolute_path_elsewhere_is_refused_alike(folder: Path, name: str) -> None:
    (folder / "sub").mkdir()
    row = {"image": str(folder / "a.png"), "question": "What?", "answer": "a cat"}
    content: Any = [row] if name != "t.csv" else f"image,question,answer\n{row['image']},What?,a cat\n"
    message = refused(folder, content, name, columns=QA, image_root=str(folder / "sub"))
    assert "must be relative to image_root, or below it" in message


@pytest.mark.parametrize(
    "url", ["https://example.com/a.png", "HTTP://host/x?y=1", "s3://bucket/a.png", "file:///a.png"]
)
@pytest.mark.parametrize("name", ["t.json", "t.jsonl", "t.csv", "t.parquet", "llava.json", "parts.json"])
def test_k24_a_url_is_refused_as_a_url_and_shown_whole(folder: Path, url: str, name: str) -> None:
    row = {"image": url, "question": "What?", "answer": "a cat"}
    contents: dict[str, Any] = {
        "t.csv": f"image,question,answer\n{url},What?,a cat\n",
        "llava.json": [{"image": url, "conversations": LLAVA_TURNS}],
        "parts.json": [{"messages": parts({"type": "image_url", "image_url": {"url": url}})}],
    }
    settings = {} if name in ("llava.json", "parts.json") else {"columns": QA}
    message = refused(folder, contents.get(name, [row]), name, **settings)
    assert f"image: {url!r} is a URL; images are not downloaded: fetch them into image_root first" in message


def test_k24_what_is_no_data_url_is_refused(folder: Path) -> None:
    for url, message in (("data:image/png,abc", "is not a base64 data URL"), ("data:;base64,%%", "broken base64")):
        assert message in refused(folder, [{"image": url, "conversations": LLAVA_TURNS}])


# --- K22: answers


@pytest.mark.parametrize(
    ("answer", "text", "references"),
    [
        (3, "3", ()),
        (3.0, "3", ()),
        (0.25, "0.25", ()),
        (True, "true", ()),
        (["net", "nets", "net"], "net", ("net", "nets", "net")),
        (["b", "a"], "b", ("b", "a")),
        (["only"], "only", ()),
        ([1, 2, 2], "2", ("1", "2", "2")),
        ([{"answer": "net", "answer_id": 1}, {"answer": "ball", "answer_id": 2}], "net", ("net", "ball")),
    ],
)
@pytest.mark.parametrize("name", ["t.json", "t.parquet"])
def test_k22_answers_that_are_lists_and_numbers_are_read(
    folder: Path, answer: Any, text: str, references: tuple[str, ...], name: str
) -> None:
    (record,) = load(folder, [{"image": "a.png", "question": "What?", "answer": answer}], name, columns=QA)
    assert (record.turns[-1].text, record.references) == (text, references)
    turns = [LLAVA_TURNS[0], {"from": "gpt", "value": answer}]
    (record,) = load(folder, [{"image": "a.png", "conversations": turns}])
    assert (record.turns[-1].text, record.references) == (text, references)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([], "answer: is an empty list"),
        ([" "], "answer: is an empty list"),
        (None, "answer: is empty, must be text"),
        ({"text": "x"}, "answer: is an object, must be text"),
        ([["x"]], "answer[0]: is a list of 1, must be text"),
    ],
)
def test_k22_what_is_no_answer_is_refused(folder: Path, answer: Any, message: str) -> None:
    assert message in refused(folder, [{"image": "a.png", "question": "What?", "answer": answer}], columns=QA)


def test_a_missing_number_of_a_parquet_file_is_no_answer(folder: Path) -> None:
    rows = [{"image": "a.png", "question": "What?", "answer": value} for value in (1.0, float("nan"))]
    assert "record 2: answer: is empty" in refused(folder, rows, "t.parquet", columns=QA)


def test_k23_a_misspelled_group_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("file,part,question,answer\na.png,p1,What?,yes\n", encoding="utf-8")
    settings = DataSettings.model_validate(
        {
            "path": str(tmp_path / "t.csv"),
            "columns": {"image": "file", "question": "question", "answer": "answer"},
            "group": "prat",
        }
    )
    with pytest.raises(DataError, match=r"group: there is no 'prat'; it has file, part, .*\. Did you mean part\?"):
        load_records(settings)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize(("answer", "seen"), [("Rohr", "its first line holds NUL characters"), ("Röhre", "not UTF-8")])
def test_utf_16_without_its_mark_is_named_and_read_once_declared(
    tmp_path: Path, encoding: str, answer: str, seen: str
) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(f"question,answer\nWas?,{answer}\n".encode(encoding))
    settings = {"path": str(path), "columns": {"question": "question", "answer": "answer"}}
    with pytest.raises(DataError, match=f"t.csv: {seen}.*encoding: {encoding}"):
        load_records(DataSettings.model_validate(settings))
    (record,) = load_records(DataSettings.model_validate(settings | {"encoding": encoding}))
    assert record.turns[-1].text == answer
