"""Unusable records: the first one stops the run, or each is skipped, named and counted."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_llava.data.record import Record
from lora_llava.errors import DataError
from lora_llava.recipe.fields import data_name
from lora_llava.recipe.stages import DataSettings


@dataclass(frozen=True, slots=True)
class BadRecord:
    """An unusable record: a line of `skipped.jsonl` and of the lists that `check` writes."""

    data: str
    """Name of its file or data set."""
    record: int
    """Its number there, counted from 1."""
    id: str | None
    """The id in the data; None if there is none, or it cannot be read."""
    kind: str
    problem: str

    def line(self) -> str:
        """Return the record as a line of JSON."""
        row = {"data": self.data, "record": self.record, "id": self.id, "kind": self.kind, "problem": self.problem}
        return json.dumps(row, ensure_ascii=True) + "\n"


class BadRecords:
    """Collects the bad records of one source in `records`, at most `most` of them.

    With 0, the first raises its own error; None means no limit.
    """

    def __init__(self, data: DataSettings, most: int | None) -> None:
        self.data_name = data_name(data.path)
        self.most = most
        self.records: list[BadRecord] = []

    @classmethod
    def by_settings(cls, data: DataSettings) -> BadRecords:
        """Create the collector that `on_bad_record` and `max_bad_records` ask for."""
        return cls(data, data.max_bad_records if data.on_bad_record == "skip" else 0)

    @property
    def collects(self) -> bool:
        """Whether a bad record is collected instead of stopping the reading."""
        return self.most != 0

    def add(self, number: int, identity: str | None, error: DataError) -> None:
        """Collect a bad record; raises DataError if none is allowed, or there are too many."""
        if not self.collects:
            raise error
        self.records.append(BadRecord(self.data_name, number, identity, error.kind, str(error)))
        if self.most is not None and len(self.records) > self.most:
            raise DataError(
                f"{self.data_name}: more than max_bad_records {self.most} records cannot be used; the last is {error}. "
                "Run lora-llava check for the whole list, correct them, or raise max_bad_records"
            ) from None

    def add_record(self, record: Record, error: DataError) -> None:
        """Collect a record that was read, but turned out to be bad."""
        image, text = record.image, str(error)
        # An image is opened once for all its records, and its error names the first of them.
        if image is not None and image.where and text.startswith(f"{image.where}, "):
            error = DataError(record.where + text.removeprefix(image.where), error.kind)
        self.add(record.number, None if record.id == str(record.number) else record.id, error)


class Exclusions:
    """The records listed in `exclude`, by their numbers and ids."""

    def __init__(self, path: str | None) -> None:
        self.name = "" if path is None else Path(path).name
        self.ids: dict[int, str | None] = {} if path is None else dict(_read_exclusions(Path(path)))

    def holds(self, number: int, identity: str | None) -> bool:
        """Return whether a record is excluded; DataError if its id differs from the one in the list."""
        if number not in self.ids:
            return False
        expected = self.ids[number]
        if expected is not None and expected != identity:
            raise DataError(
                f"{self.name}: record {number} should have id {expected!r:.80}, but has {identity!r:.80}: the data "
                "has changed since; run lora-llava check again"
            )
        return True

    def check(self, count: int) -> None:
        """Raise DataError if the list names a record beyond the `count` records of the data."""
        if self.ids and (last := max(self.ids)) > count:
            raise DataError(
                f"{self.name}: names record {last}, but the data has {count}: it has changed since; run lora-llava "
                "check again"
            )


def write_bad_records(path: Path, records: Iterable[BadRecord]) -> None:
    """Write a list for `exclude`, sorted by record number."""
    with path.open("w", encoding="utf-8") as handle:
        handle.writelines(record.line() for record in sorted(records, key=lambda record: record.record))


def _read_exclusions(path: Path) -> Iterable[tuple[int, str | None]]:
    if path.exists() and not path.is_file():
        raise DataError(f"exclude: {path} is not a regular file; correct exclude")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"exclude: {path} cannot be read: {error.strerror}; correct exclude") from None
    except UnicodeDecodeError:
        raise DataError(f"exclude: {path.name} is not UTF-8 text") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _exclusion(line, f"{path.name}, line {number}")


def _exclusion(line: str, where: str) -> tuple[int, str | None]:
    try:
        entry: Any = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    record = entry.get("record") if isinstance(entry, dict) else None
    identity = entry.get("id") if isinstance(entry, dict) else None
    if isinstance(record, bool) or not isinstance(record, int) or record < 1 or not isinstance(identity, str | None):
        raise DataError(f'{where}: write a record to leave out as {{"record": 17}}, with its "id" if it has one')
    return record, identity
