"""Recognize data sets that must be converted first, and give the command that does it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from lora_llava.data.convert.dicom import is_dicom
from lora_llava.data.images.root import IMAGE_SUFFIXES
from lora_llava.data.sources.tables import TABLE_SUFFIXES, read_document
from lora_llava.errors import DataError

_NAMES = {
    "coco": "COCO",
    "labelstudio": "an export of Label Studio",
    "visual-genome": "Visual Genome",
    "rsvqa": "RSVQA",
    "r2gen": "reports as R2Gen has them",
    "cvat": "CVAT for images",
    "dicom": "DICOM",
}
"""What each kind of `lora-llava convert` reads, in words."""
_MAX_FILES = 500
"""Maximum number of files that are opened to find DICOM among them."""


class Conversion(NamedTuple):
    """A kind of `lora-llava convert`, and what it is called with."""

    kind: str
    source: Path
    images: Path | None = None
    table: Path | None = None
    """Table that names the files."""
    encoding: str | None = None
    """Encoding of the table, as given."""

    def advice(self) -> str:
        """Return what the data are, and the command that converts them."""
        parts = ["lora-llava", "convert", self.kind, shlex.quote(str(self.source)), "converted"]
        if self.images is not None:
            parts += ["--images", shlex.quote(str(self.images))]
        if self.kind == "dicom":
            parts += ["--table", "REPORTS.csv" if self.table is None else shlex.quote(str(self.table))]
        if self.encoding is not None:
            parts += ["--encoding", shlex.quote(self.encoding)]
        what = f"{self.source}: is {_NAMES[self.kind]}" if self.table is None else f"{self.table}: names DICOM files"
        return f"{what}, which must be converted first: {' '.join(parts)}. Then: lora-llava init converted"


def conversion_of(path: Path) -> Conversion | None:
    """Return the conversion that a file or directory needs; None if it needs none."""
    return _of_directory(path) if path.is_dir() else _of_file(path)


def _of_directory(directory: Path) -> Conversion | None:
    if any(directory.glob("*/_annotations.coco.json")) or (directory / "_annotations.coco.json").is_file():
        return Conversion("coco", directory)
    if any(directory.glob("*questions.json")) and any(directory.glob("*answers.json")):
        return Conversion("rsvqa", directory)
    if any((directory / name).is_file() for name in ("question_answers.json", "region_descriptions.json")):
        return Conversion("visual-genome", directory)
    files = [*sorted(directory.glob("*.json")), *sorted(directory.glob("annotations/*.json"))]
    files += sorted(directory.glob("*.xml"))
    for file in files:
        if (conversion := _of_file(file)) is not None:
            is_alone = len(files) == 1 and file.parent == directory
            return conversion._replace(source=directory, images=None) if is_alone else conversion
    if not any(is_readable_dicom(path) for path in _first_files(directory)):
        return None
    tables = [path for path in sorted(directory.iterdir()) if path.suffix in TABLE_SUFFIXES]
    return Conversion("dicom", directory, table=tables[0] if len(tables) == 1 else None)


def _of_file(path: Path) -> Conversion | None:
    if path.suffix == ".json":
        try:
            kind = _kind(read_document(path))
        except DataError:
            # Its reader has the message.
            return None
        return None if kind is None else Conversion(kind, path, _images_for(path) if kind == "coco" else None)
    if path.suffix == ".xml" and path.is_file():
        with path.open("rb") as file:
            return Conversion("cvat", path) if b"<annotations" in file.read(4096) else None
    return Conversion("dicom", path.parent) if is_readable_dicom(path) else None


def _kind(content: Any) -> str | None:
    """Return the kind of a JSON file by its keys."""
    if isinstance(content, dict):
        if isinstance(content.get("images"), list) and isinstance(content.get("annotations"), list):
            return "coco"
        reports = next((value for value in content.values() if isinstance(value, list) and value), [])
        if reports and isinstance(reports[0], dict) and {"image_path", "report"} <= reports[0].keys():
            return "r2gen"
        if "questions" in content and reports and isinstance(reports[0], dict) and "answers_ids" in reports[0]:
            return "rsvqa"
    if isinstance(content, list) and content and isinstance(content[0], dict):
        keys = content[0].keys()
        if {"annotations", "data"} <= keys:
            return "labelstudio"
        if "qas" in keys or "regions" in keys:
            return "visual-genome"
    return None


def _images_for(path: Path) -> Path | None:
    """Return the directory with the images of a COCO file, if it is not the one with the file."""
    split = path.stem.rpartition("_")[2]
    candidates = (path.parent, path.parent / "images", path.parent.parent / split, path.parent.parent / "images")
    directory = next((candidate for candidate in candidates if _holds_images(candidate)), None)
    return None if directory == path.parent else directory


def _holds_images(directory: Path) -> bool:
    return directory.is_dir() and any(
        path.suffix.lower() in IMAGE_SUFFIXES for path in islice(directory.iterdir(), _MAX_FILES)
    )


def _first_files(directory: Path) -> Iterator[Path]:
    """Yield at most `_MAX_FILES` files below a directory that are not images by their names."""
    files = (Path(folder, name) for folder, _, names in os.walk(directory) for name in sorted(names))
    return islice((path for path in files if path.suffix.lower() not in IMAGE_SUFFIXES), _MAX_FILES)


def is_readable_dicom(path: Path) -> bool:
    """Tell whether a file is DICOM; False if it cannot be read."""
    if not path.is_file():
        return False
    try:
        return is_dicom(path)
    except OSError:
        return False
