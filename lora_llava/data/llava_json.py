"""LLaVA's own data format: JSON, or JSON Lines, of `id`, `image` and `conversations`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lora_llava.conversation import Turn
from lora_llava.data.bad_records import BadRecords, Exclusions
from lora_llava.data.sources import (
    ImageRoot,
    ImageSource,
    Record,
    check_group,
    check_placeholder,
    check_text,
    own_values,
    printable,
    with_answer_prompt,
)
from lora_llava.errors import DataError
from lora_llava.recipe_stages import DataSettings

_KEYS = frozenset({"id", "image", "conversations"})
_ROLES: dict[str, Literal["user", "assistant"]] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


def load_llava_json(
    data: DataSettings, image_root: Path | None, bad: BadRecords, *, extra: bool = False
) -> list[Record]:
    """Read the records of a `.json` or `.jsonl` file; `image_root` defaults to its directory.

    `extra`: keep the records' own keys too. Raises DataError naming file, record and field, where `bad` does not
    take it.
    """
    path = Path(data.path)
    root = ImageRoot(image_root or path.parent, "image", at_once=bad.collects, window=data.grey_window)
    excluded = Exclusions(data.exclude)
    records: list[Record] = []
    number = 0
    for entry, line in _entries(path):
        if number == data.max_records:
            break
        number += 1
        identity = None
        try:
            if isinstance(entry, bytes):
                entry = _parse(entry, f"{path.name}, {line}", lines=True)
            identity = _identity(entry)
            if not excluded.holds(number, identity):
                record = _record(entry, number, f"{path.name}, record {number}", line, root, data)
                records.append(replace(record, extra=own_values(entry, _KEYS)) if extra else record)
        except DataError as error:
            if excluded.holds(number, identity):
                continue
            bad.add(number, identity, error)
    excluded.check(number if data.max_records is None else max(number, *excluded.ids, 0))
    root.check()
    return records


def _entries(path: Path) -> Iterator[tuple[Any, str]]:
    """Yield every entry, and its line where that is known; of JSON Lines the bytes of the line."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"data file {path} cannot be read: {error.strerror}; correct path") from None
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    if path.suffix == ".jsonl":
        for number, line in enumerate(raw.split(b"\n"), start=1):
            if line.strip():
                yield line, f"line {number}"
        return
    entries = _parse(raw, path.name, lines=False)
    if not isinstance(entries, list):
        raise DataError(f"{path.name}: holds {_kind(entries)}, must hold a list of records; wrap it in [ ]")
    for entry in entries:
        yield entry, ""


def _parse(raw: bytes, place: str, *, lines: bool) -> Any:
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_number)
    except _NotJsonError as error:
        raise DataError(f"{place}: not valid JSON: {error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 at byte {error.start + 1}; save it as UTF-8") from None
    except json.JSONDecodeError as error:
        spot = f"column {error.colno}" if lines else f"line {error.lineno}, column {error.colno}"
        hint = "; for one record a line, name the file .jsonl" if error.msg == "Extra data" and not lines else ""
        raise DataError(f"{place}{', ' if lines else ': '}{spot}: not valid JSON: {error.msg}{hint}") from None
    except (ValueError, RecursionError):
        raise DataError(f"{place}: not valid JSON: a number too long, or nested too deeply; correct it") from None


class _NotJsonError(Exception):
    """Something that Python reads and JSON does not have."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a mapping of an object's members; Python's own would keep the last of two with one key, without a word."""
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _NotJsonError(f"key {twice!r:.80} stands twice in one object; remove one")
    return made


def _no_number(word: str) -> None:
    raise _NotJsonError(f"{word} is not a number of JSON; write null, or a number")


def _identity(entry: Any) -> str | None:
    """Return the id of an entry as it is given; None if it has none that can be used."""
    given = entry.get("id") if isinstance(entry, dict) else None
    if given is None or isinstance(given, bool) or not isinstance(given, str | int):
        return None
    text = str(given)
    return text if text.encode("utf-8", "replace").decode("utf-8") == text else None


def _record(entry: Any, number: int, place: str, line: str, root: ImageRoot, data: DataSettings) -> Record:
    if not isinstance(entry, dict):
        suffix = f" ({line})" if line else ""
        raise DataError(f"{place}{suffix}: is {_kind(entry)}, must be an object with id, image and conversations")
    given = entry.get("id")
    if given is not None and (isinstance(given, bool) or not isinstance(given, str | int)):
        raise DataError(f"{place}: id: is {_kind(given)}, must be a string or an integer")
    details = [line] if line else []
    if given is not None:
        details.append(f"id {printable(check_text(str(given), f'{place}: id'))}")
    where = f"{place} ({', '.join(details)})" if details else place
    image = _image(entry.get("image"), where, root)
    turns = _turns(entry.get("conversations"), where, data.answer_prompt)
    check_placeholder(turns, image, f"{where}: conversations")
    group = None if data.group is None else check_group(entry.get(data.group), f"{where}: {data.group}")
    return Record(str(number) if given is None else str(given), image, turns, where, number, group)


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
