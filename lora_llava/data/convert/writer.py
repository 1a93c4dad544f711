"""Write converted records, bring their images below the output, and keep account of what is left out."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from PIL import Image

from lora_llava.conversation.encode import IMAGE_PLACEHOLDER
from lora_llava.data.convert.fields import WRONG_FIELD, DropError
from lora_llava.data.images.headers import header_problem
from lora_llava.data.images.read import FORMATS, open_image, orientation_of
from lora_llava.data.images.root import ImageRoot
from lora_llava.data.record import ImageSource, check_text
from lora_llava.errors import DataError

REPORT_QUESTION = "Write the radiology report of this image."
"""Question of a radiology report, which comes without one."""
_IMAGES = "images"
_MAX_EXAMPLES = 20
"""Maximum number of things named for each reason in the report."""
_REASONS = {
    "missing_image": "an image is missing",
    "image_path": "an image path is not allowed",
    "bad_image": "an image cannot be decoded",
}


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """What a user can choose; a converter uses some of it."""

    images: Path | None = None
    """Directory that the paths of images are relative to; None: that of the annotations."""
    seed: int = 0
    per_image: int = 4
    """Maximum number of questions of a kind about one image."""
    question: str | None = None
    """Question for answers that come without one."""
    table: Path | None = None
    """File with the reports or questions of a DICOM directory."""
    encoding: str | None = None
    """Encoding of the table; None: that of its bytes."""
    window: tuple[float, float] | None = None
    """Values of a DICOM image shown as black and white; None: as the file says."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An image below the output."""

    path: str
    """Relative to the output."""
    size: tuple[int, int]
    """Width and height in pixels, upright."""
    orientation: int = 1
    """EXIF orientation: above 1 the file is rotated or mirrored, above 4 its width and height are exchanged."""


