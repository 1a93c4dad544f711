"""Print the report of a check."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from lora_llava.doctor.catalogue import KINDS, SEVERITIES
from lora_llava.doctor.report import PAGE, REPORT, Report
from lora_llava.recipe.file import one_line
from lora_llava.recipe.schedule import steps_line
from lora_llava.system.table import Column, FittingTable
from lora_llava.system.text import counted, printable

_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}
_NUM_NAMED = 3
_MAX_PROBLEM = 1_000
"""Characters of a problem: the lines that read data with many classes are long."""


def print_report(report: Report, directory: str, console: Console) -> None:
    """Print the findings and what to do about them; `directory` holds the report."""
    console.print(_sides_view(report))
    for stage, mix in report.conversations.mixes.items():
        console.print(_mix_view(stage, mix))
    for stage, plan in report.conversations.plans.items():
        for line in _plan_lines(plan):
            console.print(f"{stage}: {line}", markup=False, soft_wrap=not console.is_terminal)
    if report.findings:
        console.print(Group(*(part for kind in report.findings for part in _kind_view(report, kind))))
    for key, (file, count) in report.lists.items():
        how = _exclusion(report, key, Path(directory) / file)
        console.print(f"{counted(count, 'bad record')} can be left out with {how}", soft_wrap=True, markup=False)
    counts = ", ".join(counted(report.count(severity), severity) for severity in SEVERITIES)
    line = f"{counts}. In {printable(directory)}: {PAGE} to look at, {REPORT} to work with."
    console.print(line, soft_wrap=True, markup=False)


def _mix_view(stage: str, mix: Sequence[Mapping[str, Any]]) -> FittingTable:
    """Return a table of what each source is of an epoch."""
    headings = ("records", "in an epoch", "share", "supervised\ntokens", "share of\ntokens")
    ranks = (3, 0, 1, 4, 2)
    columns = [Column(heading, importance=rank) for heading, rank in zip(headings, ranks, strict=True)]
    table = FittingTable(f"An epoch of {stage}", [Column("source", is_number=False), *columns])
    for source in mix:
        counts = [f"{source[key]:,}" for key in ("records", "records_of_epoch", "supervised_tokens")]
        shares = [f"{source[key]:.1%}" for key in ("share_of_records", "share_of_supervised_tokens")]
        table.add(printable(source["source"], 40), *counts[:2], shares[0], counts[2], shares[1])
    return table


def _plan_lines(plan: Mapping[str, Any]) -> list[str]:
    """Return what a run of one stage will compute, or why nothing is planned."""
    if "optimizer_steps" not in plan:
        return [plan["problem"]]
    problem = f"; {plan['problem']}" if "problem" in plan else ""
    steps = steps_line(plan["optimizer_steps"], plan["warmup_steps"])
    saved = f"{plan['share_saved_by_packing']:.0%} saved by packing{problem}"
    return [f"{steps}, {plan['computed_tokens']:,} tokens, {saved}", *([plan["steps"]] if "steps" in plan else [])]


def _exclusion(report: Report, key: str, path: Path) -> str:
    """Return the override that leaves out the records in a list, or what to write in the recipe.

    No override reaches into a list of sources.
    """
    section, _, part = key.removesuffix(".exclude").partition(".data")
    if all(source.key != f"{section}.data.1" for source in report.survey.sources):
        return shlex.quote(f"{key}={one_line(str(path))}")
    number = int(part.removesuffix(".validation").removeprefix(".") or 0) + 1
    of_validation = "the validation of " if part.endswith(".validation") else ""
    return f"exclude: {one_line(str(path))} in {of_validation}source {number} of {section}.data in the recipe"


def _sides_view(report: Report) -> FittingTable:
    """Return a table of the amount of data."""
    keys = {"records": 0, "images": 0, "questions": 2, "different_answers": 3, "total_tokens": 1}
    headings = ("records", "images", "questions", "different\nanswers", "tokens")
    columns = [Column(heading, importance=rank) for heading, rank in zip(headings, keys.values(), strict=True)]
    table = FittingTable(f"Data of recipe {report.survey.recipe.name}", [Column("", is_number=False), *columns])
    for name, figures in report.figures.items():
        table.add(name, *(f"{figures[key]:,}" for key in keys))
    return table


def _kind_view(report: Report, kind: str) -> Iterator[RenderableType]:
    """Yield the lines of one kind of findings, with its first records."""
    described, findings = KINDS[kind], report.findings[kind]
    yield Text.assemble(
        (f"{described.severity}: ", _STYLES[described.severity]),
        (f"{described.title}: {sum(finding.count for finding in findings):,}", "bold"),
    )
    for finding in findings[:_NUM_NAMED]:
        yield Text(f"  {printable(finding.problem, _MAX_PROBLEM)}")
    if len(findings) > _NUM_NAMED:
        yield Text(f"  and {len(findings) - _NUM_NAMED:,} more", "dim")
    yield Text(f"  {described.advice.replace('`', '')}", "dim")
