"""Hugging Face data sets as records: a hub id, a parquet file or a directory, and names of columns."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_llava.conversation import IMAGE_PLACEHOLDER, Turn
from lora_llava.data.bad_records import BadRecords, Exclusions, data_name
from lora_llava.data.sources import (
    ImageRoot,
    ImageSource,
    Record,
    check_group,
    check_placeholder,
    check_text,
    own_values,
    with_answer_prompt,
)
from lora_llava.errors import DataError
from lora_llava.recipe_stages import ColumnSettings, DataSettings

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")


def load_columns(
    data: DataSettings, columns: ColumnSettings, image_root: Path | None, bad: BadRecords, *, extra: bool = False
) -> list[Record]:
    """Read the rows of a data set, one record each; embedded images are kept as they are, undecoded.

    `extra`: keep the columns with flat values that have no other use.

    Image paths in a data set are relative to `image_root`; default: the directory, or that of the file.
    Raises DataError naming data set, record and column, where `bad` does not take it.
    """
    path = Path(data.path)
    rows, cache = _open(data, columns, extra)
    used = set(_named(data, columns)) - {data.group}
    directory = path if path.is_dir() else path.parent
    root = image_root or (directory if path.exists() else cache)
    images = _Images(ImageRoot(root, str(columns.image), at_once=bad.collects, window=data.grey_window))
    excluded = Exclusions(data.exclude)
    records = []
    number = 0
    for number, row in enumerate(rows, start=1):
        if excluded.holds(number, None):
            continue
        try:
            record = _record(row, number, f"{data_name(data)} ({data.split})", data, columns, images)
            records.append(replace(record, extra=own_values(row, used)) if extra else record)
        except DataError as error:
            bad.add(number, None, error)
    excluded.check(number if data.max_records is None else max(number, *excluded.ids, 0))
    images.root.check()
    return records


def _record(
    row: Mapping[str, Any], number: int, name: str, data: DataSettings, columns: ColumnSettings, images: _Images
) -> Record:
    where = f"{name}, record {number}"
    image = None if columns.image is None else images.source(row[columns.image], where)
    if columns.messages is not None:
        turns = _messages(row[columns.messages], f"{where}: {columns.messages}", image is not None)
    else:
        question = _text(row[str(columns.question)], f"{where}: {columns.question}")
        answer = _text(row[str(columns.answer)], f"{where}: {columns.answer}")
        shown = question if image is None else f"{IMAGE_PLACEHOLDER}\n{question}"
        turns = [Turn("user", shown), Turn("assistant", answer)]
    check_placeholder(turns, image, where)
    prompted = tuple(
        Turn("user", with_answer_prompt(turn.text, data.answer_prompt)) if turn.role == "user" else turn
        for turn in turns
    )
    group = None if data.group is None else check_group(row[data.group], f"{where}: {data.group}")
    return Record(str(number), image, prompted, where, number, group)


def _named(data: DataSettings, columns: ColumnSettings) -> list[str]:
    """List the columns that the settings name."""
    wanted = (columns.image, columns.question, columns.answer, columns.messages, data.group)
    return list(dict.fromkeys(column for column in wanted if column))


def _flat_columns(table: Any) -> list[str]:
    """List the columns that hold one value a row."""
    return [name for name, feature in table.features.items() if type(feature).__name__ in ("Value", "ClassLabel")]


def _open(data: DataSettings, columns: ColumnSettings, extra: bool) -> tuple[Iterable[Mapping[str, Any]], Path]:
    """Open the data set with the columns asked for; returns its rows and where the hub's files are kept.

    `extra`: also with its columns of flat values.
    """
    path = Path(data.path)
    if not path.exists() and (path.is_absolute() or not _HUB_ID.match(data.path)):
        raise DataError(f"{data.path}: there is no such file or directory, nor is it a hub id; correct path")
    # Imported here: slow, and of no use for LLaVA JSON.
    import datasets

    try:
        if path.is_file():
            if path.suffix != ".parquet":
                raise DataError(f"{path.name}: columns read parquet files, directories and hub ids; convert the file")
            table = datasets.load_dataset(
                "parquet", data_files={data.split.partition("[")[0]: str(path)}, split=data.split
            )
        else:
            revision = None if path.is_dir() else data.revision
            table = datasets.load_dataset(data.path, data.name, split=data.split, revision=revision)
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - readers and network raise anything
        raise _unreadable(data.path, error) from None
    named = _named(data, columns)
    for column in named:
        if column not in table.column_names:
            raise DataError(f"{data.path}: columns: there is no {column!r}; it has {', '.join(table.column_names)}")
    if data.max_records is not None:
        table = table.select(range(min(data.max_records, len(table))))
    table = table.select_columns(list(dict.fromkeys([*named, *(_flat_columns(table) if extra else [])])))
    if columns.image is not None:
        try:
            table = table.cast_column(columns.image, datasets.Image(decode=False))
        except Exception:  # noqa: BLE001 - arrow raises several kinds
            raise DataError(f"{data.path}: column {columns.image!r} holds no images; correct columns.image") from None
    return table, Path(datasets.config.HF_CACHE_HOME)


def _unreadable(name: str, error: Exception) -> DataError:
    reason = str(error).strip().partition("\n")[0][:300]
    if type(error).__name__ == "DatasetNotFoundError":
        return DataError(
            f"{name}: there is no such data set on the hub, or no access to it; correct path, or log in to the hub"
        )
    if isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.split(".")[0] in _NETWORK:
        return DataError(f"{name}: the hub cannot be reached; check the connection, or give path a local copy")
    return DataError(f"{name}: the data set cannot be read: {reason or type(error).__name__}")


_NETWORK = ("httpx", "httpcore", "requests", "urllib3", "huggingface_hub")


class _Images:
    """Images of the cells of a column; equal bytes are kept once."""

    def __init__(self, root: ImageRoot) -> None:
        self.root = root
        self._embedded: dict[str, ImageSource] = {}

    def source(self, cell: Any, where: str) -> ImageSource | None:
        """Return the image of a cell, None for an empty one."""
        if cell is None:
            return None
        data, path = cell["bytes"], cell["path"]
        if data is not None:
            key = hashlib.sha256(data).hexdigest()
            return self._embedded.setdefault(
                key, ImageSource(key, None, data, where, _file_name(path), self.root.window)
            )
        if path is None:
            return None
        # Readers of directories give full paths; one that a row brought itself must lead into the root.
        if os.path.isabs(path):  # noqa: PTH117 - strings: once for every row
            path = os.path.relpath(os.path.realpath(path), os.path.realpath(self.root.root))
        return self.root.source(path, where)


def _file_name(path: str | None) -> str:
    """Return the name that a data set has for an embedded image; of a path on somebody's machine its last part."""
    if not path:
        return ""
    is_absolute = path.startswith("/") or ":" in path or "\\" in path
    return path.replace("\\", "/").rpartition("/")[2] if is_absolute else path


