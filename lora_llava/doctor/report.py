"""The report of a check: everything that was found, as `check.json` holds it, and the lists that `exclude` reads."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_llava import __version__
from lora_llava.data.bad_records import BadRecord, Exclusions, write_bad_records
from lora_llava.doctor.catalogue import EXCLUDABLE, KINDS, SEVERITIES, Severity
from lora_llava.doctor.compare import Finding, at, compare_sides, of_bad
from lora_llava.doctor.conversations import Conversations
from lora_llava.doctor.figures import side_figures
from lora_llava.doctor.references import reference_findings
from lora_llava.doctor.survey import Source, Survey
from lora_llava.errors import DataError
from lora_llava.run_directory.written import note_all, read_written
from lora_llava.system.files import json_text, shown_path, staged_file

REPORT, PAGE, LISTS = "check.json", "check.html", "bad_records"
FORMAT = 1
"""Version of `check.json`."""
MOSTLY, MIN_ALIKE = 0.9, 5
"""Share of the records of a source, and their number, that make one finding if they fail in the same way."""
_PLACE = re.compile(r"^.*?, record \d+(?: \([^)]*\))?: ")
MOST_LISTED = 1000
"""Findings of one kind that `check.json` lists; their number is that of all. Lists of bad records are complete."""


@dataclass(slots=True)
class Report:
    """All that a check found."""

    survey: Survey
    conversations: Conversations
    findings: dict[str, list[Finding]]
    """By kind, in the order of the catalogue; kinds without a finding are left out."""
    figures: dict[str, dict[str, Any]]
    """By the name of the side."""
    seconds: float

    def count(self, severity: Severity) -> int:
        """Count findings of one severity."""
        found = (one for kind, ones in self.findings.items() if KINDS[kind].severity == severity for one in ones)
        return sum(one.count for one in found)

    @property
    def lists(self) -> dict[str, tuple[str, int]]:
        """Lists of bad records: by the recipe's key that names them, the file and the bad records in it."""
        return {
            f"{source.key}.exclude": (f"{LISTS}/{source.name}.jsonl", len(source.bad.found))
            for source in self.survey.sources
            if source.bad.found and source.records
        }

    def as_json(self) -> dict[str, Any]:
        """Return the content of `check.json`."""
        return {
            "format": FORMAT,
            "recipe": self.survey.recipe.name,
            "version": __version__,
            "seconds": round(self.seconds, 1),
            "counts": {severity: self.count(severity) for severity in SEVERITIES},
            "sources": [
                {
                    "name": source.name,
                    "data": source.data_name,
                    "usable_records": len(source.records),
                    "bad_records": len(source.bad.found),
                }
                for source in self.survey.sources
            ],
            "findings": [_kind_as_json(kind, found) for kind, found in self.findings.items()],
            "exclude": {key: {"file": file, "records": count} for key, (file, count) in self.lists.items()},
            "plans": dict(self.conversations.plans),
            "sides": self.figures,
        }


def make_report(survey: Survey, conversations: Conversations, seconds: float) -> Report:
    """Bring the halves of a check together."""
    found = [*_bad(survey), *compare_sides(survey), *conversations.findings]
    for source, record in survey.unanswered:
        found.append(at("no_answer", source, record, record.where, record.image))
    found += reference_findings(survey, conversations.tokenizer)
    findings = {kind: [one for one in found if one.kind == kind] for kind in KINDS}
    return Report(
        survey,
        conversations,
        {kind: ones for kind, ones in findings.items() if ones},
        {side.name: side_figures(survey, side, conversations.sizes.get(side.name)) for side in survey.sides},
        seconds,
    )


def _bad(survey: Survey) -> Iterator[Finding]:
    for source in survey.sources:
        if source.error is not None:
            yield Finding(
                "data_file", source.name, source.data_name, 0, None, _without_paths(str(source.error), source)
            )
        assert all(bad.kind in EXCLUDABLE for bad in source.bad.found)
        yield from _of_source(source)


