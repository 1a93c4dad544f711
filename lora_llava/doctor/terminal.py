"""Print the report of a check."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.text import Text

from lora_llava.doctor.catalogue import KINDS, SEVERITIES
from lora_llava.doctor.report import PAGE, REPORT, Report
from lora_llava.recipe.schedule import steps_line
from lora_llava.system.table import Column, FittingTable
from lora_llava.system.text import counted, printable

_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}
_NUM_NAMED = 3


def print_report(report: Report, directory: str, console: Console) -> None:
    """Print the findings and what to do about them; `directory` holds the report."""
    console.print(_sides_view(report))
    for stage, plan in report.conversations.plans.items():
        problem = f"; {plan['problem']}" if "problem" in plan else ""
        lines = [plan.get("problem", "")]
        if "optimizer_steps" in plan:
            steps = steps_line(plan["optimizer_steps"], plan["warmup_steps"])
            saved = f"{plan['share_saved_by_packing']:.0%} saved by packing{problem}"
            lines = [
                f"{steps}, {plan['computed_tokens']:,} tokens, {saved}",
                *([plan["steps"]] if "steps" in plan else []),
            ]
        for line in lines:
            console.print(f"{stage}: {line}", markup=False, soft_wrap=not console.is_terminal)
    if report.findings:
        console.print(Group(*(part for kind in report.findings for part in _kind_view(report, kind))))
    for key, (file, count) in report.lists.items():
        console.print(
            f"{counted(count, 'bad record')} can be left out with {key}={Path(directory) / file}",
            soft_wrap=True,
        )
    counts = ", ".join(counted(report.count(severity), severity) for severity in SEVERITIES)
    line = f"{counts}. In {printable(directory)}: {PAGE} to look at, {REPORT} to work with."
    console.print(line, soft_wrap=True, markup=False)


def _sides_view(report: Report) -> FittingTable:
    """Return a table of the amount of data."""
    keys = {"records": 0, "images": 0, "questions": 2, "different_answers": 3, "total_tokens": 1}
    headings = ("records", "images", "questions", "different\nanswers", "tokens")
    columns = [Column(heading, importance=rank) for heading, rank in zip(headings, keys.values(), strict=True)]
    table = FittingTable(f"Data of recipe {report.survey.recipe.name}", [Column("", is_number=False), *columns])
    for name, figures in report.figures.items():
        table.add(name, *(f"{figures[key]:,}" if key in figures else "?" for key in keys))
    return table


def _kind_view(report: Report, kind: str) -> Iterator[RenderableType]:
    """Yield the lines of one kind of findings, with its first records."""
    described, findings = KINDS[kind], report.findings[kind]
    yield Text.assemble(
        (f"{described.severity}: ", _STYLES[described.severity]),
        (f"{described.title}: {sum(finding.count for finding in findings):,}", "bold"),
    )
    for finding in findings[:_NUM_NAMED]:
        yield Text(f"  {printable(finding.problem, 300)}")
    if len(findings) > _NUM_NAMED:
        yield Text(f"  and {len(findings) - _NUM_NAMED:,} more", "dim")
    yield Text(f"  {described.advice.replace('`', '')}", "dim")
