"""Hugging Face data sets as records."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from lora_llava.data.images import open_image
from lora_llava.data.records import Record, load_records
from lora_llava.errors import DataError
from lora_llava.recipe_stages import DataSettings

QA = {"image": "image", "question": "question", "answer": "answer"}
MESSAGES = {"image": "image", "messages": "messages"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def png(red: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), (red, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def cell(red: int) -> dict[str, Any]:
    return {"bytes": png(red), "path": None}


def write(path: Path, rows: list[dict[str, Any]], image: bool = True) -> Path:
    table = datasets.Dataset.from_list(rows)
    if image:
        table = table.cast_column("image", datasets.Image(decode=False))
    table.to_parquet(path)
    return path


def load(path: Path | str, columns: dict[str, str] = QA, **settings: Any) -> list[Record]:
    return load_records(DataSettings.model_validate({"path": str(path), "columns": columns, **settings}))


def rows() -> list[dict[str, Any]]:
    return [
        {"image": cell(1), "question": "What?", "answer": "a"},
        {"image": cell(2), "question": "Why?", "answer": "b"},
        {"image": cell(1), "question": "How?", "answer": "c"},
        {"image": None, "question": "No image?", "answer": "d"},
    ]


def test_parquet_file_with_questions_and_answers(tmp_path: Path) -> None:
    records = load(write(tmp_path / "vqa.parquet", rows()), answer_prompt="Briefly.")
    assert [record.where for record in records] == [f"vqa.parquet (train), record {n}" for n in (1, 2, 3, 4)]
    assert [turn.text for turn in records[0].turns] == ["<image>\nWhat?\nBriefly.", "a"]
    assert [turn.text for turn in records[3].turns] == ["No image?\nBriefly.", "d"]
    images = [record.image for record in records]
    assert images[0] is images[2]
    assert images[3] is None
    assert images[0] is not None
    assert images[1] is not None
    assert images[0].key != images[1].key
    assert images[0].path is None
    assert open_image(images[0]).getpixel((0, 0)) == (1, 0, 0)


def test_directory_split_and_max_records(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.parquet", rows()[:1])
    write(tmp_path / "set" / "test.parquet", rows())
    records = load(tmp_path / "set", split="test", max_records=3)
    assert [record.where for record in records] == [f"set (test), record {n}" for n in (1, 2, 3)]


def test_directory_of_images(tmp_path: Path) -> None:
    folder = tmp_path / "folder" / "train"
    folder.mkdir(parents=True)
    for name, red in (("x.png", 1), ("y.png", 2)):
        (folder / name).write_bytes(png(red))
    lines = [{"file_name": "x.png", "question": "What?", "answer": "a"}]
    lines += [{"file_name": "y.png", "question": "Why?", "answer": "b"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    first, second = load(tmp_path / "folder")
    assert first.image is not None
    assert second.image is not None
    assert [first.image.key, second.image.key] == ["train/x.png", "train/y.png"]
    assert open_image(second.image).getpixel((0, 0)) == (2, 0, 0)


def test_text_only_data_set_has_no_image_column(tmp_path: Path) -> None:
    path = write(tmp_path / "text.parquet", [{"question": "Q", "answer": "A"}], image=False)
    (record,) = load(path, {"question": "question", "answer": "answer"})
    assert record.image is None


def test_messages_with_strings_and_with_parts(tmp_path: Path) -> None:
    plain = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "a"}]
    (record,) = load(write(tmp_path / "a.parquet", [{"image": cell(1), "messages": plain}]), MESSAGES)
    assert [(turn.role, turn.text) for turn in record.turns] == [("user", "<image>\nWhat?"), ("assistant", "a")]
    parts = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
    ]
    (record,) = load(write(tmp_path / "b.parquet", [{"image": cell(1), "messages": parts}]), MESSAGES)
    assert [turn.text for turn in record.turns] == ["<image>\nWhat?", "a"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([], "answer: is an empty list"),
        ({"x": 1}, "answer: is an object, must be text; convert it"),
        (None, "answer: is empty, must be text"),
    ],
)
def test_answers_that_are_no_text_are_refused(tmp_path: Path, answer: Any, message: str) -> None:
    path = write(tmp_path / "a.parquet", [{"image": cell(1), "question": "What?", "answer": answer}])
    with pytest.raises(DataError) as caught:
        load(path)
    assert str(caught.value).startswith(f"a.parquet (train), record 1: {message}")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("x", "messages: is text, must be a list of turns"),
        (
            [{"role": "system", "content": "x"}],
            "messages[0].role: is 'system', must be one of human, user, gpt, assistant; take the system",
        ),
        ([{"role": "user", "content": [{"type": "video"}]}], "messages[0].content: has a part of type 'video'"),
        ([{"role": "user", "content": 3}], "messages[0].content: is a number, must be text"),
    ],
)
def test_broken_messages_are_named_with_the_place(tmp_path: Path, messages: Any, message: str) -> None:
    path = write(tmp_path / "a.parquet", [{"image": cell(1), "messages": messages}])
    with pytest.raises(DataError) as caught:
        load(path, MESSAGES)
    assert str(caught.value).startswith(f"a.parquet (train), record 1: {message}")


def test_placeholder_without_an_image_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [{"image": None, "question": "<image>?", "answer": "a"}, rows()[0]])
    with pytest.raises(DataError, match="record 1: <image> in the text, but the record has no image"):
        load(path)


def test_path_that_a_row_brings_must_lead_into_the_root(tmp_path: Path) -> None:
    row = {"image": {"bytes": None, "path": "/etc/hostname"}, "question": "What?", "answer": "a"}
    (tmp_path / "set").mkdir()
    with pytest.raises(DataError, match=r"record 1: image: .* must be relative to"):
        load(write(tmp_path / "set" / "a.parquet", [row, rows()[0]]))


def test_missing_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", rows())
    with pytest.raises(DataError, match="there is no 'query'; it has image, question, answer"):
        load(path, QA | {"question": "query"})


def test_column_without_images_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [{"image": 3, "question": "What?", "answer": "a"}], image=False)
    with pytest.raises(DataError, match="column 'image' holds no images"):
        load(path)


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.parquet: there is no such file or directory"):
        load(tmp_path / "gone.parquet")
    (tmp_path / "a.xml").write_text("x")
    with pytest.raises(DataError, match=r"a\.xml: a \.xml file is not read. Save it as CSV"):
        load(tmp_path / "a.xml")
    (tmp_path / "bad.parquet").write_bytes(b"x")
    with pytest.raises(DataError, match=r"bad\.parquet: the data set cannot be read"):
        load(tmp_path / "bad.parquet")


def test_hub_that_cannot_be_reached_is_one_plain_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Max retries\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError) as caught:
        load("some/set")
    assert str(caught.value) == ("some/set: the hub cannot be reached; check the connection, or give path a local copy")


def test_unknown_data_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any, **__: Any) -> None:
        raise datasets.exceptions.DatasetNotFoundError("long story")

    monkeypatch.setattr(datasets, "load_dataset", unknown)
    with pytest.raises(DataError, match="some/set: there is no such data set on the hub, or no access"):
        load("some/set")


def test_k38_own_columns_and_names_of_images_are_kept_for_an_evaluation(tmp_path: Path) -> None:
    own = [{"type": "open", "patient": 7, "score": float("nan"), "boxes": [1, 2]} for _ in rows()]
    named = [
        {**row, **one, "image": row["image"] and {**row["image"], "path": path}}
        for row, one, path in zip(rows(), own, ("ward/a.png", "/home/me/b.png", "ward/a.png", None), strict=True)
    ]
    path = write(tmp_path / "t.parquet", named)
    data = DataSettings.model_validate({"path": str(path), "columns": QA, "group": "patient"})
    records = load_records(data, extra=True)
    assert dict(records[0].extra) == {"type": "open", "patient": 7, "score": None}
    assert [record.image and record.image.label for record in records] == ["ward/a.png", "b.png", "ward/a.png", None]
    assert not any(record.extra for record in load_records(data))
