"""Data files and data sets as records, and their split into training and validation."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable
from pathlib import Path

from lora_llava.conversation import IMAGE_PLACEHOLDER, Turn
from lora_llava.data.columns import load_columns
from lora_llava.data.llava_json import load_llava_json
from lora_llava.data.sources import ImageSource, Record
from lora_llava.errors import DataError
from lora_llava.recipe_stages import DataSettings

__all__ = ["ImageSource", "Record", "fingerprint", "load_records", "load_split", "merge_turns"]


def load_records(data: DataSettings) -> list[Record]:
    """Read all records, in their order; images are looked up, not opened.

    Raises DataError naming file, record and field.
    """
    if data.answer_prompt and IMAGE_PLACEHOLDER in data.answer_prompt:
        raise DataError(f"answer_prompt: must not contain {IMAGE_PLACEHOLDER}; remove it")
    root = None if data.image_root is None else Path(data.image_root)
    if data.columns is not None:
        records = load_columns(data, data.columns, root)
    else:
        records = load_llava_json(Path(data.path), root, data.answer_prompt, data.max_records)
    if not records:
        raise DataError(f"{data.path}: holds no records; correct path or split")
    return records


def load_split(data: DataSettings, seed: int) -> tuple[list[Record], list[Record]]:
    """Read training and validation records; the latter are empty if the settings ask for none.

    A share is drawn by image: no image is on both sides. Raises DataError.
    """
    train, validation = _split(data, load_records(data), seed)
    return (merge_turns(train, data.merge_turns) if data.merge_turns else train), validation


def _split(data: DataSettings, records: list[Record], seed: int) -> tuple[list[Record], list[Record]]:
    if data.validation is None:
        return records, []
    if data.validation.path is not None:
        held_out = data.model_copy(
            update={"path": data.validation.path, "validation": None, "max_records": None},
        )
        return records, load_records(held_out)
    assert data.validation.share is not None
    chosen = _draw(records, data.validation.share, seed, data.path)
    return (
        [record for index, record in enumerate(records) if index not in chosen],
        [record for index, record in enumerate(records) if index in chosen],
    )


def merge_turns(records: Iterable[Record], most: int) -> list[Record]:
    """Make one conversation of consecutive questions about an image, at most `most` of them in each.

    So LLaVA-1.5's training data was made (arXiv 2310.03744, section 3.3). The order is kept, a conversation stands
    where its first record stood; a record is never cut, and text-only records stay as they are.
    """
    merged: list[list[Record]] = []
    counts: list[int] = []
    open_at: dict[str, int] = {}
    for record in records:
        questions = len(record.turns) // 2
        place = None if record.image is None else open_at.get(record.image.key)
        if place is not None and counts[place] + questions <= most:
            merged[place].append(record)
            counts[place] += questions
            continue
        if record.image is not None:
            open_at[record.image.key] = len(merged)
        merged.append([record])
        counts.append(questions)
    return [_joined(group) for group in merged]


def _joined(records: list[Record]) -> Record:
    """Put records about one image in a row; the image is shown in the first."""
    first, *others = records
    if not others:
        return first
    turns = list(first.turns)
    for other in others:
        turns += (Turn(turn.role, turn.text.replace(IMAGE_PLACEHOLDER, "").strip()) for turn in other.turns)
    return Record(first.id, first.image, tuple(turns), f"{first.where} and {len(others)} more about its image")


def _draw(records: list[Record], share: float, seed: int, name: str) -> set[int]:
    """Choose validation records, at least one and never all: whole images, text-only records one by one."""
    groups: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        key = f"text/{index}" if record.image is None else f"image/{record.image.key}"
        groups.setdefault(key, []).append(index)
    if len(groups) < 2:
        raise DataError(
            f"{name}: validation.share: all {len(records)} records show one image, so none can be held out; "
            "give validation.path"
        )
    wanted = min(max(1, round(share * len(records))), len(records) - 1)
    shuffled = list(groups.values())
    random.Random(f"validation/{seed}").shuffle(shuffled)
    chosen: set[int] = set()
    for group in shuffled:
        if len(chosen) + len(group) <= wanted:
            chosen.update(group)
    if not chosen:
        smallest: list[int] = min(shuffled, key=len)
        chosen.update(smallest)
    return chosen


def fingerprint(records: Iterable[Record]) -> str:
    """Hash ids, turns and image keys, in their order: equal data has equal fingerprints (hexadecimal sha256)."""
    digest = hashlib.sha256()
    for record in records:
        key = None if record.image is None else record.image.key
        turns = [[turn.role, turn.text] for turn in record.turns]
        digest.update(json.dumps([record.id, key, turns]).encode())
        digest.update(b"\n")
    return digest.hexdigest()
