"""Load records from data files and datasets, and split them into training and validation."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from lora_llava.conversation.encode import IMAGE_PLACEHOLDER, Turn
from lora_llava.data.bad_records import BadRecord, BadRecords
from lora_llava.data.mixing import check_apart, mixed, source_names
from lora_llava.data.record import ImageSource, Record
from lora_llava.data.sources.columns import load_columns
from lora_llava.data.sources.llava_json import load_llava_json
from lora_llava.data.sources.tables import JSON_SUFFIXES
from lora_llava.errors import DataError
from lora_llava.recipe.stages import DataSettings
from lora_llava.system.processes import in_processes
from lora_llava.system.text import counted

CheckRecord = Callable[[Record], object]
"""Raises DataError for an unusable record."""


def load_records(
    data: DataSettings,
    skipped: list[BadRecord] | None = None,
    check: CheckRecord | None = None,
    *,
    extra: bool = False,
) -> list[Record]:
    """Load all usable records, in order. Images are located, but not opened.

    `extra`: also keep other keys or columns of the data, for an evaluation.

    With `on_bad_record: skip`, images are opened and records passed to `check` here, and unusable records are added to
    `skipped`: the records must not change after a run is planned. Raises DataError naming file, record and field.
    """
    bad = BadRecords.by_settings(data)
    records = read_source(data, bad, extra=extra)
    if bad.collects:
        records = drop_unusable(records, check, bad)
        if skipped is not None:
            skipped += sorted(bad.records, key=lambda record: record.record)
    if not records:
        raise DataError(f"{data.path}: holds no records; correct path or split")
    return records


def read_source(data: DataSettings, bad: BadRecords, *, extra: bool = False) -> list[Record]:
    """Read the records of one source, except those that `bad` collects. Images are located, but not opened.

    `extra`: also keep other keys or columns of the data.
    """
    if data.answer_prompt and IMAGE_PLACEHOLDER in data.answer_prompt:
        raise DataError(f"answer_prompt: must not contain {IMAGE_PLACEHOLDER}; remove it")
    root = None if data.image_root is None else Path(data.image_root)
    if data.columns is None and data.path.endswith(JSON_SUFFIXES):
        return load_llava_json(data, root, bad, extra=extra)
    return load_columns(data, root, bad, extra=extra)


def drop_unusable(records: list[Record], check: CheckRecord | None, bad: BadRecords) -> list[Record]:
    """Return the records that pass `check` and whose image can be opened; each image is opened once."""
    usable = []
    for record in records:
        try:
            if check is not None:
                check(record)
            usable.append(record)
        except DataError as error:
            bad.add_record(record, error)
    problems = _image_problems(usable)
    for record in usable:
        if record.image is not None and (problem := problems.get(record.image.identity)) is not None:
            bad.add_record(record, problem)
    return [record for record in usable if record.image is None or record.image.identity not in problems]


def _image_problems(records: Iterable[Record]) -> dict[str, DataError]:
    """Open every image once; return the errors by the identity of the image."""
    # Imported here: reading records does not need the image libraries.
    from lora_llava.data.images.read import image_problem

    sources = {record.image.identity: record.image for record in records if record.image is not None}
    errors = in_processes(image_problem, list(sources.values()), on_crash=image_kills_its_reader, label="images")
    return {image: error for image, error in zip(sources, errors, strict=True) if error is not None}


def image_kills_its_reader(source: ImageSource) -> DataError:
    """Return the error for an image whose decoder crashed its process."""
    return DataError(
        f"{source.name}: reading the image ended the process; take it out, and treat it as hostile", "bad_image"
    )


def load_split(
    data: DataSettings, seed: int, skipped: list[BadRecord] | None = None, check: CheckRecord | None = None
) -> tuple[list[Record], list[Record]]:
    """Load training and validation records, see `load_records`; no validation records if the settings ask for none.

    A share is drawn by whole images and groups, so none of them is in both splits. Raises DataError.
    """
    if data.others:
        return _load_mix(data, seed, skipped, check)
    records = load_records(data, skipped, check)
    held_out = held_out_source(data)
    if held_out is not None:
        train, validation = records, load_records(held_out, skipped, check)
    else:
        train, validation = split_records(data, records, seed)
    return (merge_turns(train, data.merge_turns) if data.merge_turns else train), validation


def _load_mix(
    data: DataSettings, seed: int, skipped: list[BadRecord] | None, check: CheckRecord | None
) -> tuple[list[Record], list[Record]]:
    """Load the training and validation records of several sources; each holds out its own."""
    trains: list[list[Record]] = []
    validation: list[Record] = []
    for source, name in zip(data.sources, source_names(data.sources), strict=True):
        train, held_out = load_split(source, seed, skipped, check)
        trains.append([replace(record, source=name) for record in train])
        validation += [replace(record, source=name) for record in held_out]
    check_apart([record for records in trains for record in records], validation)
    return mixed(data.sources, trains, seed), validation


def held_out_source(data: DataSettings) -> DataSettings | None:
    """Return the settings of a separate validation source; None if there is none."""
    if data.validation is None or data.validation.path is None:
        return None
    own = {"path": data.validation.path, "exclude": data.validation.exclude}
    return data.model_copy(update={**own, "max_records": None, "validation": None, "others": []})


def split_records(data: DataSettings, records: list[Record], seed: int) -> tuple[list[Record], list[Record]]:
    """Draw the validation share, if the settings ask for one; return training and validation records."""
    if data.validation is None or data.validation.share is None:
        return records, []
    held_out = _draw(records, data.validation.share, seed, data.path)
    return (
        [record for index, record in enumerate(records) if index not in held_out],
        [record for index, record in enumerate(records) if index in held_out],
    )


def merge_turns(records: Iterable[Record], most: int) -> list[Record]:
    """Merge the questions about one image into conversations of at most `most` questions.

    As for LLaVA-1.5's training data (arXiv 2310.03744, section 3.3). A conversation takes the position of its first
    record. Records are never split, and text-only records do not change.
    """
    merged: list[list[Record]] = []
    counts: list[int] = []
    open_at: dict[tuple[str, str | None], int] = {}
    for record in records:
        questions = len(record.turns) // 2
        key = None if record.image is None else (record.image.identity, record.system)
        index = None if key is None else open_at.get(key)
        if index is not None and counts[index] + questions <= most:
            merged[index].append(record)
            counts[index] += questions
            continue
        if key is not None:
            open_at[key] = len(merged)
        merged.append([record])
        counts.append(questions)
    return [_joined(group) for group in merged]


def _joined(records: list[Record]) -> Record:
    """Join records about one image into one record; the image is in the first turn."""
    first, *others = records
    if not others:
        return first
    turns = list(first.turns)
    for other in others:
        turns += (Turn(turn.role, turn.text.replace(IMAGE_PLACEHOLDER, "").strip()) for turn in other.turns)
    where = f"{first.where} and {len(others)} more about its image"
    return Record(first.id, first.image, tuple(turns), where, first.number, first.group, system=first.system)


def _draw(records: list[Record], share: float, seed: int, name: str) -> set[int]:
    """Draw the indices of validation records, at least one and never all, by whole images and groups."""
    units = _units(records)
    if len(units) < 2:
        raise DataError(
            f"{name}: validation.share: {counted(len(records), 'record')} of one image, or of one group, so none "
            "can be held out; give validation.path"
        )
    target = min(max(1, round(share * len(records))), len(records) - 1)
    random.Random(f"validation/{seed}").shuffle(units)
    drawn: set[int] = set()
    for unit in units:
        if len(drawn) + len(unit) <= target:
            drawn.update(unit)
    smallest: list[int] = min(units, key=len)
    return drawn or set(smallest)


def _units(records: Sequence[Record]) -> list[list[int]]:
    """Group the indices of records that must stay in one split: linked by images or groups, even indirectly."""
    # Union-find over the keys of images and groups.
    parents: dict[str, str] = {}

    def root(key: str) -> str:
        parents.setdefault(key, key)
        while (above := parents[key]) != key:
            parents[key] = parents[above]
            key = parents[key]
        return key

    firsts = []
    for index, record in enumerate(records):
        keys = [] if record.image is None else [f"image/{record.image.identity}"]
        keys += [] if record.group is None else [f"group/{record.group}"]
        first, *others = keys or [f"text/{index}"]
        firsts.append(first)
        for other in others:
            parents[root(other)] = root(first)
    units: dict[str, list[int]] = {}
    for index, first in enumerate(firsts):
        units.setdefault(root(first), []).append(index)
    return list(units.values())


def fingerprint(records: Iterable[Record]) -> str:
    """Return the sha256 (hexadecimal) of ids, turns and image keys, in order: equal data has equal fingerprints."""
    digest = hashlib.sha256()
    for record in records:
        key = None if record.image is None else record.image.key
        turns = [[turn.role, turn.text] for turn in record.turns]
        own = [] if record.system is None else [record.system]
        digest.update(json.dumps([record.id, key, turns, *own]).encode())
        digest.update(b"\n")
    return digest.hexdigest()
