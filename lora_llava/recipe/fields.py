"""What every section of a recipe shares: strict types, and the notes that stand beside each setting.

A note says what changing the setting means when a run is resumed (`OnResume`), and whether it names a path
(`Names`). Everything that treats settings alike walks them with `settings_of` instead of keeping lists of names.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat
from pydantic.fields import FieldInfo

Positive = Annotated[FiniteFloat, Field(gt=0)]
NotNegative = Annotated[FiniteFloat, Field(ge=0)]
Share = Annotated[FiniteFloat, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class OnResume(enum.Enum):
    """What it means that a setting has another value when a stage is resumed; the value is for the docs."""

    FREE = "may change; refused if the stage is finished"
    AGAIN = "may change; the evaluation is made again"
    CARD = "may change; it is written to the artifacts that are finished, too"
    SAME_CONTENT = "may change if the records, or the weights, stay the same"
    RESOLVED = "may change if the choice that comes of it stays the same; refused if the stage is finished"
    LATER = "refused; with `--resume-anyway` it holds for the steps that follow"
    FORM = "refused; with `--resume-anyway` one model is then trained in two forms"
    ORDER = "refused; with `--resume-anyway` records may come twice or not at all"
    VALIDATION = "refused; with `--resume-anyway` validation losses cannot be compared with the earlier ones"
    ROUNDING = "refused; with `--resume-anyway` figures are no longer those of an uninterrupted run bit by bit"
    FIXED = "cannot change"


class Names(enum.Enum):
    """What a text setting names."""

    PATH = "path"
    PATH_OR_ID = "path or Hub id"


@dataclass(frozen=True, slots=True)
class Form:
    """What a text must look like, in words; stands beside a pattern."""

    words: str


class Settings(BaseModel):
    """Base of all settings: frozen, unknown keys refused, no guessing of types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    example: ClassVar[str] = ""
    """How to write the section, for errors; empty: its first keys are named."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of a recipe, wherever it is: its dotted key and the notes beside it."""

    key: str
    field: FieldInfo
    on_resume: OnResume
    names: Names | None


def settings_of(model: type[Settings], prefix: str = "", outer: OnResume | None = None) -> Iterator[Setting]:
    """Walk all settings below `model`, in the order of the recipe. A section's note replaces those of its settings.

    Raises TypeError for a setting without a note.
    """
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        on_resume = outer or next((one for one in field.metadata if isinstance(one, OnResume)), None)
        section = section_in(field.annotation)
        if section is not None:
            yield from settings_of(section, f"{key}.", on_resume)
        elif on_resume is None:
            raise TypeError(f"{model.__name__}.{name} does not say what changing it on resume means: add an OnResume")
        else:
            yield Setting(key, field, on_resume, next((one for one in field.metadata if isinstance(one, Names)), None))


def section_in(annotation: Any) -> type[Settings] | None:
    """Find the section in an annotation such as `DataSettings | None`; None if it holds a plain value."""
    for one in (annotation, *get_args(annotation)):
        if isinstance(one, type) and issubclass(one, Settings):
            return one
    return None


def value_at(settings: Settings, key: str) -> Any:
    """Return the value of a dotted key, as it stands in YAML; None in a section that is not there."""
    value: Any = settings
    for name in key.split("."):
        if value is None:
            return None
        value = getattr(value, name)
    return value if isinstance(value, bool | int | float | list) or value is None else str(value)
