"""Findings of a check: problems, which stop a command, and notices, which are only shown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from lora_llava.errors import PreflightError
from lora_llava.system.text import counted, printable


@dataclass(frozen=True, slots=True)
class Problem:
    """Why the run, or a later use of its result, would fail."""

    where: str
    """Recipe key, option or path."""
    what: str
    """What is wrong and, unless it is obvious, what is allowed: a sentence without its period."""
    fix: str
    """What to do: a sentence; empty if `what` says it."""

    def __str__(self) -> str:
        """Format it as one line that is safe to print on a terminal."""
        return printable(f"{self.where}: {self.what}. {self.fix}" if self.fix else f"{self.where}: {self.what}")


@dataclass(frozen=True, slots=True)
class Notice:
    """What the user should know; the command continues."""

    where: str
    what: str
    """One or more sentences."""

    def __str__(self) -> str:
        """Format it as one line that is safe to print on a terminal."""
        return printable(f"{self.where}: {self.what}")


Finding = Problem | Notice


@dataclass(slots=True)
class Findings:
    """All findings of the checks."""

    problems: list[Problem] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)

    def add(self, findings: Iterable[Finding]) -> None:
        """Add the findings of one check, without duplicates."""
        for finding in findings:
            if isinstance(finding, Problem):
                if finding not in self.problems:
                    self.problems.append(finding)
            elif finding not in self.notices:
                self.notices.append(finding)

    def refuse(self) -> None:
        """Raise PreflightError with all problems, one per line, if there are any."""
        if self.problems:
            raise PreflightError(list(self._lines()))

    def _lines(self) -> Iterator[str]:
        if len(self.problems) > 1:
            yield f"{counted(len(self.problems), 'problem')} found before anything was started:"
        yield from map(str, self.problems)
