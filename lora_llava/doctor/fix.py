"""Write the data of a recipe without what needs no judgment to correct, with a recipe that reads them."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_llava.data.bad_records import BadRecord, Exclusions, write_bad_records
from lora_llava.data.record import Record
from lora_llava.data.sources.cells import ROLES
from lora_llava.data.sources.forms import CONVERSATIONS
from lora_llava.data.sources.selection import Entry
from lora_llava.data.sources.tables import read_entries, read_rows
from lora_llava.doctor.catalogue import KINDS
from lora_llava.doctor.report import Report
from lora_llava.doctor.survey import Source
from lora_llava.recipe.file import dump_resolved
from lora_llava.recipe.settings import Recipe
from lora_llava.recipe.stages import DataSettings
from lora_llava.system.files import json_text, staged_result
from lora_llava.system.text import counted

RECIPE, FIXES = "recipe.yaml", "fixes.json"
_DUPLICATE = "duplicate_record"
_CORRECTED = frozenset({_DUPLICATE, "other_extension"})
"""Kinds of findings that the cleaned data no longer have, besides bad records."""
_IMAGES = ("image", "images")


@dataclass(slots=True)
class _Fixes:
    """What was done to one source."""

    source: Source
    dropped: dict[int, BadRecord]
    """By record number: bad records and duplicates."""
    changed: Counter[str] = field(default_factory=Counter)
    file: str | None = None
    """Name of what was written; None if nothing was wrong."""
    num_records: int = 0
    """Number of records that stay."""

    @property
    def reasons(self) -> Counter[str]:
        """Number of dropped records by kind."""
        return Counter(bad.kind for bad in self.dropped.values())


def write_fixed(report: Report, output: Path) -> list[str]:
    """Write the cleaned sources of a check, `recipe.yaml` that reads them, and `fixes.json`; return lines for the user.

    Dropped are bad records, and duplicates but the first. Corrected are first turns of the model and extensions of
    image names. Text files are written again as JSON Lines with all keys; of other data, which may be large, only the
    list of records to leave out is written. Raises ArtifactError if `output` exists.
    """
    recipe = report.survey.recipe
    with staged_result(output) as staging:
        everything = [_fix(report, source, staging) for source in report.survey.sources if source.records]
        for fixes in everything:
            if fixes.file is not None:
                recipe = _with_data(recipe, fixes, output / fixes.file)
        (staging / RECIPE).write_text(dump_resolved(recipe, output), encoding="utf-8")
        content = {"sources": [_as_json(fixes) for fixes in everything], "left": _left(report)}
        (staging / FIXES).write_text(json_text(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return [_line(fixes) for fixes in everything]


def _fix(report: Report, source: Source, staging: Path) -> _Fixes:
    """Write one source to `staging`, cleaned, or the list of its records to leave out, if anything is wrong."""
    dropped = {bad.record: bad for bad in source.bad.records}
    for finding in report.findings.get(_DUPLICATE, []):
        if finding.source == source.name:
            dropped[finding.record] = BadRecord(finding.data, finding.record, finding.id, _DUPLICATE, finding.problem)
    fixes = _Fixes(source, dropped)
    if _is_written_again(source):
        rows = list(_rows(source, fixes))
        if dropped or fixes.changed:
            fixes.file, fixes.num_records = f"{source.name}.jsonl", len(rows)
            # Half of a surrogate pair, in a key that is not read, is written as JSON's escape for it.
            with (staging / fixes.file).open("w", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    elif dropped:
        fixes.file = f"{source.name}.exclude.jsonl"
        fixes.num_records = len(source.records) - fixes.reasons[_DUPLICATE]
        write_bad_records(staging / fixes.file, [*dropped.values(), *source.excluded()])
    return fixes


def _is_written_again(source: Source) -> bool:
    """Tell whether the entries of a source are lines of text that can be written without their neighbors."""
    data = source.data
    is_text = data.path.endswith((".json", ".jsonl", ".csv", ".tsv")) and Path(data.path).is_file()
    # A validation file shares `image_root` with the training file, so its default must not change for one alone.
    shares_root = data.image_root is None and (data.validation is not None or source.name.endswith(".validation"))
    return is_text and data.each is None and data.max_records is None and not shares_root


def _rows(source: Source, fixes: _Fixes) -> Iterator[Any]:
    """Yield the entries of a source that stay, corrected."""
    data, excluded = source.data, Exclusions(source.data.exclude).ids
    renamed = {record.number: record for record in source.records if record.image is not None and record.image.asked}
    for number, entry in enumerate(_entries(data), start=1):
        if number in fixes.dropped or number in excluded:
            continue
        row = entry.value
        if isinstance(row, dict):
            row = dict(row)
            fixes.changed["first turns of the model"] += _drop_first_turn(row, data)
            if number in renamed:
                fixes.changed["extensions"] += _rename(row, data, renamed[number])
        yield row
    fixes.changed = +fixes.changed


def _entries(data: DataSettings) -> Iterator[Entry]:
    path = Path(data.path)
    if path.suffix in (".json", ".jsonl"):
        return read_entries(path, data.records, data.encoding)
    return read_rows(path, data.encoding)


def _drop_first_turn(row: dict[str, Any], data: DataSettings) -> bool:
    """Remove a first turn of the model, which training leaves out, from a row; return whether there was one."""
    names = CONVERSATIONS if data.columns is None else (data.columns.messages,)
    name = next((name for name in names if name is not None and isinstance(row.get(name), list)), None)
    turns = [] if name is None else row[name]
    if len(turns) < 2 or not isinstance(turns[0], dict):
        return False
    speaker = turns[0].get("from") if turns[0].get("from") is not None else turns[0].get("role")
    if name is None or not isinstance(speaker, str) or ROLES.get(speaker) != "assistant":
        return False
    row[name] = turns[1:]
    return True


def _rename(row: dict[str, Any], data: DataSettings, record: Record) -> bool:
    """Give the image of a row the name of its file; return whether that was possible."""
    assert record.image is not None
    assert record.image.path is not None
    asked, stored = record.image.asked, record.image.path.name
    root = Path(data.image_root) if data.image_root is not None else Path(data.path).parent
    for name in _IMAGES if data.columns is None else (data.columns.image,):
        value = row.get(name) if name is not None else None
        in_list = isinstance(value, list) and len(value) == 1
        text = value[0] if isinstance(value, list) and in_list else value
        if name is not None and isinstance(text, str) and text.endswith(asked):
            corrected = text.removesuffix(asked) + stored
            # The file may have another name than the link to it.
            if os.path.lexists(root / corrected):
                row[name] = [corrected] if in_list else corrected
                return True
    return False


def _with_data(recipe: Recipe, fixes: _Fixes, path: Path) -> Recipe:
    """Return a recipe that reads what was written for a source."""
    source = fixes.source
    is_validation = source.key.endswith(".validation")
    # `stages.instruct.data.1` is the second source of a list, `stages.instruct.data` the first or only one.
    section, _, number = source.key.removesuffix(".validation").removeprefix("stages.").partition(".data")
    holder = recipe.evaluation if section == "evaluation" else recipe.stage(section)  # type: ignore[arg-type]
    assert holder is not None
    update: dict[str, Any] = {"exclude": str(path)}
    if path.suffixes[-2:] != [".exclude", ".jsonl"]:
        update = {"path": str(path), "exclude": None}
        if not is_validation:
            root = source.data.image_root or str(Path(source.data.path).parent)
            update |= {"image_root": root, "records": None, "encoding": None}
    changed = holder.model_copy(update={"data": _changed_data(holder.data, number, update, is_validation)})
    if section == "evaluation":
        return recipe.model_copy(update={"evaluation": changed})
    return recipe.model_copy(update={"stages": recipe.stages.model_copy(update={section: changed})})


def _changed_data(data: DataSettings, number: str, update: dict[str, Any], is_validation: bool) -> DataSettings:
    """Return the settings of a stage's data with an update of one source, or of its validation; `number`: as `.1`."""
    if number:
        index = int(number.removeprefix(".")) - 1
        others = list(data.others)
        others[index] = _changed_data(others[index], "", update, is_validation)
        return data.model_copy(update={"others": others})
    if is_validation:
        assert data.validation is not None
        update = {"validation": data.validation.model_copy(update=update)}
    return data.model_copy(update=update)


