"""The report of a check: all findings, as in `check.json`, and the lists that `exclude` reads."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from lora_llava import __version__
from lora_llava.data.bad_records import BadRecord, write_bad_records
from lora_llava.doctor.catalogue import EXCLUDABLE, KINDS, SEVERITIES, Severity
from lora_llava.doctor.compare import Finding, compare_sides, finding_about, finding_at
from lora_llava.doctor.content.answers import answer_findings
from lora_llava.doctor.content.boxes import box_findings
from lora_llava.doctor.content.references import reference_findings
from lora_llava.doctor.content.texts import text_findings
from lora_llava.doctor.conversations import Conversations
from lora_llava.doctor.figures import side_figures
from lora_llava.doctor.survey import Source, Survey
from lora_llava.errors import DataError
from lora_llava.run_directory.written import note_all, read_written
from lora_llava.system.files import disk_errors, json_text, shown_path, staged_file

REPORT, PAGE, _LISTS = "check.json", "check.html", "bad_records"
_FORMAT = 1
"""Version of `check.json`."""
_MIN_SHARE_ALIKE, _MIN_ALIKE = 0.9, 5
"""At least this share of a source's records, and this many, become one finding if they fail in the same way."""
_LOCATION = re.compile(r"^.*?, record \d+(?: \([^)]*\))?: ")
_MAX_LISTED = 1000
"""Findings of one kind listed in `check.json`; counts and lists of bad records are complete."""


@dataclass(slots=True)
class Report:
    """Everything that a check found."""

    survey: Survey
    conversations: Conversations
    findings: dict[str, list[Finding]]
    """By kind, in the order of `KINDS`; only kinds with findings."""
    figures: dict[str, dict[str, Any]]
    """By the name of the side."""
    seconds: float

    def count(self, severity: Severity) -> int:
        """Count findings of one severity."""
        kinds = (kind for kind in self.findings if KINDS[kind].severity == severity)
        return sum(finding.count for kind in kinds for finding in self.findings[kind])

    @property
    def lists(self) -> dict[str, tuple[str, int]]:
        """Lists of bad records: by the recipe key that would name it, the file and its number of records."""
        return {
            f"{source.key}.exclude": (f"{_LISTS}/{source.name}.jsonl", len(source.bad.records))
            for source in self.survey.sources
            if source.bad.records and source.records
        }

    def as_json(self) -> dict[str, Any]:
        """Return the content of `check.json`."""
        return {
            "format": _FORMAT,
            "recipe": self.survey.recipe.name,
            "version": __version__,
            "seconds": round(self.seconds, 1),
            "counts": {severity: self.count(severity) for severity in SEVERITIES},
            "sources": [
                {
                    "name": source.name,
                    "data": source.data_name,
                    "usable_records": len(source.records),
                    "bad_records": len(source.bad.records),
                }
                for source in self.survey.sources
            ],
            "findings": [_kind_as_json(kind, findings) for kind, findings in self.findings.items()],
            "exclude": {key: {"file": file, "records": count} for key, (file, count) in self.lists.items()},
            "plans": dict(self.conversations.plans),
            **({"mixes": dict(self.conversations.mixes)} if self.conversations.mixes else {}),
            "sides": self.figures,
        }


def make_report(survey: Survey, conversations: Conversations, seconds: float) -> Report:
    """Combine the two halves of a check."""
    unanswered = (finding_at("no_answer", *asked, asked[1].where, asked[1].image) for asked in survey.unanswered)
    findings: dict[str, list[Finding]] = {kind: [] for kind in KINDS}
    for finding in chain(
        _bad_records(survey),
        compare_sides(survey),
        conversations.findings,
        unanswered,
        reference_findings(survey, conversations.tokenizer),
        text_findings(survey),
        box_findings(survey),
        answer_findings(survey),
    ):
        findings[finding.kind].append(finding)
    return Report(
        survey,
        conversations,
        {kind: of_kind for kind, of_kind in findings.items() if of_kind},
        {side.name: side_figures(survey, side, conversations) for side in survey.sides},
        seconds,
    )


def _bad_records(survey: Survey) -> Iterator[Finding]:
    """Yield the sources that cannot be read, and the bad records of the others."""
    for source in survey.sources:
        if source.error is not None:
            kind = "key" if source.error.kind == "key" else "data_file"
            yield finding_about(kind, source, _without_paths(str(source.error), source))
        assert all(bad.kind in EXCLUDABLE for bad in source.bad.records)
        yield from _bad_records_of(source)


