"""Decode text files as spreadsheets write them: UTF-8, UTF-16 with its mark, and Windows' Latin code page."""

from __future__ import annotations

import codecs
import re

from lora_llava.errors import DataError
from lora_llava.system.text import printable

_UTF_8 = codecs.BOM_UTF8
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_LATIN, _OTHERS = "cp1252", ("cp1250", "cp1254", "cp1257")
"""The code page of Western Europe, and those of the rest of Europe with Latin letters."""
_STRANGE = re.compile(
    # A sign between two letters, where DOS and old Macs have letters.
    r"[^\W\d_](?![\u2019\xa0\xad])[^\w\x00-\x7f][^\W\d_]"
    # Letters beyond ASCII without one of ASCII next to them, or three in a row, as in other alphabets.
    r"|(?<![^\W\d_])(?:(?![a-zA-Z])[^\W\d_])+(?![^\W\d_])|(?:(?![a-zA-Z])[^\W\d_]){3}"
    # Signs and quotes next to a letter where no text has them.
    r"|[\u20ac\u2122\u2020\u2021\u2030\u2022\u2026\u201a\u2039\u203a\u201d][^\W\d_]"
    r"|[^\W\d_][\u20ac\u2020\u2021\u2030\u201a\u2039]"
    # As in UTF-16 without its mark.
    r"|\0"
)
_SHOWN = 30
_NO_TEXT = {
    b"PK\x03\x04": "a ZIP archive, or a workbook; name a workbook .xlsx",
    b"\xd0\xcf\x11\xe0": "a workbook of an old Excel; save it as CSV UTF-8",
    b"PAR1": "a parquet file; name it .parquet",
    b"\x1f\x8b": "compressed with gzip; unpack it",
    b"\x89PNG": "an image; name a table",
    b"\xff\xd8\xff": "an image; name a table",
}
"""What files of other kinds are, by their first bytes, and what to do."""


def decode(raw: bytes, encoding: str | None, name: str) -> str:
    """Decode a file in `encoding`; None: in UTF-8, UTF-16 with a byte order mark, or cp1252 where that is certain.

    It is certain if all bytes mean the same in the other Latin code pages. Raises DataError naming the byte.
    """
    if encoding is None and raw.startswith(_UTF_16):
        encoding = "utf-16"
    # The mark of UTF-8 is no part of the text, even where UTF-8 is declared.
    body = raw.removeprefix(_UTF_8) if encoding is None or codecs.lookup(encoding).name == "utf-8" else raw
    try:
        return body.decode(encoding or "utf-8")
    # Some encodings raise it without the byte.
    except UnicodeError as error:
        start = error.start if isinstance(error, UnicodeDecodeError) else 0
        if encoding is not None:
            byte = start + 1 + len(raw) - len(body)
            raise DataError(f"{name}: not {encoding} at byte {byte}; correct encoding, or save it as UTF-8") from None
    if body is raw and (text := _certain_latin(raw)) is not None:
        return text
    byte = start + 1 + len(raw) - len(body)
    if what := next((what for start, what in _NO_TEXT.items() if raw.startswith(start)), None):
        raise DataError(f"{name}: is no text, but {what}")
    declared = _LATIN if b"\0" not in raw else "utf-16-be" if raw.startswith(b"\0") else "utf-16-le"
    raise DataError(f"{name}: not UTF-8 at byte {byte}{_as_latin(body, start)}; {declaring(declared)}")


def declaring(encoding: str) -> str:
    """Return what to do with a text that is not UTF-8, but may be in an encoding."""
    return (
        "save it as UTF-8 (Excel: CSV UTF-8), or give its encoding: in its data in a recipe by "
        f"encoding: {encoding}, in a command by --encoding {encoding}"
    )


def to_utf_8(raw: bytes, encoding: str | None, name: str) -> bytes:
    """Return a file's bytes in UTF-8, without its mark; those without another encoding may still be invalid."""
    if encoding is None and not raw.startswith(_UTF_16):
        return raw.removeprefix(_UTF_8)
    return decode(raw, encoding, name).encode("utf-8", "surrogatepass")


def _certain_latin(raw: bytes) -> str | None:
    """Decode cp1252 if no other Latin code page, and no other alphabet, gives another plausible text."""
    try:
        text = raw.decode(_LATIN)
        others = [raw.decode(name, "replace") for name in _OTHERS]
    except UnicodeDecodeError:
        return None
    is_same = all(other == text for other in others)
    # A low quote that nothing closes is a letter of DOS.
    is_same = is_same and text.count("\u201e") <= text.count("\u201c") + text.count("\u201d")
    return text if is_same and not _STRANGE.search(text) else None


def _as_latin(raw: bytes, start: int) -> str:
    """Show how the text around a byte reads in cp1252."""
    around = raw[max(0, start - _SHOWN) : start + _SHOWN].decode(_LATIN, "replace")
    words = next((word for word in around.split() if any(ord(char) > 127 for char in word)), "")
    return f" (as cp1252 it reads {printable(words)!r})" if words else ""
