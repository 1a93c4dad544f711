"""Data files as records. Every error names the file, the record and the field."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_llava.conversation import IMAGE_PLACEHOLDER, Turn
from lora_llava.errors import DataError
from lora_llava.recipe import DataSettings

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Where an image's bytes are."""

    key: str
    """Identity of the image: its path below the image root, or the hash of its bytes."""
    path: Path | None = None
    data: bytes | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of a data file."""

    id: str
    image: ImageSource | None
    turns: tuple[Turn, ...]
    where: str
    """File, place and id, for messages."""


def load_records(data: DataSettings) -> list[Record]:
    """Read every record that `data` names; DataError for the first that cannot be used."""
    if data.columns is not None:
        from lora_llava.data.columns import read_columns

        records = read_columns(data)
    else:
        records = read_llava(data)
    if not records:
        raise DataError(f"{data.path}: holds no record")
    return records


def load_split(data: DataSettings, seed: int) -> tuple[list[Record], list[Record]]:
    """Return training and validation records; split by share, no image is on both sides.

    Raises DataError if a share would leave one side empty.
    """
    records = load_records(data)
    if data.validation is None:
        return records, []
    if data.validation.path is not None:
        other = data.model_copy(update={"path": data.validation.path, "max_records": None, "validation": None})
        return records, load_records(other)
    assert data.validation.share is not None
    keys = [f"image {record.image.key}" if record.image else f"text {place}" for place, record in enumerate(records)]
    order = list(dict.fromkeys(keys))
    random.Random(f"validation/{seed}").shuffle(order)
    counts = {key: 0 for key in order}
    for key in keys:
        counts[key] += 1
    wanted = max(1.0, data.validation.share * len(records))
    held: set[str] = set()
    taken = 0
    for key in order:
        if taken >= wanted:
            break
        held.add(key)
        taken += counts[key]
    if len(held) == len(order):
        raise DataError(
            f"{data.path}: a validation share of {data.validation.share} of {len(order)} images leaves nothing to train "
            "on; lower it, or give validation.path"
        )
    train = [record for record, key in zip(records, keys, strict=True) if key not in held]
    validation = [record for record, key in zip(records, keys, strict=True) if key in held]
    return train, validation


def fingerprint(records: Sequence[Record]) -> str:
    """Hash ids, turns and image keys, in order."""
    digest = hashlib.sha256()
    for record in records:
        turns = [[turn.role, turn.text] for turn in record.turns]
        line = json.dumps([record.id, record.image and record.image.key, turns], ensure_ascii=False)
        digest.update(line.encode("utf-8") + b"\n")
    return digest.hexdigest()


def with_answer_prompt(turns: Sequence[Turn], prompt: str | None) -> tuple[Turn, ...]:
    """Append the text that says what form the answer takes to every question."""
    if prompt is None:
        return tuple(turns)
    return tuple(Turn(turn.role, f"{turn.text}\n{prompt}") if turn.role == "user" else turn for turn in turns)


def read_llava(data: DataSettings) -> list[Record]:
    """Read LLaVA's JSON (a list) or JSONL (an object a line)."""
    path = Path(data.path)
    root = Path(data.image_root) if data.image_root else path.parent
    root = root.resolve()
    known: dict[str, ImageSource] = {}
    records: list[Record] = []
    for place, entry in _entries(path):
        if data.max_records is not None and len(records) == data.max_records:
            break
        records.append(_record(entry, place, root, known, data.answer_prompt))
    return records


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from error
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield f"{path.name}, line {number}", _parse(line, f"{path}, line {number}")
        return
    entries = _parse(text, str(path))
    if not isinstance(entries, list):
        raise DataError(f"{path}: LLaVA JSON is a list of records; the file holds a {type(entries).__name__}")
    for number, entry in enumerate(entries):
        yield f"{path.name}, record {number}", entry


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not usable JSON: {type(error).__name__}") from error


def _record(
    entry: Any, place: str, root: Path, known: dict[str, ImageSource], answer_prompt: str | None
) -> Record:
    if not isinstance(entry, dict):
        raise DataError(f"{place}: a record is an object with conversations; got a {type(entry).__name__}")
    identity = str(entry.get("id", place.rsplit(" ", 1)[-1]))
    where = f"{place} (id {identity})" if "id" in entry else place
    turns = tuple(_turns(entry.get("conversations"), where))
    image = _image(entry.get("image"), root, where, known)
    placeholders = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "user")
    if image is not None and placeholders != 1:
        raise DataError(
            f"{where}, field conversations: {placeholders} {IMAGE_PLACEHOLDER} for one image; put exactly one in the "
            "first question"
        )
    if image is None and placeholders:
        raise DataError(f"{where}, field image: missing, but the conversation holds {IMAGE_PLACEHOLDER}")
    return Record(identity, image, with_answer_prompt(turns, answer_prompt), where)


def _turns(conversations: Any, where: str) -> Iterator[Turn]:
    if not isinstance(conversations, list) or not conversations:
        raise DataError(f"{where}, field conversations: needed a list of turns with from and value")
    for number, turn in enumerate(conversations, start=1):
        if not isinstance(turn, dict) or turn.get("from") not in _ROLES:
            got = turn.get("from") if isinstance(turn, dict) else type(turn).__name__
            raise DataError(f"{where}, field conversations, turn {number}: from is {got!r}, needed human or gpt")
        text = turn.get("value")
        if not isinstance(text, str):
            raise DataError(f"{where}, field conversations, turn {number}: value must be text, got {text!r}")
        yield checked_turn(_ROLES[turn["from"]], text, f"{where}, field conversations, turn {number}")


def checked_turn(role: str, text: str, where: str) -> Turn:
    """Make a turn; DataError if its text is not valid Unicode (half of a surrogate pair)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: the text holds half of a Unicode character (position {error.start})") from error
    return Turn("user" if role == "user" else "assistant", text)


def _image(value: Any, root: Path, where: str, known: dict[str, ImageSource]) -> ImageSource | None:
    if value is None:
        return None
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}, field image: needed one path below the image root, got {value!r}")
    if value not in known:
        known[value] = ImageSource(value, _safe_path(value, root, where))
    return known[value]


def _safe_path(value: str, root: Path, where: str) -> Path:
    """Refuse whatever does not stay below the image root: URLs, absolute paths, `..`, links that lead out."""
    if ":" in value.split("/", 1)[0] or "\0" in value:
        raise DataError(f"{where}, field image: {value!r} is not a path below the image root; URLs are not read")
    try:
        path = (root / value).resolve()
        inside = not Path(value).is_absolute() and path.is_relative_to(root)
        found = path.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{where}, field image: {value[:80]!r} is not a usable path") from error
    if not inside:
        raise DataError(f"{where}, field image: {value!r} leads out of the image root {root}")
    if not found:
        raise DataError(f"{where}, field image: {value!r} is not there (image root {root})")
    return path
