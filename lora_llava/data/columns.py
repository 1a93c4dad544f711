"""Hugging Face datasets (hub id, parquet file, folder) as records, through a mapping of columns."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_llava.conversation import IMAGE_PLACEHOLDER, Turn
from lora_llava.data.records import ImageSource, Record, checked_turn, with_answer_prompt
from lora_llava.errors import DataError
from lora_llava.recipe import ColumnSettings, DataSettings


def read_columns(data: DataSettings) -> list[Record]:
    """Read every row; DataError if the data set cannot be had or a row cannot be used."""
    assert data.columns is not None
    rows = _open(data)
    wanted = [name for name in data.columns.model_dump().values() if name]
    if missing := [name for name in wanted if name not in rows.column_names]:
        raise DataError(
            f"{data.path}: data.columns names {', '.join(missing)}, which the data set does not have; it has "
            f"{', '.join(rows.column_names)}"
        )
    if data.max_records is not None:
        rows = rows.select(range(min(data.max_records, len(rows))))
    name = Path(data.path).name
    return [
        _record(row, f"{name}, split {data.split}, row {number}", number, data.columns, data.answer_prompt)
        for number, row in enumerate(rows.select_columns(wanted))
    ]


def _open(data: DataSettings) -> Any:
    """Open the data set with its images left as they are stored."""
    import datasets

    path = Path(data.path)
    try:
        if path.is_file():
            rows = datasets.load_dataset("parquet", data_files={data.split: str(path)}, split=data.split)
        elif path.is_dir() or data.path.startswith((".", "/", "~")):
            rows = datasets.load_dataset(str(path), split=data.split)
        else:
            rows = datasets.load_dataset(data.path, name=data.name, split=data.split, revision=data.revision)
    except Exception as error:  # noqa: BLE001 - datasets raises whatever its readers and the network raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"data set {data.path!r}, split {data.split!r}, cannot be loaded: {reason}") from error
    for column, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows


def _record(row: dict[str, Any], where: str, number: int, columns: ColumnSettings, prompt: str | None) -> Record:
    image = None if columns.image is None else _image(row[columns.image], f"{where}, column {columns.image}")
    if columns.messages is not None:
        turns = list(_messages(row[columns.messages], f"{where}, column {columns.messages}"))
    else:
        assert columns.question is not None and columns.answer is not None
        turns = [
            checked_turn("user", _text(row, columns.question, where), f"{where}, column {columns.question}"),
            checked_turn("assistant", _text(row, columns.answer, where), f"{where}, column {columns.answer}"),
        ]
    if any(IMAGE_PLACEHOLDER in turn.text for turn in turns[1:]) or not turns:
        raise DataError(f"{where}: {IMAGE_PLACEHOLDER} may stand in the first question only")
    if image is not None and IMAGE_PLACEHOLDER not in turns[0].text:
        turns[0] = Turn(turns[0].role, f"{IMAGE_PLACEHOLDER}\n{turns[0].text}")
    elif image is None and IMAGE_PLACEHOLDER in turns[0].text:
        raise DataError(f"{where}: the question holds {IMAGE_PLACEHOLDER}, but there is no image")
    return Record(str(number), image, with_answer_prompt(turns, prompt), where)


def _text(row: dict[str, Any], column: str, where: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise DataError(
            f"{where}, column {column}: needed text, got {type(value).__name__} {value!r}. Convert the column to text."
        )
    return value


def _image(value: Any, where: str) -> ImageSource | None:
    if value is None:
        return None
    if isinstance(value, bytes):
        value = {"bytes": value}
    if not isinstance(value, dict):
        raise DataError(f"{where}: needed an image (bytes), got {type(value).__name__}. Cast the column to Image.")
    data = value.get("bytes")
    if data is None:
        try:
            data = Path(value["path"]).read_bytes()
        except (KeyError, TypeError, OSError) as error:
            raise DataError(f"{where}: the row has neither the image's bytes nor a file") from error
    return ImageSource(hashlib.sha256(data).hexdigest(), data=data)


def _messages(value: Any, where: str) -> Iterator[Turn]:
    """Read OpenAI-style messages; `content` is text, or parts of type text and image."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: needed a list of messages with role and content")
    for number, message in enumerate(value, start=1):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("user", "assistant"):
            raise DataError(f"{where}, message {number}: role is {role!r}, needed user or assistant")
        content = message.get("content")
        if isinstance(content, list):
            content = "\n".join(_part(part, f"{where}, message {number}") for part in content)
        if not isinstance(content, str):
            raise DataError(f"{where}, message {number}: content must be text, got {type(content).__name__}")
        yield checked_turn(role, content, f"{where}, message {number}")


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image":
        return IMAGE_PLACEHOLDER
    text = part.get("text") if kind == "text" else None
    if not isinstance(text, str):
        raise DataError(f"{where}: a part is of type {kind!r}, needed text or image")
    return text