def _bad_records_of(source: Source) -> Iterator[Finding]:
    """Yield a finding for each bad record, or a single one if nearly all records fail in the same way."""
    bad = sorted(source.bad.records, key=lambda record: record.record)
    reasons = Counter(map(_reason, bad))
    [(reason, count)] = reasons.most_common(1) or [("", 0)]
    if count >= _MIN_ALIKE and count >= _MIN_SHARE_ALIKE * (len(bad) + len(source.records)):
        alike = [record for record in bad if _reason(record) == reason]
        first = alike[0]
        share = "Every record" if not source.records and len(alike) == len(bad) else f"Nearly every record ({count:,})"
        what = "has the wrong form: this is not LLaVA JSON" if first.kind == "form" else "fails in the same way"
        problem = f"{source.data_name}: {share} {what}. The first: {_without_location(first.problem)}"
        yield Finding(first.kind, source.name, source.data_name, first.record, first.id, problem, count=count)
        bad = [record for record in bad if _reason(record) != reason]
    for record in bad:
        yield Finding(record.kind, source.name, record.data, record.record, record.id, record.problem)


def _reason(bad: BadRecord) -> str:
    """Return what records that fail alike have in common; problems of form name keys, which differ."""
    return bad.kind if bad.kind == "form" else _without_location(bad.problem)


def _without_location(problem: str) -> str:
    return _LOCATION.sub("", problem, count=1)


def _without_paths(text: str, source: Source) -> str:
    """Shorten the paths of a source to file names: reports are shared, and show no directory of the user."""
    for path in (source.data.exclude, *source.data.image_roots, source.data.image_root, source.data.path):
        if path is not None and Path(path).is_absolute():
            text = text.replace(path, Path(path).name)
    return text


def _kind_as_json(kind: str, findings: list[Finding]) -> dict[str, Any]:
    return {
        "kind": kind,
        "severity": KINDS[kind].severity,
        "title": KINDS[kind].title,
        "count": sum(finding.count for finding in findings),
        "records": [
            {key: getattr(finding, key) for key in ("source", "data", "record", "id", "problem")}
            for finding in findings[:_MAX_LISTED]
        ],
    }


def write_report(report: Report, page: str, directory: Path) -> None:
    """Write the report, its page and the lists; each file appears once it is complete, `check.json` last.

    Files of an earlier check are replaced. Raises DataError before anything is written if a file in the way was not
    written by a check, or was changed since.
    """
    lists = directory / _LISTS
    in_use = {os.path.realpath(source.data.exclude) for source in report.survey.sources if source.data.exclude}
    _refuse_foreign(directory, [f"{_LISTS}/{source.name}.jsonl" for source in report.survey.sources], in_use)
    lists.mkdir(parents=True, exist_ok=True)
    for source in report.survey.sources:
        name = f"{_LISTS}/{source.name}.jsonl"
        if not source.bad.records or not source.records:
            (directory / name).unlink(missing_ok=True)
            continue
        with _listed(directory, name) as path:
            # The new list replaces the one in use, so it takes over its records.
            write_bad_records(path, [*source.bad.records, *source.excluded()])
    if not any(lists.iterdir()):
        lists.rmdir()
    for name, text in ((PAGE, page), (REPORT, json_text(report.as_json(), indent=2, ensure_ascii=False) + "\n")):
        with _listed(directory, name) as path:
            path.write_text(text, encoding="utf-8")


@contextmanager
def _listed(directory: Path, name: str) -> Iterator[Path]:
    """Yield a path to write to; when the block ends, the file gets its name and is recorded as the kit's."""
    with disk_errors(directory / name, "The report is not complete"), staged_file(directory / name) as path:
        yield path
        note_all(directory, {name: path})


def _refuse_foreign(directory: Path, lists: list[str], in_use: set[str]) -> None:
    """Raise DataError for a file in the way that no check wrote; `in_use`: lists that the recipe excludes by."""
    written = read_written(directory)
    for name in (PAGE, REPORT, *lists):
        path = directory / name
        # The new list takes over the records of a list in use, even of an edited one.
        taken_over = os.path.realpath(path) in in_use and not path.is_symlink()
        ours = written is not None and written.is_ours(name)
        if os.path.lexists(path) and not taken_over and not ours:
            raise DataError(
                f"{shown_path(path)} was not written by lora-llava check, or was changed since; move it elsewhere, or "
                "give another directory with --output"
            )
