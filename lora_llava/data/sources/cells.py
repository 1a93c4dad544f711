"""Read the values of a record or row: questions, answers, messages and images."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote

from lora_llava.conversation.encode import IMAGE_PLACEHOLDER, Turn
from lora_llava.data.images.root import ImageRoot
from lora_llava.data.record import ImageSource, check_text
from lora_llava.data.sources.stored.arrow import Digests
from lora_llava.data.sources.stored.ranges import StoredBytes
from lora_llava.errors import DataError
from lora_llava.system.text import counted

ROLES: dict[str, Literal["user", "assistant"]] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
"""Roles as LLaVA names them, and as OpenAI and Hugging Face do."""

_LABEL_STUDIO = ("/data/upload/", "/data/local-files/?d=")
"""How Label Studio names images that it serves."""
_ONE_IMAGE = "LLaVA-1.5 takes one image per conversation: write a record for each, or combine them into one picture"


class Answer(NamedTuple):
    """An answer: the text to train on, and all acceptable ones."""

    text: str
    references: tuple[str, ...] = ()
    """All answers, if the data lists several."""


class Dialog(NamedTuple):
    """A conversation as the data has it, before it becomes a record."""

    turns: list[Turn]
    images: list[Any]
    """Images in the content parts of its messages, as cells."""
    references: tuple[str, ...] = ()
    """All acceptable last answers, if the data lists several."""
    system: str | None = None
    """Text of a leading system message."""


def read_question(value: Any, location: str) -> str:
    """Return the text of a question; DataError if it is not text."""
    if isinstance(value, str):
        return check_text(value, location)
    raise DataError(f"{location}: is {kind_of(value)}, must be text; convert it, or remove the record")


def read_answer(value: Any, location: str) -> Answer:
    """Return an answer: text, or a number or boolean as text; of a list the most frequent one, or the first.

    Raises DataError for anything else.
    """
    if isinstance(value, list):
        values = [item["answer"] if isinstance(item, dict) and "answer" in item else item for item in value]
        texts = [as_text(item, f"{location}[{index}]") for index, item in enumerate(values)]
        if not (filled := [text for text in texts if text.strip()]):
            raise DataError(f"{location}: is an empty list; write an answer, or remove the record")
        return Answer(Counter(filled).most_common(1)[0][0], tuple(filled) if len(filled) > 1 else ())
    return Answer(as_text(value, location))


def as_text(value: Any, location: str) -> str:
    """Return text, a number or a boolean as text; DataError for anything else."""
    if isinstance(value, str):
        return check_text(value, location)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and value == value:
        # Many tools turn integers into floats in a column with missing values: 3.0 was 3.
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
    raise DataError(f"{location}: is {kind_of(value)}, must be text; convert it, or remove the record")


def read_dialog(value: Any, location: str) -> Dialog:
    """Read a list of turns with from and value, or role and content, whose content may be a list of parts.

    A first turn of the model is left out, as LLaVA does. Raises DataError naming the turn.
    """
    if not isinstance(value, list) or not value:
        kind = "missing" if value is None else "empty" if value == [] else kind_of(value)
        raise DataError(f"{location}: is {kind}, must be a list of turns with from and value, or role and content")
    dialog = Dialog([], [])
    references: tuple[str, ...] = ()
    system: str | None = None
    for index, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise DataError(f"{location}[{index}]: is {kind_of(turn)}, must be an object with from and value")
        is_llava = turn.get("from") is not None or turn.get("role") is None
        role_key, text_key = ("from", "value") if is_llava else ("role", "content")
        speaker = turn.get(role_key)
        role = ROLES.get(speaker) if isinstance(speaker, str) else None
        content, where = turn.get(text_key), f"{location}[{index}].{text_key}"
        if speaker == "system" and index == 0:
            system = _system_text(content, where)
            continue
        if role is None:
            hint = "; only the first turn may be a system message" if speaker == "system" else ""
            raise DataError(
                f"{location}[{index}].{role_key}: is {speaker!r:.80}, must be one of {', '.join(ROLES)}{hint}"
            )
        if isinstance(content, list) and any(isinstance(part, dict) and "type" in part for part in content):
            text = _join_parts(content, where, dialog.images)
            references = references if role == "user" else ()
        elif role == "user":
            text = read_question(content, where)
        else:
            text, references = read_answer(content, where)
        dialog.turns.append(Turn(role, text))
    if not dialog.turns:
        raise DataError(f"{location}: has only a system message; add a question and its answer")
    if len(dialog.turns) > 1 and dialog.turns[0].role == "assistant":
        del dialog.turns[0]
    return dialog._replace(references=references, system=system)


def _system_text(content: Any, location: str) -> str:
    """Return the text of a system message."""
    if not isinstance(content, list):
        return read_question(content, location)
    images: list[Any] = []
    text = _join_parts(content, location, images)
    if images or IMAGE_PLACEHOLDER in text:
        raise DataError(f"{location}: has an image, must be text; move the image to a question")
    return text


def _join_parts(parts: list[Any], location: str, images: list[Any]) -> str:
    """Join content parts as lines of text; their images are added to `images`."""
    lines = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            lines.append(read_question(part.get("text"), location))
        elif kind in ("image", "image_url"):
            lines.append(IMAGE_PLACEHOLDER)
            if (image := _part_image(part)) is not None:
                images.append(image)
        else:
            raise DataError(f"{location}: has a part of type {kind!r:.80}, must be text, image or image_url")
    return "\n".join(lines)


def _part_image(part: Mapping[str, Any]) -> Any:
    """Return the image of a content part; None if it is only a placeholder."""
    for key in ("image", "image_url", "url", "path", "base64"):
        value = part.get(key)
        if isinstance(value, dict) and "url" in value:
            value = value["url"]
        if key == "base64" and isinstance(value, str):
            return value if value.startswith("data:") else f"data:image;base64,{value}"
        if value is not None:
            return value
    return None


def place_image(turns: list[Turn]) -> list[Turn]:
    """Put the placeholder before the first question, unless a turn has one."""
    first = None
    # A loop, since generators would take a tenth of the time that a record takes.
    for index, turn in enumerate(turns):
        if IMAGE_PLACEHOLDER in turn.text:
            return turns
        if first is None and turn.role == "user":
            first = index
    if first is None:
        return turns
    return [*turns[:first], Turn("user", f"{IMAGE_PLACEHOLDER}\n{turns[first].text}"), *turns[first + 1 :]]


class ImageCells:
    """Reads image cells: paths, bytes, data URLs, lists of one image; equal bytes become one image."""

    def __init__(self, root: ImageRoot) -> None:
        self.root = root
        self.digests = Digests()
        self._embedded: dict[str, ImageSource] = {}

    def source(self, cell: Any, where: str) -> ImageSource | None:
        """Return the image of a cell, None if it is empty; DataError naming the field if it is not an image."""
        if isinstance(cell, str):
            return self._of_text(cell, where)
        location = f"{where}: {self.root.field_name}"
        if isinstance(cell, list):
            if len(cell) > 1:
                raise DataError(f"{location}: holds {counted(len(cell), 'image')}. {_ONE_IMAGE}")
            cell = cell[0] if cell else None
            if isinstance(cell, str):
                return self._of_text(cell, where)
        if isinstance(cell, dict) and {"bytes", "path", "url"} & cell.keys():
            return self._of_mapping(cell, where)
        if cell is None:
            return None
        if isinstance(cell, bytes | StoredBytes):
            return self.embedded(cell, where)
        raise DataError(f"{location}: is {kind_of(cell)}, must be a path relative to image_root")

    def _of_text(self, cell: str, where: str) -> ImageSource:
        """Return the image of a path or a data URL."""
        location = f"{where}: {self.root.field_name}"
        check_text(cell[:4096], location)
        if cell[:5].lower() == "data:":
            return self.embedded(_decoded(cell, location), where)
        if cell.startswith(_LABEL_STUDIO):
            cell = self._from_label_studio(cell)
        return self.root.source(cell, where)

    def _from_label_studio(self, name: str) -> str:
        """Return the path below the root of an image as an export of Label Studio names it.

        An uploaded image has its path in Label Studio's media directory, or its name alone; one of local files has the
        path below their root.
        """
        head, _, local = name.partition("?d=")
        if local:
            return unquote(local)
        upload = head.removeprefix("/data/")
        names = (upload, upload.removeprefix("upload/"), upload.rpartition("/")[2])
        return next((path for path in names if (self.root.root / path).is_file()), names[-1])

    def _of_mapping(self, cell: Mapping[str, Any], where: str) -> ImageSource | None:
        data, path = cell.get("bytes"), cell.get("path")
        location = f"{where}: {self.root.field_name}"
        if data is not None and not isinstance(data, bytes | StoredBytes):
            raise DataError(f"{location}: bytes: is {kind_of(data)}, must be bytes; give the path of a file instead")
        if path is not None and not isinstance(path, str):
            raise DataError(f"{location}: path: is {kind_of(path)}, must be text")
        if data is not None:
            return self.embedded(data, where, path)
        if path is None:
            return None if (url := cell.get("url")) is None else self.source(url, where)
        return self.root.source(path, where)

    def embedded(self, data: bytes | StoredBytes, where: str, path: str | None = None) -> ImageSource:
        """Return an embedded image, whose bytes may stay on disk; `path` is its name in the data."""
        key = self.digests.of(data) if isinstance(data, StoredBytes) else hashlib.sha256(data).hexdigest()
        source = ImageSource(key, None, data, where, _file_name(path), self.root.window)
        return self._embedded.setdefault(key, source)


def _decoded(url: str, location: str) -> bytes:
    """Return the bytes of a base64 data URL."""
    head, comma, body = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise DataError(
            f"{location}: {head[:60]!r} is not a base64 data URL; give a path relative to image_root", "image_path"
        )
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError):
        raise DataError(
            f"{location}: {head[:60]!r} is followed by broken base64; encode the image again", "bad_image"
        ) from None


def _file_name(path: str | None) -> str:
    """Return the name of an embedded image in its dataset; of an absolute path, only the last part."""
    if not path:
        return ""
    is_absolute = path.startswith("/") or ":" in path or "\\" in path
    return path.replace("\\", "/").rpartition("/")[2] if is_absolute else path


def kind_of(value: Any) -> str:
    """Describe the type of a value, with an article, for messages."""
    if isinstance(value, float) and value != value:
        return "empty"
    names = {dict: "an object", str: "text", bool: "a boolean", type(None): "empty", int: "a number"}
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return names.get(type(value), "a number" if isinstance(value, float) else f"of type {type(value).__name__}")


def join_images(cell: Any, parts: list[Any]) -> Any:
    """Combine the image cell of a record with the images in its messages into one cell."""
    if not parts:
        return cell
    return [*(cell if isinstance(cell, list) else [] if cell is None else [cell]), *parts]
