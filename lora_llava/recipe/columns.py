"""Settings of `columns`: how a row becomes a conversation, by names of columns and templates of them.

A template, such as `images/{id:06d}.jpg`, names fields and number formats; nothing in it is run.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, NamedTuple, Self

from pydantic import AfterValidator, BeforeValidator, FiniteFloat, model_validator

from lora_llava.recipe.fields import Form, Names, OnResume, Settings

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_FORMAT = re.compile(r"0?\d{1,2}d|\.\d{1,2}f")
"""Digits to fill up to, as `06d`, or decimals, as `.2f`."""


class Field(NamedTuple):
    """A field of a template: a column, or a dotted path into one, and the format of a number."""

    path: str
    number_format: str


def is_template(text: str) -> bool:
    """Tell a template from the name of a column."""
    return "{" in text or "}" in text


@cache
def template_parts(text: str) -> tuple[str | Field, ...]:
    """Split a template into texts and fields; `{{` and `}}` are braces. Raises ValueError for anything else."""
    parts: list[str | Field] = []
    start = 0
    for match in _PIECE.finditer(text):
        parts.append(text[start : match.start()])
        start = match.end()
        if match[0] in ("{{", "}}"):
            parts.append(match[0][0])
        elif match[1] is None:
            raise ValueError(f"{text!r:.80} has a single {match[0]}; write {match[0] * 2} for the character itself")
        else:
            parts.append(_field(match[1]))
    return tuple(part for part in (*parts, text[start:]) if part)


def _field(inner: str) -> Field:
    name, colon, number_format = inner.rpartition(":")
    if colon and _FORMAT.fullmatch(number_format):
        path = name
    elif colon and re.fullmatch(r"[^\s]?[\d.,<>^+-]*[a-zA-Z%]?", number_format) and number_format:
        raise ValueError(f"{{{inner}}}: the format {number_format!r} is not known; use one as in {{{name}:06d}} or .2f")
    else:
        path, number_format = inner, ""
    if not path.strip():
        raise ValueError(f"{{{inner}}} names no column; write one as in {{name}}")
    return Field(path, number_format)


def fields_in(setting: str | Mapping[str, object] | None) -> Iterator[str]:
    """Yield the columns, or dotted paths into columns, that a text setting of `columns` reads."""
    if isinstance(setting, str):
        if is_template(setting):
            yield from (part.path for part in template_parts(setting) if isinstance(part, Field))
        else:
            yield setting
    elif setting is not None:
        texts = [value for key, value in setting.items() if key != "text" and isinstance(value, str)]
        for text in texts:
            yield from fields_in(text)


_POINTERS = ("index", "number", "letter")
_PICKS = (*_POINTERS, "first", "majority")
_TEXT_FORM = Form("a column, a template such as '{a}: {b}', {text: the same for every record} or null")
_ANSWER_FORM = Form(
    "a column, a template, {text: the same for every record}, {index, number, letter, first or majority: COLUMN}, "
    "{map: {VALUE: TEXT}, of: COLUMN}, or null"
)

Condition = str | bool | int | FiniteFloat | None | list[str | bool | int | FiniteFloat | None]
"""Value, or values, that `where` accepts."""


def _checked_template(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty; name a column, or remove the key")
    if is_template(text):
        template_parts(text)
    return text


def _checked_text(value: str | dict[str, Any]) -> str | dict[str, Any]:
    if isinstance(value, str):
        return _checked_template(value)
    if list(value) != ["text"] or not isinstance(value["text"], str):
        raise ValueError(f"must be {_TEXT_FORM.words}")
    return value


def _checked_answer(value: str | dict[str, Any]) -> str | dict[str, Any]:
    if isinstance(value, str) or "text" in value:
        return _checked_text(value)
    if len(value) == 1 and (key := next(iter(value))) in _PICKS and isinstance(value[key], str):
        return value
    if value.keys() == {"map", "of"} and isinstance(value["of"], str) and isinstance(value["map"], dict):
        if not value["map"] or not all(isinstance(text, str) for text in value["map"].values()):
            raise ValueError("map: must be a mapping of the values in the data to texts, such as {normal: 'no'}")
        return value
    raise ValueError(f"must be {_ANSWER_FORM.words}")


def _texts(value: Any) -> Any:
    """Turn the values and texts of a map, which YAML may read as numbers or booleans, into text."""
    if isinstance(value, Mapping) and isinstance(value.get("map"), Mapping):
        return {**value, "map": {_as_text(key): _as_text(text) for key, text in value["map"].items()}}
    return value


def _as_text(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int | float) else value


def _checked_encoding(name: str) -> str:
    try:
        is_text = codecs.lookup(name)._is_text_encoding
    except (LookupError, ValueError):
        is_text = False
    if not is_text:
        raise ValueError(f"encoding {name!r:.40} is not known; use utf-8, utf-16, cp1252 or another name of Python's")
    return name


Template = Annotated[str, AfterValidator(_checked_template)]
TextSetting = Annotated[str | dict[str, Any], AfterValidator(_checked_text)]
AnswerSetting = Annotated[str | dict[str, Any], BeforeValidator(_texts), AfterValidator(_checked_answer)]
EncodingName = Annotated[str, AfterValidator(_checked_encoding)]


class ColumnSettings(Settings):
    """How a row of a table or dataset, or a flat JSON record, becomes a conversation."""

    needs_answer: ClassVar[bool] = True
    """Whether every record must have an answer."""

    example = "{image: COLUMN, question: COLUMN, answer: COLUMN} or {image: COLUMN, messages: COLUMN}"

    image: Annotated[Template | None, OnResume.SAME_CONTENT, Names.TEXT] = None
    """Images or their paths; null: text only. Like the texts below, it is the name of a column, a dotted path into one
    (`json.path`, `images.0`), or a template of them, such as `images/{id:06d}.jpg`."""
    question: Annotated[TextSetting | None, _TEXT_FORM, OnResume.SAME_CONTENT] = None
    """Questions."""
    answer: Annotated[AnswerSetting | None, _ANSWER_FORM, OnResume.SAME_CONTENT] = None
    """Answers. `index` (from 0), `number` (from 1) and `letter` point into `choices`; of a list, `first` takes the
    first answer and `majority`, like a plain column, the most frequent; `map` replaces values by texts."""
    choices: Annotated[
        str | list[str] | None, Form("a column of lists, a list of columns or null"), OnResume.SAME_CONTENT
    ] = None
    """Options of a multiple-choice question: a column of lists, or several columns. They follow the question as lines
    `A. ...`, and the answer becomes the letter."""
    references: Annotated[str | None, OnResume.SAME_CONTENT, Names.TEXT] = None
    """Column with the list of all acceptable answers, for an evaluation."""
    type: Annotated[str | None, OnResume.SAME_CONTENT, Names.TEXT] = None
    """Column with the type of a question, by which an evaluation breaks accuracy down, as by `evaluation.by`."""
    system: Annotated[TextSetting | None, _TEXT_FORM, OnResume.SAME_CONTENT] = None
    """System prompt of each record; where it is empty, that of the stage applies."""
    messages: Annotated[str | None, OnResume.SAME_CONTENT, Names.TEXT] = None
    """Column with whole conversations, instead of question and answer."""

    chosen: Annotated[str | None, OnResume.SAME_CONTENT, Names.TEXT] = None
    """Column with the better of two answers, instead of answer; with `rejected`, for stage `prefer`."""
    rejected: Annotated[str | None, OnResume.SAME_CONTENT, Names.TEXT] = None
    """Column with the worse answer. If all three, with question, name one column, it holds a JSON object of them."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.messages and (self.question or self.answer or self.choices):
            raise ValueError("messages cannot be combined with question and answer")
        if (self.chosen is None) != (self.rejected is None):
            raise ValueError("chosen and rejected belong together; give both, or neither")
        if self.chosen and (self.answer or self.messages or not isinstance(self.question, str)):
            raise ValueError("chosen and rejected go with question alone, not with answer or messages")
        answered = self.answer or self.chosen or not self.needs_answer
        if not self.messages and not (self.question and answered):
            trained = " and answer, or messages, or question, chosen and rejected"
            raise ValueError(f"give question{trained if self.needs_answer else ', or messages'}")
        if isinstance(self.choices, list) and len(self.choices) < 2:
            raise ValueError(f"choices: has {len(self.choices)} columns, a question has two options or more")
        points = isinstance(self.answer, dict) and self.answer.keys() & set(_POINTERS)
        if points and not self.choices:
            raise ValueError(f"answer by {min(points)} needs choices: the column, or columns, of the options")
        return self


class QuestionColumns(ColumnSettings):
    """Columns of questions to answer, whose references are optional."""

    needs_answer = False
    example = "{image: COLUMN, question: COLUMN} or {image: COLUMN, messages: COLUMN}"