def _of_source(source: Source) -> Iterator[Finding]:
    """Make a finding of each bad record, or a single one where nearly every record fails in the same way."""
    bad = sorted(source.bad.found, key=lambda one: one.record)
    reasons = Counter(map(_reason, bad))
    [(reason, count)] = reasons.most_common(1) or [("", 0)]
    if count >= MIN_ALIKE and count >= MOSTLY * (len(bad) + len(source.records)):
        alike = [one for one in bad if _reason(one) == reason]
        first = alike[0]
        share = "Every record" if not source.records and len(alike) == len(bad) else f"Nearly every record ({count:,})"
        what = "has the wrong form: this is not LLaVA JSON" if first.kind == "form" else "fails in the same way"
        problem = f"{source.data_name}: {share} {what}. The first: {_without_place(first.problem)}"
        yield Finding(first.kind, source.name, source.data_name, first.record, first.id, problem, count=count)
        bad = [one for one in bad if _reason(one) != reason]
    for one in bad:
        yield of_bad(source, one)


def _reason(bad: BadRecord) -> str:
    """Return what records that fail in the same way have in common; those of a wrong form differ by their keys."""
    return bad.kind if bad.kind == "form" else _without_place(bad.problem)


def _without_place(problem: str) -> str:
    return _PLACE.sub("", problem, count=1)


def _without_paths(text: str, source: Source) -> str:
    """Name the files of a source by their last part: a report is passed on, and shows no directory of the user's."""
    for path in (source.data.exclude, source.data.image_root, source.data.path):
        if path is not None and Path(path).is_absolute():
            text = text.replace(path, Path(path).name)
    return text


def _kind_as_json(kind: str, found: list[Finding]) -> dict[str, Any]:
    return {
        "kind": kind,
        "severity": KINDS[kind].severity,
        "title": KINDS[kind].title,
        "count": sum(one.count for one in found),
        "records": [
            {"source": one.source, "data": one.data, "record": one.record, "id": one.id, "problem": one.problem}
            for one in found[:MOST_LISTED]
        ],
    }


def write_report(report: Report, page: str, directory: Path) -> None:
    """Write the report, its page and the lists; each file appears when it is complete, `check.json` last.

    Files of an earlier check are replaced. Raises DataError, before anything is written, if a file that no check wrote,
    or that was changed since, has the name of one.
    """
    lists = directory / LISTS
    in_use = {os.path.realpath(one.data.exclude) for one in report.survey.sources if one.data.exclude}
    _refuse_foreign(directory, [f"{LISTS}/{one.name}.jsonl" for one in report.survey.sources], in_use)
    lists.mkdir(parents=True, exist_ok=True)
    for source in report.survey.sources:
        name = f"{LISTS}/{source.name}.jsonl"
        if not source.bad.found or not source.records:
            (directory / name).unlink(missing_ok=True)
            continue
        # A list that was in use is taken over: the new one replaces it.
        before = [
            BadRecord(source.data_name, number, identity, "excluded", "left out before")
            for number, identity in Exclusions(source.data.exclude).ids.items()
        ]
        with _listed(directory, name) as path:
            write_bad_records(path, [*source.bad.found, *before])
    if not any(lists.iterdir()):
        lists.rmdir()
    for name, text in ((PAGE, page), (REPORT, json_text(report.as_json(), indent=2, ensure_ascii=False) + "\n")):
        with _listed(directory, name) as path:
            path.write_text(text, encoding="utf-8")


@contextmanager
def _listed(directory: Path, name: str) -> Iterator[Path]:
    """Give a path to write to; the file is listed as the kit's and named when the block ends."""
    with staged_file(directory / name) as path:
        yield path
        note_all(directory, {name: path})


def _refuse_foreign(directory: Path, lists: list[str], in_use: set[str]) -> None:
    written = read_written(directory)
    for name in (PAGE, REPORT, *lists):
        path = directory / name
        # What a list in use holds is taken over into the new one, however it was edited.
        taken_over = os.path.realpath(path) in in_use and not path.is_symlink()
        ours = written is not None and written.is_ours(name)
        if os.path.lexists(path) and not taken_over and not ours:
            raise DataError(
                f"{shown_path(path)} was not written by lora-llava check, or was changed since; move it elsewhere, or "
                "give another directory with --output"
            )
