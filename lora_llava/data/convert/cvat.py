"""Convert "CVAT for images 1.1": boxes and tags in XML, read without entities or document types."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn
from xml.parsers import expat

from lora_llava.data.convert.boxes import Box, check_size, clipped
from lora_llava.data.convert.fields import DropError, finite, identity, images_near, input_file, is_split, text
from lora_llava.data.convert.objects import Labeled, Scene, ask_about_objects
from lora_llava.data.convert.writer import ConvertOptions, Writer
from lora_llava.errors import DataError
from lora_llava.system.text import printable

_SHAPES = ("polygon", "polyline", "points", "mask", "ellipse", "cuboid", "skeleton")
_MAX_DEPTH = 50
"""Maximum nesting of elements; CVAT's has six levels."""
_MAX_BYTES = 2 * 2**30
_CHUNK = 2**20


def convert_cvat(source: Path, output: Path, options: ConvertOptions) -> Writer:
    """Write questions about boxes and tags.

    `source`: an annotation file, or a directory with one; images are below `images/` next to it.
    """
    path = input_file(source, "*.xml")
    with Writer(output, options.images or images_near(path), options) as writer:
        reader = _Reader(writer, path)
        reader.read()
        if any(scene.objects for scene in reader.scenes):
            ask_about_objects(writer, reader.scenes)
    return writer


class _Reader:
    """Reads the elements of a file one after the other and collects the images with their labels."""

    def __init__(self, writer: Writer, path: Path) -> None:
        self.writer, self.path = writer, path
        self.scenes: list[Scene] = []
        self._scene: Scene | None = None
        self._recorded: tuple[float, float] | None = None
        self._image = ""
        self._depth = 0
        self._shapes = 0

    def read(self) -> None:
        """Parse the file; DataError if it is not XML, has a document type, or is of another form."""
        name = self.path.name
        parser = expat.ParserCreate()
        # Entities are declared in a document type; without one there is nothing to expand or to load.
        parser.StartDoctypeDeclHandler = self._refuse_document_type
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        try:
            if (size := self.path.stat().st_size) > _MAX_BYTES:
                raise DataError(f"{name}: has {size:,} bytes, at most {_MAX_BYTES:,} are read; export it in parts")
            with self.path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    parser.Parse(chunk, False)
                parser.Parse(b"", True)
        except expat.ExpatError as error:
            problem = expat.ErrorString(error.code)
            raise DataError(f"{name}, line {error.lineno}: not valid XML: {problem}; export it again") from None
        except (LookupError, ValueError):
            raise DataError(f"{name}: its encoding is unknown; export it as UTF-8") from None

    def _refuse_document_type(self, *_: object) -> NoReturn:
        raise DataError(f"{self.path.name}: has a document type (<!DOCTYPE>), which CVAT does not write; remove it")

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise DataError(f"{self.path.name}: is nested deeper than {_MAX_DEPTH} elements; export it again")
        if self._depth == 1 and tag != "annotations":
            raise DataError(f"{self.path.name}: begins with <{printable(tag, 40)}>, must begin with <annotations>")
        if tag == "track":
            raise DataError(f"{self.path.name}: is of CVAT for video; export it as CVAT for images 1.1")
        with self.writer.report.dropping():
            if tag == "image" and self._depth == 2:
                self._shapes = 0
                self._image = f"{self.path.name}, image {printable(attributes.get('id', '?'), 40)}"
                self._start_image(attributes)
            elif self._scene is not None and self._depth == 3:
                self._shapes += 1
                self._add(self._scene, tag, attributes, f"{self._image}, {printable(tag, 40)} {self._shapes}")

    def _end(self, tag: str) -> None:
        if tag == "image" and self._depth == 2:
            self._scene = None
        self._depth -= 1

    def _start_image(self, attributes: dict[str, str]) -> None:
        self._scene = None
        key = identity(attributes, "id", self._image)
        picture = self.writer.picture(text(attributes, "name", self._image), self._image)
        subset = attributes.get("subset", "")
        split = subset if is_split(subset) else "records"
        self._recorded = (_number(attributes, "width", self._image), _number(attributes, "height", self._image))
        self._scene = Scene(key, picture, split)
        self.scenes.append(self._scene)

    def _add(self, scene: Scene, tag: str, attributes: dict[str, str], where: str) -> None:
        if tag not in ("box", "tag", *_SHAPES):
            return
        label = text(attributes, "label", where)
        box: Box | None = None
        # The label holds without its box.
        with self.writer.report.dropping():
            if tag in _SHAPES:
                raise DropError(f"{where}: is no box", "a shape that is not a box")
            if tag == "box":
                box = self._box(attributes, scene, where)
        scene.objects.append(Labeled(label, where, box, is_crowd=box is None, is_tag=tag == "tag"))

    def _box(self, attributes: dict[str, str], scene: Scene, where: str) -> Box:
        if "rotation" in attributes and _number(attributes, "rotation", where) != 0:
            raise DropError(f"{where}: rotation: a rotated box has no two corners", "a box is rotated")
        check_size(scene.picture, self._recorded, where)
        left, top, right, bottom = (_number(attributes, key, where) for key in ("xtl", "ytl", "xbr", "ybr"))
        return clipped((left, top, right, bottom), scene.picture.size, where)


def _number(attributes: dict[str, str], key: str, where: str) -> float:
    try:
        value: float | str | None = float(attributes[key])
    except (KeyError, ValueError):
        value = attributes.get(key)
    return finite(value, f"{where}: {key}")