def _text(value: Any, place: str) -> str:
    if isinstance(value, str):
        return check_text(value, place)
    if isinstance(value, list):
        raise DataError(f"{place}: is a list of {len(value)}, must be text; make a column with the one to learn")
    kinds = {bool: "a truth value", int: "an integer", float: "a number", dict: "a structure"}
    kind = "empty" if value is None else kinds.get(type(value), f"of type {type(value).__name__}")
    raise DataError(f"{place}: is {kind}, must be text; convert the column, or remove the row")


def _messages(value: Any, place: str, has_image: bool) -> list[Turn]:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise DataError(f"{place}: must be a list of messages with role and content")
    turns: list[Turn] = []
    for index, message in enumerate(value):
        role = message.get("role")
        if role not in ("user", "assistant"):
            hint = "; give system text as `system` of the stage" if role == "system" else ""
            raise DataError(f"{place}[{index}].role: is {role!r:.80}, must be user or assistant{hint}")
        turns.append(Turn(role, _content(message.get("content"), f"{place}[{index}].content")))
    if has_image and not any(IMAGE_PLACEHOLDER in turn.text for turn in turns):
        for index, turn in enumerate(turns):
            if turn.role == "user":
                turns[index] = Turn("user", f"{IMAGE_PLACEHOLDER}\n{turn.text}")
                break
    return turns


def _content(value: Any, place: str) -> str:
    """Write content as text: a string as it is, a list of parts as lines."""
    if not isinstance(value, list):
        return _text(value, place)
    lines = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            lines.append(IMAGE_PLACEHOLDER)
        elif kind == "text":
            lines.append(_text(part.get("text"), place))
        else:
            raise DataError(f"{place}: has a part of type {kind!r:.80}, must be text or image")
    return "\n".join(lines)