@dataclass
class Report:
    """What was written, what was left out, and by which rules."""

    rules: list[str] = field(default_factory=list)
    names_files: bool = True
    """Whether the file may name source files: paths of DICOM series often hold the names of patients."""
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    types: Counter[str] = field(default_factory=Counter)
    splits: Counter[str] = field(default_factory=Counter)
    images: Counter[str] = field(default_factory=Counter)
    is_grouped: bool = False
    """Whether the records have a `group`."""

    def drop(self, error: DataError) -> None:
        """Count what an error leaves out."""
        reason = error.reason if isinstance(error, DropError) else _REASONS.get(error.kind, WRONG_FIELD)
        self.dropped[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _MAX_EXAMPLES:
            examples.append(str(error))

    @contextmanager
    def dropping(self) -> Iterator[None]:
        """Count what a block leaves out by raising DataError, and continue after the block."""
        try:
            yield
        except DataError as error:
            self.drop(error)

    def content(self) -> dict[str, Any]:
        """Return the report as JSON."""
        dropped = [
            {"reason": reason, "count": count, "examples": self.examples[reason] if self.names_files else []}
            for reason, count in self.dropped.most_common()
        ]
        return {
            "records": dict(self.splits),
            "types": dict(self.types),
            "images": dict(self.images),
            "grouped": self.is_grouped,
            "rules": self.rules,
            "dropped": dropped,
        }


class Writer:
    """Writes one JSON Lines file for each split, and the images below `images/`.

    Images in formats that the kit reads are hard links, or copies where the file system has none; TIFF becomes PNG of 8
    bits. No link leads out of the output.
    """

    def __init__(self, output: Path, root: Path, options: ConvertOptions) -> None:
        self.output, self.options, self.report = output, options, Report()
        self._root = ImageRoot(root, "image", at_once=True)
        self._pictures: dict[str, Picture | DataError] = {}
        self._sources: dict[str, str] = {}
        self._files: dict[str, TextIO] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def picture(self, name: str, where: str) -> Picture:
        """Bring an image below the output, once; `name` is its path below the image root.

        Raises DataError if it is missing, damaged, or outside of the root.
        """
        known = self._pictures.get(name)
        if known is None:
            try:
                known = self._bring(self._root.source(name, where))
            except DataError as error:
                known = error
            self._pictures[name] = known
        if isinstance(known, DataError):
            raise known
        return known

    def exists(self, name: str, where: str) -> bool:
        """Tell whether there is an image of this path below the root."""
        try:
            self._root.source(name, where)
        except DataError:
            return False
        return True

    def add_picture(self, name: str, image: Image.Image) -> Picture:
        """Write an image that a converter has made as PNG."""
        target = self.output / _IMAGES / name
        target.parent.mkdir(parents=True, exist_ok=True)
        image.save(target, "PNG")
        self.report.images["converted to PNG"] += 1
        return Picture(f"{_IMAGES}/{name}", image.size)

    def write(self, record: dict[str, Any], *, kind: str, split: str = "records") -> None:
        """Write a record with `id`, `image`, `question`, `answer` and own keys to the file of a split.

        A record is dropped if a text is empty, holds the image placeholder, or is not valid Unicode.
        """
        question, answer = record.pop("question"), record.pop("answer")
        with self.report.dropping():
            _check_turn(question, f"record {record['id']}: question")
            _check_turn(answer, f"record {record['id']}: answer")
            conversation = [
                {"from": "human", "value": f"{IMAGE_PLACEHOLDER}\n{question}"},
                {"from": "gpt", "value": answer},
            ]
            own = {key: value for key, value in record.items() if key not in ("id", "image") and value is not None}
            row = {"id": record["id"], "image": record["image"], "conversations": conversation, "type": kind, **own}
            self._file(split).write(json.dumps(row, ensure_ascii=False) + "\n")
            self.report.types[kind] += 1
            self.report.is_grouped |= record.get("group") is not None
            self.report.splits[f"{split}.jsonl"] += 1

    def _file(self, split: str) -> TextIO:
        if split not in self._files:
            path = self.output / f"{split}.jsonl"
            self._files[split] = self._stack.enter_context(path.open("w", encoding="utf-8"))
        return self._files[split]

    def _bring(self, source: ImageSource) -> Picture:
        assert source.path is not None
        if (problem := header_problem(source)) is not None:
            raise problem
        form, size, orientation = _look_at(source.path)
        if form == "TIFF":
            name = self._free_name(f"{Path(source.key).with_suffix('')}.png", source)
            return replace(self.add_picture(name, open_image(source)), orientation=orientation)
        name = self._free_name(source.key, source)
        target = self.output / _IMAGES / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            self.report.images[_link_or_copy(source.path, target)] += 1
        return Picture(f"{_IMAGES}/{name}", size, orientation)

    def _free_name(self, name: str, source: ImageSource) -> str:
        """Return a name that no other image has: a.tif and a.png of one directory would both become a.png."""
        while self._sources.setdefault(name, source.key) != source.key:
            name = f"{Path(name).with_suffix('')}_{Path(source.key).suffix.removeprefix('.')}{Path(name).suffix}"
        return name


def _check_turn(text: str, where: str) -> None:
    check_text(text, where)
    if not text.strip():
        raise DropError(f"{where}: is empty", "a text is empty")
    if IMAGE_PLACEHOLDER in text:
        raise DropError(f"{where}: holds {IMAGE_PLACEHOLDER}", f"a text holds {IMAGE_PLACEHOLDER}")


def _link_or_copy(source: Path, target: Path) -> str:
    """Link a file, or copy it if the file system does not let us; return what was done."""
    with suppress(OSError):
        os.link(source, target)
        return "linked"
    shutil.copyfile(source, target)
    return "copied"


def _look_at(path: Path) -> tuple[str, tuple[int, int], int]:
    """Return format, upright size and EXIF orientation of an image that can be opened."""
    with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as image:
        (width, height), form, orientation = image.size, str(image.format), orientation_of(image)
    return form, (height, width) if orientation > 4 else (width, height), orientation
