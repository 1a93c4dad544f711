"""Read what `columns` names from a row: columns, dotted paths, templates, constants and choices."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lora_llava.conversation.encode import Turn
from lora_llava.data.record import check_text
from lora_llava.data.sources.cells import Answer, as_text, join_images, kind_of, read_answer, read_dialog, read_question
from lora_llava.data.sources.pairs import read_pair
from lora_llava.errors import DataError
from lora_llava.recipe.columns import ColumnSettings, Field, fields_in, is_template, template_parts
from lora_llava.system.text import counted, listed, printable

Row = Mapping[str, Any]
Reader = Callable[[Row, str], Any]
"""Returns a value of a row; the text is where the row is, for messages."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Content(NamedTuple):
    """What a row holds, before it becomes a record."""

    turns: list[Turn]
    image: Any
    """The cell of its image."""
    references: tuple[str, ...]
    system: str | None
    rejected: str | None = None
    """The worse of two answers."""


class RowReader:
    """Reads rows as the settings `columns` say."""

    def __init__(self, columns: ColumnSettings) -> None:
        self.columns = columns
        self._image = make_reader(columns.image, "image", optional=True)
        self._question = make_reader(columns.question, "question")
        self._answer = _answer_reader(columns)
        self._system = make_reader(columns.system, "system", optional=True)
        self._plain = self._names()
        self._question_name = _name(columns.question, "question")

    def _names(self) -> tuple[str | None, str, str] | None:
        """Return the columns of image, question and answer, if they are all that is read, and nothing has a path."""
        columns = self.columns
        names = (columns.image, columns.question, columns.answer)
        given = [name for name in names if name is not None]
        is_plain = all(isinstance(name, str) and "." not in name and not is_template(name) for name in given)
        others = (columns.choices, columns.references, columns.system, columns.messages, columns.chosen)
        if not is_plain or columns.answer is None or not columns.needs_answer or any(others):
            return None
        return columns.image, str(columns.question), str(columns.answer)

    def read(self, row: Row, where: str) -> Content:
        """Read a row; raises DataError naming the column."""
        # Most tables are read this way, in fewer calls.
        if self._plain is not None:
            image, asked, answered = self._plain
            turn = Turn("user", read_question(row.get(asked), f"{where}: {asked}"))
            text, references = read_answer(row.get(answered), f"{where}: {answered}")
            cell = None if image is None else row.get(image)
            return Content([turn, Turn("assistant", text)], cell, references, None)
        columns = self.columns
        cell = self._image(row, where)
        own = None if columns.system is None else self._system(row, where)
        system = None if own is None or own == "" else check_text(as_text(own, f"{where}: system"), f"{where}: system")
        if columns.messages is not None:
            dialog = read_dialog(value_of(row, columns.messages), f"{where}: {columns.messages}")
            references = dialog.references if columns.references is None else self._references(row, where, dialog.turns)
            image = join_images(cell, dialog.images)
            return Content(dialog.turns, image, references, dialog.system if system is None else system)
        if columns.chosen is not None:
            turns, rejected = read_pair(row, columns, where)
            return Content(turns, cell, (), system, rejected)
        location = f"{where}: {self._question_name}"
        question = read_question(self._question(row, where), location)
        if columns.choices is not None:
            options = _options(row, columns.choices, where)
            question = "\n".join((question, *(f"{LETTERS[index]}. {text}" for index, text in enumerate(options))))
            row = {**row, _OPTIONS: options}
        turns = [Turn("user", question)]
        if columns.answer is None or (not columns.needs_answer and self._is_open(row)):
            return Content(turns, cell, (), system)
        answer = self._answer(row, where)
        turns.append(Turn("assistant", answer.text))
        references = answer.references if columns.references is None else self._references(row, where, turns)
        return Content(turns, cell, references, system)

    def _is_open(self, row: Row) -> bool:
        """Tell whether a row has no answer: each of its columns is empty."""
        fields = list(fields_in(self.columns.answer))
        return bool(fields) and all(value_of(row, field) is None for field in fields)

    def _references(self, row: Row, where: str, turns: list[Turn]) -> tuple[str, ...]:
        """Return all acceptable answers, with that of the last turn among them."""
        location = f"{where}: {self.columns.references}"
        value = _as_list(value_of(row, str(self.columns.references)))
        if value is None:
            return ()
        given = value if isinstance(value, list) else [value]
        answers = read_answer(given, location)
        listed_answers = answers.references or (answers.text,)
        own = turns[-1].text
        return listed_answers if own in listed_answers else (own, *listed_answers)


