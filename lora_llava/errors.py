"""The kit's exceptions: whatever a user can cause is raised as one of these.

LoraLlavaError
├── RecipeError      a recipe, an override or a command line that cannot be used; exit code 2
│   └── PreflightError       a set-up in which a run, or what follows it, would fail; nothing was started
├── DataError        a data file, a record or an image
├── ModelError       a base model, or a built model that is not what its stage states
├── ArtifactError    a directory that is not what its manifest says, or belongs to another base
├── TrainingError    a run that cannot go on
│   └── RunInterruptedError  a run that was asked to stop, and has saved; exit code 130 or 143
└── HubError         the Hub refuses, fails, or cannot be reached
"""

from __future__ import annotations


class LoraLlavaError(Exception):
    """Base of every error the kit raises on purpose; the message is for the user."""

    exit_code = 1


class RecipeError(LoraLlavaError):
    """A recipe or override is wrong; nothing has been loaded yet."""

    exit_code = 2


class PreflightError(RecipeError):
    """A set-up cannot work; the message lists every problem, each with what was found and what to do."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n  ".join(lines))


class DataError(LoraLlavaError):
    """A data file, record or image cannot be used; the message names file, record and field."""

    def __init__(self, message: str, kind: str = "record") -> None:
        super().__init__(message)
        self.kind = kind
        """What is wrong, in a word, by which reports sort: see `doctor.catalogue`."""


class ModelError(LoraLlavaError):
    """A base model cannot be had or built, or is not what its stage states."""


class ArtifactError(LoraLlavaError):
    """An artifact is incomplete, altered, or was trained on another base."""


class TrainingError(LoraLlavaError):
    """Training cannot go on."""


class RunInterruptedError(TrainingError):
    """The run was asked to stop by a signal and has saved; the message says how to go on."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        # As shells have it.
        self.exit_code = 128 + signal_number


class HubError(LoraLlavaError):
    """The Hugging Face Hub refuses or cannot be reached; what was committed there before is as it was."""
