"""Recognize forms of data by their keys: propose the `columns` that read a record, or say what to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lora_llava.system.text import listed, printable

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
    ({"texts"}, "It has several questions in a row (`texts`); write one row for each."),
    ({"annotations", "data"}, "It is an export of Label Studio; export it as JSON_MIN or CSV, and use `columns`."),
    ({"video"}, "It is about a video; LLaVA-1.5 sees single images: take a frame of each."),
    ({"videos"}, "It is about videos; LLaVA-1.5 sees single images: take a frame of each."),
    ({"prefix", "suffix", "image"}, "Add to its data: columns: {image: image, question: prefix, answer: suffix}"),
)
"""Keys that identify a form of data, and what to do with it."""

_MAX_KEYS = 12
"""Maximum number of a record's keys in a message."""


def propose_columns(keys: Iterable[str]) -> str:
    """Return the `columns` setting that reads records with these keys; empty if it cannot be inferred."""
    known = list(keys)
    image = _first(known, "image")
    prefix = f"image: {_yaml(image)}, " if image else ""
    if messages := _first(known, "messages"):
        return f"columns: {{{prefix}messages: {_yaml(messages)}}}"
    question, answer = _first(known, "question"), _first(known, "answer")
    if question and answer:
        return f"columns: {{{prefix}question: {_yaml(question)}, answer: {_yaml(answer)}}}"
    return ""


def describe_record(record: Mapping[str, Any]) -> str:
    """Describe the keys of a record, and how to read it."""
    keys = [printable(str(key)) for key in record]
    shown = f"it has {listed(keys, _MAX_KEYS)}" if keys else "it has no keys"
    return f"{shown}. {_advice(record)}"


def _advice(record: Mapping[str, Any]) -> str:
    for marks, advice in _KNOWN:
        if marks <= record.keys():
            return advice
    if proposed := propose_columns(record):
        return f"To have it read, add to its data: {proposed}"
    return "To have it read, name its keys in its data: columns: {image: KEY, question: KEY, answer: KEY}"


def describe_object(content: Mapping[str, Any]) -> str:
    """Return what to do with a JSON file that holds an object instead of a list."""
    if {"images", "annotations"} <= content.keys():
        return "it is in COCO's form: write one record for each annotation, with its image's file_name"
    lists = [key for key, value in content.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if lists:
        others = f" (or one of {listed([printable(key) for key in lists[1:]])})" if len(lists) > 1 else ""
        return f"its records are under {printable(lists[0])!r}. Add to its data: records: {_yaml(lists[0])}{others}"
    return "wrap it in [ ]"


def _first(keys: list[str], kind: str) -> str | None:
    """Return the most likely key of a kind, ignoring case."""
    normalized = {key.lower().replace(" ", "_").replace("-", "_"): key for key in reversed(keys)}
    return next((normalized[name] for name in _NAMES[kind].split() if name in normalized), None)


def _yaml(key: str) -> str:
    """Quote a key where YAML would not read it as text."""
    is_plain = key.replace("_", "").isalnum() and key.isascii() and not key.isdigit() and len(key) > 1
    is_word = key.lower() in ("null", "true", "false", "yes", "no", "on", "off")
    return key if is_plain and not is_word else "'" + printable(key).replace("'", "''") + "'"