_OPTIONS = "\0options"
"""Key of a row's options for the reader of its answer; no column has this name."""


def value_of(row: Row, path: str) -> Any:
    """Return the value of a column, or of a dotted path into one; None if it is not there."""
    if path in row or "." not in path:
        return row.get(path)
    value: Any = row
    for key in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(key)
        elif isinstance(value, list) and key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < len(value):
            value = value[int(key)]
        else:
            return None
    return value


def column_of(path: str, columns: list[str]) -> str | None:
    """Return the column that a path leads into; None if there is none."""
    if path in columns:
        return path
    first = path.partition(".")[0]
    return first if first != path and first in columns else None


def fill(text: str, row: Row, location: str, *, optional: bool = False) -> str | None:
    """Fill in a template; None if it is `optional` and a field is empty. Raises DataError naming the field."""
    pieces = []
    for part in template_parts(text):
        if isinstance(part, str):
            pieces.append(part)
            continue
        value = value_of(row, part.path)
        if optional and (value is None or value == ""):
            return None
        if value is None:
            raise DataError(
                f"{location}: {{{printable(part.path)}}} of the template is empty; the record has "
                f"{listed([printable(str(key), 40) for key in row], 20)}"
            )
        pieces.append(_formatted(value, part, location))
    return "".join(pieces)


def _formatted(value: Any, field: Field, location: str) -> str:
    location = f"{location}: {{{printable(field.path)}}}"
    if not field.number_format:
        return as_text(value, location)
    text = as_text(value, location).strip()
    number = float(text) if re.fullmatch(r"[+-]?\d{1,15}(\.\d{1,15})?", text) and not isinstance(value, bool) else None
    whole = field.number_format.endswith("d")
    if number is None or (whole and not number.is_integer()):
        raise DataError(
            f"{location}: is {printable(text, 80)!r}, must be {'an integer' if whole else 'a number'} for the format "
            f"{field.number_format}"
        )
    return format(int(number) if whole else number, field.number_format)


def _name(setting: str | Mapping[str, Any] | None, key: str) -> str:
    """Return how messages call a text: by its column, or the key in `columns`."""
    return setting if isinstance(setting, str) and not is_template(setting) else key


def make_reader(setting: str | Mapping[str, Any] | None, key: str, *, optional: bool = False) -> Reader:
    """Return the reader of a column, a template or a constant."""
    if setting is None or not isinstance(setting, str):
        constant = None if setting is None else setting["text"]
        return lambda _row, _where: constant
    if is_template(setting):
        return lambda row, where: fill(setting, row, f"{where}: {key}", optional=optional)
    if "." not in setting:
        return lambda row, _where: row.get(setting)
    return lambda row, _where: value_of(row, setting)


def _answer_reader(columns: ColumnSettings) -> Callable[[Row, str], Answer]:
    """Return the reader of the answers."""
    setting = columns.answer
    if isinstance(setting, dict) and "text" not in setting:
        if "map" in setting:
            return lambda row, where: _mapped(row, setting["map"], setting["of"], where)
        [(how, column)] = setting.items()
        if how in ("first", "majority"):
            return lambda row, where: _picked(row, column, how, where)
        return lambda row, where: _pointed(row, column, how, where)
    read, name = make_reader(setting, "answer"), _name(setting, "answer")
    if columns.choices is not None:
        return lambda row, where: _chosen(row, read(row, where), f"{where}: {name}")
    return lambda row, where: read_answer(read(row, where), f"{where}: {name}")


