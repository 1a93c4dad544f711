"""Error messages for a recipe: which key, what it must be, what it is."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import Strict, ValidationError
from pydantic.fields import FieldInfo
from pydantic.types import AllowInfNan
from pydantic_core import ErrorDetails

from lora_llava.recipe.fields import Form, Names, Settings, section_in
from lora_llava.recipe.names import meant_by
from lora_llava.recipe.settings import Recipe
from lora_llava.system.names import did_you_mean, similar
from lora_llava.system.text import printable

_MAX_SHOWN = 80
"""Maximum characters of a wrong value that an error shows."""
_BOUNDS = {"gt": "greater than", "ge": "of at least", "lt": "less than", "le": "at most"}
_YES, _NO = {"yes", "on", "y"}, {"no", "off", "n"}
_KINDS = {int: "an integer", float: "a number", str: "text", bool: "a boolean (true or false)", Path: "a path"}


def problems_in(error: ValidationError, section: str | None = None) -> list[str]:
    """Return what is wrong with a recipe, or this section of one: one message per key, in the order of the recipe."""
    problems: dict[str, str] = {}
    for details in error.errors():
        if section is not None:
            details["loc"] = (section, *details["loc"])
        # A source after the first has the keys of the first, and its index in the list.
        details["loc"], data, index = _source(details["loc"])
        key, text = _problem(details)
        key = f"{data}.{index}{key.removeprefix(data)}" if index else key
        problems.setdefault(key, f"{key}: {text}" if key else text)
    return list(problems.values())


def _source(loc: tuple[int | str, ...]) -> tuple[tuple[int | str, ...], str, int]:
    """Return a location in one of several sources as that of a single one, the key of the list, and the source's index.

    The index is 0 for the first source, or the only one: a list is stored as the first, with the rest as `others`.
    """
    for start, (name, index) in enumerate(pairwise(loc)):
        if name == "others" and isinstance(index, int):
            return (*loc[:start], *loc[start + 2 :]), ".".join(map(str, loc[:start])), index + 1
    return loc, "", 0


def _problem(error: ErrorDetails) -> tuple[str, str]:
    """Return the key of a problem and a message, which does not use pydantic's words."""
    names, section, field = _walk([str(part) for part in error["loc"]])
    key = ".".join(names)
    match error["type"]:
        case "extra_forbidden":
            unknown = printable(str(error["loc"][-1]))
            return f"{key}.{unknown}" if key else unknown, f"unknown key{meant_by(names, unknown, section)}"
        case "value_error":
            return key, error["msg"].removeprefix("Value error, ")
        case "missing":
            return key, f"is missing; write {allowed(field)}" if field else "is missing"
    value = _value_of(error, len(names))
    if field is None:
        return key, f"must be a mapping of keys to values, not {shown(value)}"
    text = allowed(field)
    verb = "write" if section_in(field.annotation) else "must be"
    return key, f"{verb} {text}, not {shown(value)}{_hint(field, text, value)}"


def _value_of(error: ErrorDetails, depth: int) -> Any:
    """Return the value of the key; if the problem is an item of a list, a list of that item."""
    return [error["input"]] if any(isinstance(part, int) for part in error["loc"][depth:]) else error["input"]


def _walk(loc: list[str]) -> tuple[list[str], type[Settings] | None, FieldInfo | None]:
    """Follow the location of a problem: return its keys, the last section and, if the location ends at one, the field.

    Parts that pydantic adds (branches of a union, indices of a list) are dropped.
    """
    section: type[Settings] | None = Recipe
    names: list[str] = []
    field: FieldInfo | None = None
    for name in loc:
        if section is None or name not in section.model_fields:
            break
        field = section.model_fields[name]
        names.append(name)
        section = section_in(field.annotation)
    return names, section, field


def allowed(field: FieldInfo) -> str:
    """Describe the values that a setting takes."""
    section = section_in(field.annotation)
    if section is not None:
        return section.example or f"a mapping with keys such as {', '.join(list(section.model_fields)[:3])}"
    named = next((note for note in field.metadata if isinstance(note, Names)), Names.TEXT)
    if named is not Names.TEXT:
        return f"a {named.value}{' or null' if NoneType in get_args(field.annotation) else ''}"
    return _words(field.annotation, field.metadata)


def _words(annotation: Any, metadata: list[Any]) -> str:
    """Describe a type and its limits."""
    if form := next((note for note in metadata if isinstance(note, Form)), None):
        return form.words
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *notes = get_args(annotation)
        return _words(inner, [part for note in notes for part in _flat(note)])
    if origin in (Union, UnionType):
        parts = [part for part in get_args(annotation) if part is not NoneType]
        texts = [_words(part, metadata) for part in parts]
        return " or ".join([*dict.fromkeys(texts), *(["null"] if NoneType in get_args(annotation) else [])])
    if origin is Literal:
        texts = [repr(value) if isinstance(value, str) else shown(value) for value in get_args(annotation)]
        return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"
    if origin is list:
        least = next((note.min_length for note in metadata if isinstance(note, annotated_types.MinLen)), 0)
        return f"a list{f' of {least} item or more' if least else ''}, such as [a, b]"
    return _KINDS[annotation] + _limits(metadata)


def _flat(note: Any) -> list[Any]:
    return list(note.metadata) if isinstance(note, FieldInfo) else [note]


def _limits(metadata: list[Any]) -> str:
    """Describe the limits of a number."""
    parts = [
        f"{words} {value:,}" if isinstance(value, int) and value >= 10_000 else f"{words} {value}"
        for note in metadata
        for name, words in _BOUNDS.items()
        if not isinstance(note, Strict | AllowInfNan | Form) and (value := getattr(note, name, None)) is not None
    ]
    return f" {' and '.join(parts)}" if parts else ""


def _hint(field: FieldInfo, text: str, value: Any) -> str:
    """Return a hint for a common mistake."""
    section = section_in(field.annotation)
    names_file = Names.PATH_OR_ID in field.metadata or (section is not None and "path" in section.model_fields)
    if isinstance(value, list) and len(value) > 1 and names_file:
        return ". For several files, write a source for each: data: [{path: a.json}, {path: b.json}]"
    if isinstance(value, float) and not math.isfinite(value):
        return "; it must be finite"
    if not isinstance(value, str):
        return ""
    if "boolean" in text and value.lower() in _YES | _NO:
        return f"; write {'true' if value.lower() in _YES else 'false'}, without quotes"
    is_quoted = "boolean" in text and value.lower() in ("true", "false")
    if is_quoted or (("number" in text or "integer" in text) and _is_number(value)):
        return "; remove the quotes"
    if "a list" in text and value:
        return f"; write [{printable(value[:_MAX_SHOWN])}]"
    near = similar(value.lower(), re.findall(r"'([^']+)'", text), 0.5)
    return f". {did_you_mean(near)}" if near else ""


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def shown(value: Any) -> str:
    """Return a value as YAML would write it, cut to a readable length."""
    if isinstance(value, str):
        text = repr(value)
    else:
        try:
            text = json.dumps(value, ensure_ascii=False, default=str)
        except (ValueError, RecursionError):
            text = type(value).__name__
    text = printable(text)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 1]}\N{HORIZONTAL ELLIPSIS}"
