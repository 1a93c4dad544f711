"""Convert reports of radiographs as R2Gen publishes them (`annotation.json` of IU X-Ray and MIMIC-CXR)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_llava.data.convert.fields import (
    WRONG_FIELD,
    DropError,
    identity,
    images_near,
    input_file,
    is_split,
    mapping,
    numbered,
    text,
)
from lora_llava.data.convert.writer import REPORT_QUESTION, ConvertOptions, Writer
from lora_llava.data.sources.cells import kind_of
from lora_llava.data.sources.tables import read_document
from lora_llava.errors import DataError
from lora_llava.system.text import printable

_GROUPS = ("subject_id", "study_id", "id")
"""Keys of the patient, or of what comes nearest, in order."""


def convert_r2gen(source: Path, output: Path, options: ConvertOptions) -> Writer:
    """Write a record for each report, with the first of its views, to the file of its split.

    `source`: annotation.json, or a directory with it; images are below `images/` next to it.
    """
    path = input_file(source, "annotation.json")
    content = read_document(path)
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path.name}: holds {kind_of(content)}, must hold an object with train, val and test")
    with Writer(output, options.images or images_near(path), options) as writer:
        writer.report.rules += [
            "View: the first of image_path, the frontal one in IU X-Ray; further views are left out.",
            f"Group: {', '.join(_GROUPS[:-1])} or {_GROUPS[-1]}, the first that a record has.",
        ]
        for split, reports in content.items():
            if not is_split(split) or not isinstance(reports, list):
                raise DataError(
                    f"{path.name}: {printable(split, 40)!r}: is no split ({kind_of(reports)}); "
                    "must be a list of reports under train, val or test"
                )
            for where, value in numbered(reports, f"{path.name}, {split}"):
                _convert_report(writer, value, where, split)
    return writer


def _convert_report(writer: Writer, value: Any, where: str, split: str) -> None:
    with writer.report.dropping():
        entry = mapping(value, where)
        views = entry.get("image_path")
        if not isinstance(views, list) or not views:
            raise DropError(f"{where}: image_path: must be a list of paths", WRONG_FIELD)
        record = {
            "id": identity(entry, "id", where),
            "image": writer.picture(text({"image_path": views[0]}, "image_path", where), where).path,
            "question": writer.options.question or REPORT_QUESTION,
            "answer": text(entry, "report", where),
            "group": next(identity(entry, key, where) for key in _GROUPS if entry.get(key) is not None),
        }
        for index in range(1, len(views)):
            further = DropError(f"{where}: image_path[{index}]: one view is taken", "a further view of a study")
            writer.report.drop(further)
        writer.write(record, kind="report", split=split)