def _as_list(value: Any) -> Any:
    """Return the list that a text holds as JSON, as in a cell of a table; any other value unchanged."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return parsed if isinstance(parsed, list) else value
    return value


def _mapped(row: Row, texts: Mapping[str, str], column: str, where: str) -> Answer:
    location = f"{where}: {column}"
    value = as_text(value_of(row, column), location).strip()
    if value not in texts:
        raise DataError(
            f"{location}: is {printable(value, 80)!r}, which answer.map does not have; it has {listed(list(texts))}. "
            "Add it, or leave such records out with where"
        )
    return Answer(texts[value])


def _picked(row: Row, column: str, how: str, where: str) -> Answer:
    """Read the first, or most frequent, of a list of answers; all of them are references."""
    location = f"{where}: {column}"
    value = _as_list(value_of(row, column))
    answer = read_answer(value if isinstance(value, list) else [value], location)
    return Answer(answer.references[0], answer.references) if how == "first" and answer.references else answer


def _options(row: Row, choices: str | list[str], where: str) -> list[str]:
    """Return the options of a question as text, without letters of their own."""
    if isinstance(choices, str):
        location = f"{where}: {choices}"
        values = _as_list(value_of(row, choices))
        if not isinstance(values, list):
            raise DataError(f"{location}: is {kind_of(values)}, must be a list of options; correct columns.choices")
    else:
        location = f"{where}: {choices[-1]}"
        values = [value_of(row, column) for column in choices]
        while values and values[-1] is None:
            values.pop()
    texts = [as_text(value, f"{location}: option {index}").strip() for index, value in enumerate(values, start=1)]
    if not 2 <= len(texts) <= len(LETTERS) or not all(texts):
        empty = f"option {texts.index('') + 1} is empty" if "" in texts else f"has {counted(len(texts), 'option')}"
        raise DataError(f"{location}: {empty}; a question has 2 to {len(LETTERS)} options, none of them empty")
    prefixed = [
        re.fullmatch(rf"\(?{letter}[.:)]\s*(.*)", text, re.DOTALL) for letter, text in zip(LETTERS, texts, strict=False)
    ]
    return [match[1] for match in prefixed if match] if all(prefixed) else texts


def _pointed(row: Row, column: str, how: str, where: str) -> Answer:
    """Read an answer that is the position or the letter of an option."""
    location, options = f"{where}: {column}", row[_OPTIONS]
    text = as_text(value_of(row, column), location).strip()
    last = len(options) - 1
    if how == "letter":
        letter = text.strip("().: ").upper()
        index = LETTERS.index(letter) if len(letter) == 1 and letter in LETTERS else None
        allowed = f"A to {LETTERS[last]}"
    else:
        start = 0 if how == "index" else 1
        index = int(text) - start if re.fullmatch(r"-?\d{1,9}", text) else None
        allowed = f"{start} to {last + start}"
    if index is None or not 0 <= index <= last:
        raise DataError(
            f"{location}: is {printable(text, 80)!r}, must be {allowed}, the {how} of one of its "
            f"{counted(len(options), 'choice')}; correct it, or columns.answer"
        )
    return Answer(LETTERS[index])


def _chosen(row: Row, value: Any, location: str) -> Answer:
    """Read an answer that is the text of an option."""
    text, options = as_text(value, location).strip(), row[_OPTIONS]
    if text not in options:
        raise DataError(
            f"{location}: is {printable(text, 80)!r}, which is none of its choices: "
            f"{listed([printable(option, 40) for option in options])}. If it points to one, write answer: {{letter: "
            "COLUMN}, or {index: COLUMN}"
        )
    return Answer(LETTERS[options.index(text)])
