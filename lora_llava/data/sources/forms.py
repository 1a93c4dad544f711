"""Recognize forms of data by their keys: propose the `columns` that read a record, or say what to do."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from lora_llava.recipe.columns import ColumnSettings
from lora_llava.system.text import listed, printable

CONVERSATIONS = ("conversations", "conversatons", "messages")
"""Keys of the turns; the second is the spelling in LLaVA-Med's published files."""
_NAMES = {
    "image": "image images img picture photo image_path image_file image_name img_path img_name imgname imgpath "
    "file file_name filename path figure_path picture_path image_id",
    "question": "question query prompt instruction input user problem q text_input",
    "answer": "answer answers response output label labels caption completion target solution ground_truth gt "
    "assistant text_output a anwser",
    "messages": "messages conversations conversation dialog dialogue chat",
}
"""Usual names of each kind of column, most likely first."""

_KNOWN = (
    (
        {"chosen", "rejected"},
        "It is preference data. For stage prefer, add to its data: columns: {image: KEY, question: KEY, "
        "chosen: chosen, rejected: rejected}; other stages train on one answer, such as `chosen`.",
    ),
    ({"texts"}, "It has several questions in a row. Add to its data: each: texts, and `columns` for their keys."),
    ({"annotations", "data"}, "It is an export of Label Studio; have it read with: lora-llava convert labelstudio."),
    ({"video"}, "It is about a video; LLaVA-1.5 sees single images: take a frame of each."),
    ({"videos"}, "It is about videos; LLaVA-1.5 sees single images: take a frame of each."),
)
"""Keys that identify a form of data, and what to do with it."""

_NAME_KEYS = (
    "To have it read, name its keys: in its data in a recipe by columns: {image: KEY, question: KEY, answer: KEY}, "
    "in a command by --columns image=KEY,question=KEY,answer=KEY"
)
"""What to do with records whose keys say nothing."""
_MAX_KEYS = 12
"""Maximum number of a record's keys in a message."""


_MIN = frozenset("id annotator annotation_id created_at updated_at lead_time comment".split())
"""Keys that Label Studio adds to the own ones of JSON_MIN."""
QUESTION = "What is shown?"
"""Proposed for data that have images and answers alone."""
_MAX_CLASSES, _MAX_CLASS_LENGTH = 20, 40
"""Maximum number of classes that a question names, and of their characters."""


_NO_QUESTIONS: Mapping[str, str] = MappingProxyType({})


class Form(NamedTuple):
    """How a known form is read."""

    columns: ColumnSettings
    each: str | None = None


def known_form(keys: Collection[str]) -> Form | None:
    """Return how to read records of a form that its keys identify; None for any other.

    Known are conversations with images as TRL, Axolotl, LLaMA-Factory and ms-swift have them, queries and responses of
    ms-swift, The Cauldron's texts, and the lines that Roboflow exports.
    """
    image = next((name for name in ("images", "image") if name in keys), None)
    if image == "images" and "texts" in keys:
        return Form(ColumnSettings(image=image, question="user", answer="assistant"), "texts")
    for messages in reversed(CONVERSATIONS):
        if messages in keys:
            return Form(ColumnSettings(image=image, messages=messages, system="system" if "system" in keys else None))
    if image == "image" and {"prefix", "suffix"} <= set(keys):
        return Form(ColumnSettings(image=image, question="prefix", answer="suffix"))
    if image == "images" and {"query", "response"} <= set(keys):
        system = "system" if "system" in keys else None
        return Form(ColumnSettings(image=image, question="query", answer="response", system=system))
    return None


def class_question(classes: Collection[str], number: int) -> str | None:
    """Return the question for `number` records that names their classes; None if these are too many or too long."""
    are_short = max(map(len, classes), default=0) <= _MAX_CLASS_LENGTH
    if not are_short or not 2 <= len(classes) <= min(_MAX_CLASSES, number // 2):
        return None
    return f"Which of these does the image show: {', '.join(classes)}?"


def propose_columns(keys: Iterable[str], question_of: Mapping[str, str] = _NO_QUESTIONS) -> str:
    """Return the `columns` setting that reads records with these keys; empty if it cannot be inferred.

    `question_of`: the question for each column of answers that come without one.
    """
    known = list(keys)
    image = likely_key(known, "image")
    prefix = f"image: {_yaml(image)}, " if image else ""
    if messages := likely_key(known, "messages"):
        return f"columns: {{{prefix}messages: {_yaml(messages)}}}"
    question, answer = likely_key(known, "question"), likely_key(known, "answer")
    if {"annotation_id", "lead_time"} <= set(known):
        # What the annotators chose has the name of the control in their form.
        answer = next((key for key in known if key not in (*_MIN, image)), None)
    if answer and (question or image):
        asked = _yaml(question) if question else f"{{text: {_quoted(question_of.get(answer, QUESTION))}}}"
        return f"columns: {{{prefix}question: {asked}, answer: {_yaml(answer)}}}"
    return ""


def describe_record(record: Collection[str], question_of: Mapping[str, str] = _NO_QUESTIONS) -> str:
    """Describe the keys of a record, and how to read it; `question_of` as in `propose_columns`."""
    keys = [printable(str(key)) for key in record]
    shown = f"it has {listed(keys, _MAX_KEYS)}" if keys else "it has no keys"
    return f"{shown}. {_advice(record, question_of)}"


def _advice(record: Collection[str], question_of: Mapping[str, str]) -> str:
    for marks, advice in _KNOWN:
        if marks <= set(record):
            return advice
    if proposed := propose_columns(record, question_of):
        option = shlex.quote(proposed.removeprefix("columns: "))
        return f"To have it read, add to its data: {proposed} (in a command: --columns {option})"
    return _NAME_KEYS


def describe_object(content: Mapping[str, Any]) -> str:
    """Return what to do with a JSON file that holds an object instead of a list."""
    if {"images", "annotations"} <= content.keys():
        return "it is in COCO's form; have it converted with: lora-llava convert coco"
    lists = [key for key, value in content.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if lists:
        others = f" (or one of {listed([printable(key) for key in lists[1:]])})" if len(lists) > 1 else ""
        return f"its records are under {printable(lists[0])!r}. Add to its data: records: {_yaml(lists[0])}{others}"
    return "wrap it in [ ]"


def likely_key(keys: list[str], kind: str) -> str | None:
    """Return the most likely key of a kind, such as image, question or answer, ignoring case; None without one."""
    normalized = {key.lower().replace(" ", "_").replace("-", "_"): key for key in reversed(keys)}
    return next((normalized[name] for name in _NAMES[kind].split() if name in normalized), None)


def _quoted(text: str) -> str:
    """Quote a text for YAML in double quotes, since single ones enclose the whole in a shell."""
    return json.dumps(printable(text), ensure_ascii=False)


def _yaml(key: str) -> str:
    """Quote a key where YAML would not read it as text."""
    is_plain = key.replace("_", "").isalnum() and key.isascii() and not key.isdigit() and len(key) > 1
    is_word = key.lower() in ("null", "true", "false", "yes", "no", "on", "off")
    return key if is_plain and not is_word else "'" + printable(key).replace("'", "''") + "'"
