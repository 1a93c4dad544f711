"""Base class of all recipe sections, and the notes that annotate each setting.

`OnResume` says what changing the setting means when a run is resumed; `Names` says whether a text is a path, a Hub id,
or neither; `OfNewModel` marks what an existing model does not need. Code that depends on these walks the settings and
keeps no list of keys.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator
from pydantic.fields import FieldInfo

Positive = Annotated[FiniteFloat, Field(gt=0)]
NotNegative = Annotated[FiniteFloat, Field(ge=0)]
Share = Annotated[FiniteFloat, Field(gt=0, lt=1)]
_MAX_NUMBER = 10**10
Count = Annotated[int, Field(ge=1)]

PACKAGED = "package:"
"""Prefix of a model that ships with the package."""
RECORD_FILES = (".json", ".jsonl", ".csv", ".tsv", ".xlsx")
"""Suffixes of data files that have no splits or revisions."""


class OnResume(enum.Enum):
    """What a changed setting means when a stage is resumed; the values are the texts of docs/settings.md."""

    FREE = "may change; refused if the stage is finished"
    AGAIN = "may change; the evaluation runs again"
    CARD = "may change; the cards of finished artifacts are updated too"
    SAME_CONTENT = "may change as long as the records, or the weights, stay the same"
    RESOLVED = "may change as long as it resolves to the same choice; refused if the stage is finished"
    LATER = "refused; with `--resume-anyway` it applies to the remaining steps"
    FORM = "refused; with `--resume-anyway` one model is trained in two formats"
    ORDER = "refused; with `--resume-anyway` records may be trained on twice or never"
    VALIDATION = "refused; with `--resume-anyway` validation losses are not comparable with earlier ones"
    ROUNDING = "refused; with `--resume-anyway` results are no longer bit-identical to an uninterrupted run"
    FIXED = "cannot change"


class Names(enum.Enum):
    """What a text setting names."""

    PATH = "path"
    PATH_OR_ID = "path or Hub id"
    TEXT = "text"


@dataclass(frozen=True, slots=True)
class OfNewModel:
    """Marks a setting of `base` that applies only to a model assembled from parts."""

    config_key: str | None = None
    """Key of the setting in the config.json of an existing model, if it is there."""
    default: Any = None
    """Value that a config.json without the key implies."""


@dataclass(frozen=True, slots=True)
class Form:
    """Describes in words what a text must look like; accompanies a pattern."""

    words: str


Window = Literal["auto", "full"] | Annotated[list[FiniteFloat], Field(min_length=2, max_length=2)]
"""Which values of gray images of more than 8 bits become black and white; see `ImageSettings`."""
WINDOW_FORM = Form("auto, full or [low, high]")
FULL_WINDOW = (0.0, 65535.0)
"""The range of 16 bits."""
KEYS_OF_MIX = ("share", "weight", "source")
"""Settings that only one of several sources can have."""
SourceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_. -]{0,39}$")]
SOURCE_FORM = Form("a name of at most 40 letters, digits, spaces, _, - and ., such as replay")


class Settings(BaseModel):
    """Base of all settings: frozen, unknown keys refused, no guessing of types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    example: ClassVar[str] = ""
    """How to write the section, for error messages; if empty, they list its first keys."""

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        """Refuse numbers that no setting needs: loops and tables of that size would never end."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, int | float) and abs(value) > _MAX_NUMBER:
                raise ValueError(f"{name} {value:g} is more than {_MAX_NUMBER:,}; write a smaller number")
        return self


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of a recipe: its dotted key and its notes."""

    key: str
    field: FieldInfo
    on_resume: OnResume
    names: Names | None
    """None for a setting that is not a text."""

    @property
    def may_be_path(self) -> bool:
        """Whether the value is, or may be, a path."""
        return self.names in (Names.PATH, Names.PATH_OR_ID)


@cache
def settings_of(model: type[Settings]) -> tuple[Setting, ...]:
    """Return all settings below `model`, in the order of the recipe. A section's note overrides those of its settings.

    Raises TypeError for a setting without an `OnResume`, and for a text without a `Names`.
    """
    return tuple(_settings_below(model, "", None))


def _settings_below(model: type[Settings], prefix: str, outer: OnResume | None) -> Iterator[Setting]:
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        on_resume = outer or next((note for note in field.metadata if isinstance(note, OnResume)), None)
        section = section_in(field.annotation)
        if section is not None:
            yield from _settings_below(section, f"{key}.", on_resume)
        elif on_resume is None:
            raise TypeError(f"{model.__name__}.{name} does not say what changing it on resume means: add an OnResume")
        else:
            names = next((note for note in field.metadata if isinstance(note, Names)), None)
            if names is None and _is_text(field):
                raise TypeError(f"{model.__name__}.{name} does not say what its text names: add a Names")
            yield Setting(key, field, on_resume, names)


def check_window(window: Window | None) -> None:
    """Raise ValueError for a window whose first value is not the lower one."""
    if isinstance(window, list) and window[0] >= window[1]:
        raise ValueError(f"window {window}: the first value, shown as black, must be the lower one")


def key_of_mix(data: Settings) -> str | None:
    """Return a setting of a source that only one of several can have; None if it has none."""
    return next((key for key in KEYS_OF_MIX if getattr(data, key) is not None), None)


def packaged(name: str) -> Path:
    """Return the path of what ships with the package as `name`, with or without the prefix `package:`."""
    return Path(str(resources.files("lora_llava") / "assets" / name.removeprefix(PACKAGED)))


def is_local(name: str) -> bool:
    """Tell a path from a Hub id, in a recipe whose paths are resolved."""
    return name.startswith((".", "/", "~")) or name.endswith((*RECORD_FILES, ".parquet"))


def data_name(path: str) -> str:
    """Return the name of a data set for messages: its Hub id, or its file name without the directory."""
    return Path(path).name if is_local(path) else path


def _is_text(field: FieldInfo) -> bool:
    """Tell whether a setting takes any text; one with a `Form` says in words what it takes."""
    if any(isinstance(note, Form) for note in field.metadata):
        return False
    alternatives = [field.annotation, *get_args(field.annotation)]
    types = [get_args(type_)[0] if get_origin(type_) is Annotated else type_ for type_ in alternatives]
    return get_origin(field.annotation) is not list and any(type_ in (str, Path) for type_ in types)


def section_in(annotation: Any) -> type[Settings] | None:
    """Return the section class in an annotation such as `DataSettings | None`; None if there is none, or a list."""
    if get_origin(annotation) is list:
        return None
    for alternative in (annotation, *get_args(annotation)):
        if isinstance(alternative, type) and issubclass(alternative, Settings):
            return alternative
    return None


def value_at(settings: Settings, key: str) -> Any:
    """Return the value of a dotted key as YAML writes it; None if its section is absent."""
    value: Any = settings
    for name in key.split("."):
        if value is None:
            return None
        value = getattr(value, name)
    if isinstance(value, list) and value and isinstance(value[0], Settings):
        return [item.model_dump(mode="json") for item in value]
    return value if isinstance(value, bool | int | float | list | dict) or value is None else str(value)
