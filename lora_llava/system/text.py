"""Text for users: counts with the right plural, and untrusted text made safe for a terminal."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

_MAX_LISTED = 8
"""Maximum names that a message lists."""
_MAX_SAID = 300
"""Maximum characters of what an error of a library says."""

# Cc: control characters, Cf: format characters such as direction overrides, Cs: lone surrogates, Zl and Zp: separators.
_UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
# Zero-width joiner and non-joiner: Cf, but part of many scripts and of emoji.
_HARMLESS = {"\u200c", "\u200d"}
_MARKDOWN = {ord(character): f"\\{character}" for character in "\\`[]<>|"}
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\x1b": "\\e"}


def counted(number: float, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: `1 image`, `2,000 images`, `1.5 epochs`; `plural` if it is not noun + s."""
    shown = f"{number:,}" if isinstance(number, int) else f"{number:,g}"
    return f"{shown} {noun if number == 1 else plural or noun + 's'}"


def dtype_name(dtype: object) -> str:
    """Return the name of a torch dtype without the module, as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def printable(text: str, most: int | None = None) -> str:
    r"""Return `text` with control characters escaped, as `\e` or `\x07`, so that a terminal does not act on them.

    Cut a text of more than `most` characters, with an ellipsis.
    """
    if most is not None and len(text) > most:
        text = f"{text[: most - 1]}\N{HORIZONTAL ELLIPSIS}"
    return "".join(char if _is_safe(char) else _SHORT.get(char, _escaped(char)) for char in text)


def printable_lines(text: str) -> str:
    """Return `printable(text)`, but keep line feeds."""
    return "\n".join(map(printable, text.split("\n")))


def python_literal(text: str) -> str:
    """Return `text` as a string literal of Python, whatever it contains; for a shell there is `shlex.quote`."""
    return json.dumps(text)


def markdown(text: str) -> str:
    """Return `text` as one line of Markdown that shows it literally, without the effect of a link, HTML or table."""
    return printable(" ".join(text.split())).translate(_MARKDOWN)


def code_span(text: str) -> str:
    """Return `text` as code in a line of Markdown; a backtick in it, which would end the code, becomes a quote."""
    return f"`{printable(' '.join(text.split())).replace('`', chr(39))}`"


def first_line(error: BaseException) -> str:
    """Return what an error of a library says, as one printable line without a final period; its type if nothing."""
    lines = str(error).strip().splitlines()
    return printable(lines[0].strip().rstrip("."), _MAX_SAID) if lines else type(error).__name__


def is_unicode(text: str) -> bool:
    """Tell whether a text can be written: a lone surrogate, which JSON can hold, cannot."""
    return text.encode("utf-8", "replace").decode("utf-8") == text


def texts_in(value: Any) -> Iterator[str]:
    """Yield every text in the content of a JSON file, keys included."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            left += [*value, *value.values()] if isinstance(value, dict) else value


def listed(names: Sequence[str], most: int = _MAX_LISTED, separator: str = ", ") -> str:
    """Join the first `most` names and add how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


def _is_safe(character: str) -> bool:
    return character in _HARMLESS or unicodedata.category(character) not in _UNSAFE


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
