"""Convert the JSON export of Label Studio: boxes, choices and texts."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from lora_llava.data.convert.boxes import Box, check_size, clipped, corners
from lora_llava.data.convert.fields import (
    WRONG_FIELD,
    DropError,
    identity,
    input_file,
    mapping,
    number,
    numbered,
)
from lora_llava.data.convert.objects import Labeled, Scene, ask_about_objects
from lora_llava.data.convert.writer import ConvertOptions, Picture, Writer
from lora_llava.data.images.root import IMAGE_SUFFIXES
from lora_llava.data.record import check_text
from lora_llava.data.sources.cells import kind_of
from lora_llava.data.sources.tables import read_document
from lora_llava.errors import DataError
from lora_llava.system.text import printable

_QUESTIONS = ("question", "prompt", "text")
"""Keys of a task that may hold the question of its answers."""
_UPLOAD = re.compile(r"^[0-9a-f]{8}-")
"""What Label Studio puts before the name of an uploaded file."""


def convert_labelstudio(source: Path, output: Path, options: ConvertOptions) -> Writer:
    """Write questions about boxes, and a record for each choice or text.

    `source`: an export as JSON, or a directory with one; its images must be below the directory of images.
    """
    path = input_file(source, "*.json")
    content = read_document(path)
    if not isinstance(content, list):
        raise DataError(f"{path.name}: holds {kind_of(content)}, must hold a list of tasks; export it as JSON")
    with Writer(output, options.images or path.parent, options) as writer:
        writer.report.rules.append(
            "Annotation: of several of a task the one marked as ground truth, else the first; canceled ones and "
            "predictions are not used."
        )
        scenes = []
        for where, value in numbered(content, path.name):
            with writer.report.dropping():
                scenes.append(_Task(writer, mapping(value, where), where).read())
        if any(scene.objects for scene in scenes):
            ask_about_objects(writer, scenes)
    return writer


class _Task:
    """One task with the annotation that is used."""

    def __init__(self, writer: Writer, entry: dict[str, Any], where: str) -> None:
        self.writer, self.where = writer, where
        self.id = identity(entry, "id", where)
        self.data = mapping(entry.get("data"), f"{where}: data")
        self.answers: Counter[str] = Counter()
        """Answers so far, by the name of their control: a control of regions has one for each region."""
        self.results = self._annotation(entry)
        self.picture = self._find_picture()

    def read(self) -> Scene:
        """Write the records of choices and texts; return the image with its boxes."""
        scene = Scene(self.id, self.picture)
        for where, value in self.results:
            with self.writer.report.dropping():
                self._add(scene, mapping(value, where), where)
        return scene

    def _annotation(self, entry: dict[str, Any]) -> list[tuple[str, Any]]:
        """Return the results of the annotation to use, each with its location; the others are reported."""
        where = f"{self.where}: annotations"
        annotations = entry.get("annotations")
        if not isinstance(annotations, list):
            raise DropError(f"{where}: must be a list", WRONG_FIELD)
        usable = [
            (name, value)
            for name, value in numbered(annotations, where)
            if isinstance(value, dict) and isinstance(value.get("result"), list) and not value.get("was_cancelled")
        ]
        if not usable:
            raise DropError(f"{where}: holds none that is complete", "a task without an annotation")
        name, first = next((pair for pair in usable if pair[1].get("ground_truth") is True), usable[0])
        for other, _ in usable:
            if other != name:
                self.writer.report.drop(DropError(f"{other}: another one is taken", "a further annotation of a task"))
        return list(numbered(first["result"], f"{name}: result"))

    def _find_picture(self) -> Picture:
        """Bring the image of the task below the output; for a URL or a path of the server, the file of that name."""
        paths = {
            key: value
            for key, value in self.data.items()
            if isinstance(value, str) and _path(value).lower().endswith(IMAGE_SUFFIXES)
        }
        if not paths:
            raise DropError(f"{self.where}: data: holds no path of an image", WRONG_FIELD)
        key = "image" if "image" in paths else next(iter(paths))
        location = check_text(paths[key], f"{self.where}: data: {key}")
        candidates = _candidates(location)
        name = next((candidate for candidate in candidates if self.writer.exists(candidate, self.where)), None)
        if name is None:
            raise DropError(
                f"{self.where}: data: {key}: {printable(location, 200)} is not below the directory of images; nothing "
                "is downloaded: copy it there",
                "an image is missing",
            )
        return self.writer.picture(name, self.where)

    def _add(self, scene: Scene, result: dict[str, Any], where: str) -> None:
        kind = result.get("type")
        value = mapping(result.get("value"), f"{where}: value")
        if kind in ("choices", "textarea"):
            self._write_answer(result, value.get("choices" if kind == "choices" else "text"), where)
            return
        labels = value.get(kind) if isinstance(kind, str) else None
        if not isinstance(labels, list) or not all(isinstance(label, str) and label.strip() for label in labels):
            shown = printable(str(kind), 40)
            raise DropError(f"{where}: type: {shown} has no labels", "a type of result that is not converted")
        box: Box | None = None
        # The label holds without its box.
        with self.writer.report.dropping():
            if kind != "rectanglelabels":
                raise DropError(f"{where}: type: {printable(str(kind), 40)} is no box", "a shape that is not a box")
            box = self._box(result, value, where)
        for label in labels:
            name = check_text(label, f"{where}: {kind}").strip()
            scene.objects.append(Labeled(name, f"{where}: box", box, is_crowd=box is None))

    def _box(self, result: dict[str, Any], value: dict[str, Any], where: str) -> Box:
        """Return the corners in pixels of a box in percent of the image."""
        if value.get("rotation") not in (None, 0):
            raise DropError(f"{where}: value: rotation: a rotated box has no two corners", "a box is rotated")
        recorded = None
        if result.get("original_width") is not None and result.get("original_height") is not None:
            recorded = (number(result, "original_width", where), number(result, "original_height", where))
        check_size(self.picture, recorded, where)
        width, height = self.picture.size
        left, top, across, down = (number(value, key, f"{where}: value") for key in ("x", "y", "width", "height"))
        box = corners(left * width / 100, top * height / 100, across * width / 100, down * height / 100)
        return clipped(box, self.picture.size, f"{where}: box")

    def _write_answer(self, result: dict[str, Any], value: Any, where: str) -> None:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise DropError(f"{where}: value: must hold a list of texts", WRONG_FIELD)
        name = result.get("from_name")
        name = name if isinstance(name, str) else "answer"
        question = next((self.data[key] for key in _QUESTIONS if isinstance(self.data.get(key), str)), None)
        if question is None and self.writer.options.question is None:
            raise DropError(
                f"{where}: the task has no question; give one with --question, in which {{name}} stands for "
                f"{printable(name, 40)!r}",
                "an answer without a question",
            )
        question = question or (self.writer.options.question or "").replace("{name}", name)
        self.answers[name] += 1
        suffix = f"/{self.answers[name]}" if self.answers[name] > 1 else ""
        record = {"id": f"{self.id}/{name}{suffix}", "image": self.picture.path, "question": question}
        check_text(record["id"], where)
        self.writer.write({**record, "answer": ", ".join(texts).strip()}, kind=str(result["type"]))


def _path(location: str) -> str:
    """Return the path in a location; for local files, Label Studio puts it in the query, as `d=`."""
    try:
        parts = urlsplit(location)
        query = parse_qs(parts.query).get("d")
    except ValueError:
        return location
    return query[0] if query else unquote(parts.path)


def _candidates(location: str) -> list[str]:
    """Return the paths below the directory of images at which the file of a location may be, most exact first."""
    path = _path(location).lstrip("/")
    name = PurePosixPath(path).name
    upload = path.removeprefix("data/")
    return list(dict.fromkeys([path, upload, upload.removeprefix("upload/"), name, _UPLOAD.sub("", name)]))
