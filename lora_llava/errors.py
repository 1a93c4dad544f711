"""The kit's exceptions: whatever a user can cause is raised as one of these.

LoraLlavaError
├── RecipeError      a recipe, an override or a command line that cannot be used; exit code 2
│   └── PreflightError       a setup in which a run, or a later step, would fail; nothing was started
├── DataError        a data file, a record or an image
├── ModelError       a base model, or a built model that does not match its stage
├── ArtifactError    a directory that is not what its manifest says, or belongs to another base
├── TrainingError    a run that cannot continue
│   ├── RunInterruptedError  a run that was stopped by a signal and has saved; exit code 130 or 143
│   └── LostProcessError     a run of several processes, one of which ended or does not answer
└── HubError         the Hub refuses, fails, or cannot be reached
"""

from __future__ import annotations

from typing import Any


class LoraLlavaError(Exception):
    """Base of all errors that the kit raises on purpose; the message is for the user."""

    exit_code = 1

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the error by its attributes, so that it reaches other processes whatever its constructor takes."""
        return _rebuilt, (type(self), self.args, self.__dict__)


def _rebuilt(kind: type[LoraLlavaError], args: tuple[Any, ...], attributes: dict[str, Any]) -> LoraLlavaError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(attributes)
    return error


class RecipeError(LoraLlavaError):
    """A recipe or override is wrong; nothing has been loaded yet."""

    exit_code = 2


class PreflightError(RecipeError):
    """A setup cannot work; the message lists every problem, each with a fix."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n  ".join(lines))


class DataError(LoraLlavaError):
    """A data file, record or image cannot be used; the message names file, record and field."""

    def __init__(self, message: str, kind: str = "record") -> None:
        super().__init__(message)
        self.kind = kind
        """Kind of the problem, by which reports group: a key of `doctor.catalogue.KINDS`."""


class ModelError(LoraLlavaError):
    """A base model cannot be loaded or built, or does not match its stage."""


class ArtifactError(LoraLlavaError):
    """An artifact is incomplete, altered, or was trained on another base."""


class TrainingError(LoraLlavaError):
    """Training cannot continue."""


class RunInterruptedError(TrainingError):
    """The run was stopped by a signal and has saved; the message says how to resume it."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        # As in shells.
        self.exit_code = 128 + signal_number


class LostProcessError(TrainingError):
    """Another process of the run ended, or does not answer; that process says why, if it can."""


class HubError(LoraLlavaError):
    """The Hugging Face Hub refuses a request or cannot be reached; earlier commits are unchanged."""


def is_panic(error: BaseException) -> bool:
    """Tell whether an error is a panic of a library in Rust, as tokenizers; it is no Exception, and has no module."""
    return type(error).__name__ == "PanicException"