def _left(report: Report) -> list[dict[str, Any]]:
    """Return the findings that take judgment, with what to do."""
    bad = {bad.kind for source in report.survey.sources for bad in source.bad.records}
    return [
        {"kind": kind, "count": sum(finding.count for finding in findings), "advice": KINDS[kind].advice}
        for kind, findings in report.findings.items()
        if kind not in bad | _CORRECTED
    ]


def _as_json(fixes: _Fixes) -> dict[str, Any]:
    return {
        "source": fixes.source.name,
        "data": fixes.source.data_name,
        "file": fixes.file,
        "records": fixes.num_records if fixes.file else len(fixes.source.records),
        "dropped": dict(fixes.reasons),
        "corrected": dict(fixes.changed),
        "records_dropped": [json.loads(bad.line()) for _, bad in sorted(fixes.dropped.items())],
    }


def _line(fixes: _Fixes) -> str:
    """Describe what was done to a source."""
    name = fixes.source.name
    if fixes.file is None:
        return f"{name}: nothing to correct"
    done = [f"{count:,} {kind} dropped" for kind, count in fixes.reasons.most_common()]
    done += [f"{count:,} {kind} corrected" for kind, count in fixes.changed.most_common()]
    return f"{name}: {', '.join(done)}; {counted(fixes.num_records, 'record')} in {fixes.file}"
