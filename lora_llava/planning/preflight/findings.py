"""What a check finds: problems, which stop a command, and notices, which it shows and continues."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from lora_llava.errors import PreflightError
from lora_llava.system.text import counted, printable


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a run, or what is done with its result later, would fail."""

    where: str
    """Recipe key, option or path."""
    what: str
    """What was found and, unless that is plain, what is allowed: a sentence without its period."""
    fix: str
    """What to do: a sentence; empty if `what` says it."""

    def __str__(self) -> str:
        """Write it as one line that a terminal can show safely."""
        return printable(f"{self.where}: {self.what}. {self.fix}" if self.fix else f"{self.where}: {self.what}")


@dataclass(frozen=True, slots=True)
class Notice:
    """What the user should know; the command continues."""

    where: str
    what: str
    """One or more sentences."""

    def __str__(self) -> str:
        """Write it as one line that a terminal can show safely."""
        return printable(f"{self.where}: {self.what}")


Finding = Problem | Notice


@dataclass(slots=True)
class Findings:
    """All that the checks found."""

    problems: list[Problem] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)

    def add(self, found: Iterable[Finding]) -> None:
        """Take in the findings of one check; what was found before is not repeated."""
        for one in found:
            known: list[Problem] | list[Notice] = self.problems if isinstance(one, Problem) else self.notices
            if one not in known:
                known.append(one)  # type: ignore[arg-type]  # the list of its own type, by the line above

    def refuse(self) -> None:
        """Raise PreflightError with every problem, one a line, if there is any."""
        if self.problems:
            raise PreflightError(list(self._lines()))

    def _lines(self) -> Iterator[str]:
        if len(self.problems) > 1:
            yield f"{counted(len(self.problems), 'problem')} found before anything was started:"
        yield from map(str, self.problems)
