"""Tell texts in different writing systems apart.

Languages of one script are not told apart: that takes a model, which is wrong for the three words of a question.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import lru_cache

_SCRIPTS = {
    "LATIN": "Latin", "CYRILLIC": "Cyrillic", "GREEK": "Greek", "ARABIC": "Arabic", "HEBREW": "Hebrew",
    "DEVANAGARI": "Devanagari", "BENGALI": "Bengali", "TAMIL": "Tamil", "THAI": "Thai", "HANGUL": "Hangul",
    "HIRAGANA": "Japanese", "KATAKANA": "Japanese", "CJK": "Chinese", "GEORGIAN": "Georgian", "ARMENIAN": "Armenian",
}  # fmt: skip
"""By the first word of a character's Unicode name: the script."""


def script_of(text: str) -> str | None:
    """Return the script of most letters of a text; None if it has no letters of a known one."""
    counts = Counter(script for character in text if (script := _script(character)) is not None)
    if not counts:
        return None
    # Japanese mixes its syllables with Chinese characters.
    if counts["Japanese"]:
        counts["Japanese"] += counts.pop("Chinese", 0)
    return counts.most_common(1)[0][0]


@lru_cache(maxsize=4096)
def _script(character: str) -> str | None:
    if not character.isalpha():
        return None
    return _SCRIPTS.get(unicodedata.name(character, "").partition(" ")[0])
