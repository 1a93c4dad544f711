"""LLaVA's own data format: JSON, or JSON Lines, of `id`, `image` and `conversations`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from lora_llava.conversation import Turn
from lora_llava.data.sources import (
    ImageRoot,
    ImageSource,
    Record,
    check_placeholder,
    check_text,
    with_answer_prompt,
)
from lora_llava.errors import DataError

_ROLES: dict[str, Literal["user", "assistant"]] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


def load_llava_json(
    path: Path, image_root: Path | None, answer_prompt: str | None, max_records: int | None
) -> list[Record]:
    """Read the records of a `.json` or `.jsonl` file; `image_root` defaults to its directory.

    Raises DataError naming file, record and field.
    """
    root = ImageRoot(image_root or path.parent, "image")
    records: list[Record] = []
    for entry, place in _entries(path):
        if max_records is not None and len(records) == max_records:
            break
        records.append(_record(entry, f"{path.name}, record {len(records) + 1}", place, root, answer_prompt))
    root.check()
    return records


def _entries(path: Path) -> Iterator[tuple[Any, str]]:
    """Yield every entry, and its line where that is known."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"data file {path} cannot be read: {error.strerror}; correct path") from None
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    if path.suffix == ".jsonl":
        for number, line in enumerate(raw.split(b"\n"), start=1):
            if line.strip():
                yield _parse(line, f"{path.name}, line {number}", lines=True), f"line {number}"
        return
    entries = _parse(raw, path.name, lines=False)
    if not isinstance(entries, list):
        raise DataError(f"{path.name}: holds {_kind(entries)}, must hold a list of records; wrap it in [ ]")
    for entry in entries:
        yield entry, ""


def _parse(raw: bytes, place: str, *, lines: bool) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 at byte {error.start + 1}; save it as UTF-8") from None
    except json.JSONDecodeError as error:
        spot = f"column {error.colno}" if lines else f"line {error.lineno}, column {error.colno}"
        hint = "; for one record a line, name the file .jsonl" if error.msg == "Extra data" and not lines else ""
        raise DataError(f"{place}{', ' if lines else ': '}{spot}: not valid JSON: {error.msg}{hint}") from None
    except (ValueError, RecursionError):
        raise DataError(f"{place}: not valid JSON: a number too long, or nested too deeply; correct it") from None


def _record(entry: Any, place: str, line: str, root: ImageRoot, answer_prompt: str | None) -> Record:
    if not isinstance(entry, dict):
        suffix = f" ({line})" if line else ""
        raise DataError(f"{place}{suffix}: is {_kind(entry)}, must be an object with id, image and conversations")
    given = entry.get("id")
    if given is not None and (isinstance(given, bool) or not isinstance(given, str | int)):
        raise DataError(f"{place}: id: is {_kind(given)}, must be a string or an integer")
    details = [line] if line else []
    if given is not None:
        details.append(f"id {check_text(str(given), f'{place}: id')[:80]}")
    where = f"{place} ({', '.join(details)})" if details else place
    image = _image(entry.get("image"), where, root)
    turns = _turns(entry.get("conversations"), where, answer_prompt)
    check_placeholder(turns, image, f"{where}: conversations")
    record_id = place.rpartition(" ")[2] if given is None else str(given)
    return Record(record_id, image, turns, where)


def _image(value: Any, where: str, root: ImageRoot) -> ImageSource | None:
    if isinstance(value, list):
        if len(value) != 1:
            raise DataError(f"{where}: image: a list of {len(value)}; a record has one image, or none (leave it out)")
        value = value[0]
    if value is None:
        return None
    if not isinstance(value, str):
        raise DataError(f"{where}: image: is {_kind(value)}, must be a path relative to image_root")
    return root.source(check_text(value, f"{where}: image"), where)


def _turns(value: Any, where: str, answer_prompt: str | None) -> tuple[Turn, ...]:
    if not isinstance(value, list) or not value:
        found = "missing" if value is None else "empty" if value == [] else _kind(value)
        raise DataError(f"{where}: conversations: is {found}, must be a list of turns with from and value")
    turns = []
    for index, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise DataError(f"{where}: conversations[{index}]: is {_kind(turn)}, must be an object with from and value")
        speaker, text = turn.get("from"), turn.get("value")
        role = _ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            hint = "; give system text as `system` of the stage" if speaker == "system" else ""
            raise DataError(
                f"{where}: conversations[{index}].from: is {speaker!r:.80}, must be one of {', '.join(_ROLES)}{hint}"
            )
        if not isinstance(text, str):
            raise DataError(f"{where}: conversations[{index}].value: is {_kind(text)}, must be a string")
        check_text(text, f"{where}: conversations[{index}].value")
        turns.append(Turn(role, with_answer_prompt(text, answer_prompt) if role == "user" else text))
    return tuple(turns)


def _kind(value: Any) -> str:
    """Name the kind of a JSON value, with its article."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
