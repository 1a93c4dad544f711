"""Convert RSVQA: questions about aerial images, their answers and the images, in three files joined by ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_llava.data.convert.fields import WRONG_FIELD, DropError, identity, is_split, items, mapping, numbered, text
from lora_llava.data.convert.objects import SHORT
from lora_llava.data.convert.writer import ConvertOptions, Writer
from lora_llava.data.sources.tables import read_document
from lora_llava.errors import DataError

_FOLDERS = ("", "Images_LR/", "Images_HR/", "Images/", "images/", "Data/")
_SUFFIXES = (".tif", ".tiff", ".png", ".jpg")
_INACTIVE = "marked as inactive"


def convert_rsvqa(source: Path, output: Path, options: ConvertOptions) -> Writer:
    """Write a record for each active question of a directory with `*questions.json`, `*answers.json`, `*images.json`.

    `all_questions.json` is read only if there is no other: it repeats the splits.
    """
    paths = sorted(source.glob("*questions.json"))
    splits = [path for path in paths if not path.name.startswith("all_")] or paths
    if not splits:
        raise DataError(f"{source}: holds no file *questions.json; name the directory of RSVQA's JSON files as SRC")
    with Writer(output, options.images or source, options) as writer:
        writer.report.rules.append("Of several active answers to a question, the first in the list is taken.")
        for path in splits:
            _convert_split(writer, path)
    return writer


def _convert_split(writer: Writer, path: Path) -> None:
    start = path.name.removesuffix("questions.json")
    name = start.rpartition("split_")[2].strip("_")
    split = name if is_split(name) else "records"
    images = _by_id(writer, path.with_name(f"{start}images.json"), "images")
    answers = _by_id(writer, path.with_name(f"{start}answers.json"), "answers")
    for where, value in numbered(items(read_document(path), "questions", path.name), f"{path.name}, questions"):
        with writer.report.dropping():
            record, kind = _question(writer, mapping(value, where), where, images, answers)
            writer.write(record, kind=kind, split=split)


def _by_id(writer: Writer, path: Path, key: str) -> dict[str, dict[str, Any]]:
    """Return the entries of the list under `key` by their ids, each with its location under the key ""."""
    entries = {}
    for where, value in numbered(items(read_document(path), key, path.name), f"{path.name}, {key}"):
        with writer.report.dropping():
            entry = mapping(value, where)
            entries[identity(entry, "id", where)] = {**entry, "": where}
    return entries


def _question(
    writer: Writer,
    entry: dict[str, Any],
    where: str,
    images: dict[str, dict[str, Any]],
    answers: dict[str, dict[str, Any]],
) -> tuple[dict[str, Any], str]:
    """Join a question with its image and answer; return the record and its type."""
    if entry.get("active") is False:
        raise DropError(f"{where}: is inactive", _INACTIVE)
    key, image = identity(entry, "id", where), identity(entry, "img_id", where)
    if image not in images:
        raise DropError(f"{where}: img_id: {image} is not in the file of images", "an id joins nothing")
    if images[image].get("active") is False:
        raise DropError(f"{where}: img_id: {image} is inactive", _INACTIVE)
    question, kind = text(entry, "question", where), text(entry, "type", where)
    answer = _answer(entry, where, answers)
    paths = (f"{folder}{image}{suffix}" for folder in _FOLDERS for suffix in _SUFFIXES)
    name = next((path for path in paths if writer.exists(path, where)), f"{image}.tif")
    picture = writer.picture(name, where)
    return {"id": key, "image": picture.path, "question": question + SHORT, "answer": answer}, kind


def _answer(entry: dict[str, Any], where: str, answers: dict[str, dict[str, Any]]) -> str:
    """Return the first active answer to a question."""
    keys = entry.get("answers_ids")
    if not isinstance(keys, list) or not keys:
        raise DropError(f"{where}: answers_ids: must be a list of ids", WRONG_FIELD)
    for value in keys:
        key = identity({"answers_ids": value}, "answers_ids", where)
        if key not in answers:
            raise DropError(f"{where}: answers_ids: {key} is not in the file of answers", "an id joins nothing")
        answer = answers[key]
        if answer.get("active") is not False:
            return text(answer, "answer", str(answer[""]))
    raise DropError(f"{where}: answers_ids: all are inactive", _INACTIVE)
