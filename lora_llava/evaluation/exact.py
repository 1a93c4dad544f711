"""Exact match: the equality of answers by which the kit scores, strict about meaning and lenient about writing.

Case, articles, quotation marks, sentence marks, number words to twenty, thousands separators and trailing zeros of a
decimal do not count. Signs, comparisons, fractions, ratios, ranges, lists of numbers, per cent and units do. What holds
nothing else, such as "?", equals only itself. One option letter, as `A`, `(A)` or `Answer: A`, equals every answer that
names this option first: `A. Pneumonia`.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from lora_llava.evaluation.vqa_v2 import CONTRACTIONS

_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
_NUMBER_WORDS = {word: str(number) for number, word in enumerate(_WORDS)}
_SIGN_WORDS = {"minus": "-", "plus": "+"}
_ARTICLES = frozenset({"a", "an", "the"})
_LETTER = "\0"
"""In front of a word that looks like an article and is none."""
# "a" is a letter, too: vitamin a, type a. It is an article at the start and after these.
_BEFORE_ARTICLE = frozenset(
    "and or with without is was are of in on at by like has have as for to from not than near under over it's that's "
    "there's".split()
)
_AFTER_LETTER = frozenset({"and", "or", "is", "are", "to"})

_LEAD = re.compile(r"(?:the |my )?(?:final |correct |best |right )*answer\s*(?:is\s*:?|:)\s*(?=\S)")
_OPTION_LEAD = re.compile(
    r"(?:the |my )?(?:final |correct |best |right )*(?:answer|option|choice)\s*(?:is\s*:?|[:=])?\s*(?:option\s+)?"
)
_ENCLOSING = "*_`\"'"
_MAX_CHARACTERS = 10_000
"""Longer texts are no short answers: they are compared word by word as they are."""
_BARE_LETTER = re.compile(r"[(\[{]?\s*([a-z])\s*[)\]}]?\s*[.,:;]?\)?")
_OPTIONS = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"[(\[{]\s*([a-z])\s*[)\]}](?:\s*[.:,])?(.+)",
        r"([a-z])\s*[)\]](?:\s*[.:])?(.+)",
        r"([a-z])\s*[.:](.+)",
        r"([a-z])\s*\n(.+)",
        r"([a-z])\s+[-\u2013\u2014](\s.+)",
        r"[(\[]?([a-z])[)\]]?( is (?:the )?(?:correct|right|best|answer).*)",
    )
)

# Of Chinese and Japanese keyboards.
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3001: ",", 0x3002: "."}
_SUPERSCRIPTS = str.maketrans(
    "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b", "0123456789+-"
)
_SUPERSCRIPT = re.compile("[\u207a\u207b]?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")
_SUBSCRIPTS = str.maketrans("\u2080\u2081\u2082\u2083\u2084\u2085\u2086\u2087\u2088\u2089", "0123456789")
_SAME = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u00b4", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u00ab\u00bb", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2212\ufe63\uff0d", "-"),
        "\u2044": "/",
        "\u2215": "/",
        "\u00d7": " x ",
        "&": " and ",
        "`": "'",
    }
)
_SPELLINGS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<=\d)\s*[\u2013\u2014]\s*(?=\d)", "-"),  # A range.
        (r"(?<![^\s(\[])[\u2013\u2014](?=\d)", "-"),  # A sign.
        (r"[\u2013\u2014]|-{2,}(?!\d)", " "),
        (r"\bper\s?cent\b", "%"),
        (r"<\s?=|=<", "\u2264"),
        (r">\s?=", "\u2265"),
        (r"!=", "\u2260"),
        (r"==", "="),
        (r"->", "\u2192"),
        (r"\+\s?/\s?-|\+-", "\u00b1"),
        # Dots in abbreviations: e.g., U.S.
        (r"\b[^\W\d_](?:\.[^\W\d_])+\b\.?", lambda match: match[0].replace(".", "")),
    )
)
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d|,\d)|\d+)(?:\.\d+)*|\.\d+"
_TOKEN = re.compile(rf"(?P<number>{_NUMBER})|(?P<word>[^\W\d_][^\W_]*(?:'[^\W_]+)*)|(?P<sign>\S)")
_NUMBER_LIST = re.compile(rf"[(\[]\s*[-+]?(?:{_NUMBER})\s*[,;]\s*[-+]?(?:{_NUMBER})[^()\[\]]*[)\]]")
_DECORATION = frozenset(".,;:!?\"'()[]{}_*\u2026\u2022\u00b7")
_BETWEEN_NUMBERS = {",": ",", ";": ",", ":": ":", "*": "*"}


def exact_match(prediction: str, reference: str) -> bool:
    """Tell whether two answers mean the same, as the module says; symmetric."""
    first, second = _bare_letter(prediction), _bare_letter(reference)
    if first and second:
        return first == second
    if second:
        return _option_letter(prediction) == second
    if first:
        return _option_letter(reference) == first
    # What holds no token equals only itself.
    return (answer_tokens(prediction) or (prediction.strip(),)) == (answer_tokens(reference) or (reference.strip(),))


def holds_answer(prediction: str, reference: str) -> bool:
    """Tell whether an answer, such as a sentence, holds the reference as a word or as words in a row."""
    if letter := _bare_letter(reference):
        return re.search(rf"(?<!\w)\(?{letter.upper()}(?=[).:,]|$)", prediction.strip()) is not None
    words, wanted = answer_tokens(prediction), answer_tokens(reference)
    if not wanted:
        return False
    return any(
        words[start : start + len(wanted)] == wanted and not (wanted[0][0].isdigit() and _is_signed(words, start))
        for start in range(len(words) - len(wanted) + 1)
    )


def _is_signed(words: tuple[str, ...], place: int) -> bool:
    """Tell whether a mark stands next to a number, which makes another one of it."""
    return any(not one[0].isalnum() for one in (*words[max(0, place - 1) : place], *words[place + 1 : place + 2]))


@lru_cache(maxsize=8192)
def answer_tokens(text: str) -> tuple[str, ...]:
    """Return the words, numbers and signs of an answer that count, in one spelling; empty for "" and "?"."""
    if len(text) > _MAX_CHARACTERS:
        return tuple(text.casefold().split())
    text = _spelled(_unwrapped(text))
    text = _LEAD.sub("", text, count=1) if _LEAD.match(text) else text
    listed = _NUMBER_LIST.search(text) is not None
    matches = list(_TOKEN.finditer(text))
    tokens: list[str] = []
    for place, match in enumerate(matches):
        if match.lastgroup == "number":
            tokens.append(_number(match[0]))
        elif match.lastgroup == "word":
            word = CONTRACTIONS.get(match[0], match[0])
            # An article is followed by a space: "A." may be an option, "a/b" a fraction.
            is_letter = word in _ARTICLES and not text[match.end() : match.end() + 1].isspace()
            tokens.append(_LETTER + word if is_letter else _NUMBER_WORDS.get(word, word))
        elif sign := _sign(matches, place, text, listed):
            tokens.append(sign)
    return _without_articles(_with_signs(tokens))


@lru_cache(maxsize=8192)
def _bare_letter(text: str) -> str:
    """Return the letter of an answer that is one option letter; empty for any other."""
    match = _BARE_LETTER.fullmatch(_option_text(text))
    return match[1] if match else ""


@lru_cache(maxsize=8192)
def _option_letter(text: str) -> str:
    """Return the letter of the option that an answer names first; empty if it names none, or lists several."""
    text = _option_text(text)
    for pattern in _OPTIONS:
        if match := pattern.fullmatch(text):
            letter, rest = match[1], match[2]
            following = chr(ord(letter) + 1)
            lists_options = (
                re.search(rf"(?:^|\s)[(\[]?{following}(?:[)\].:]|\s+[-\u2013\u2014]\s)\s*\S", rest) is not None
            )
            # "a.m." and "1.5" are no options, and "A. B" is two; "A. 5" is one.
            has_text = len(re.findall(r"\w", rest)) > 1 or re.match(r"\s+\d", rest) is not None
            glued_number = re.match(r"\d", rest) is not None
            return "" if lists_options or glued_number or not has_text else letter
    return ""


def _option_text(text: str) -> str:
    text = _unwrapped(text)
    lead = _OPTION_LEAD.match(text)
    return _unwrapped(text[lead.end() :]) if lead else text


def _unwrapped(text: str) -> str:
    """Return text in lower case without the quotation marks, or marks of bold type, around all of it."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text).translate(_FULL_WIDTH)
    text = text.casefold().strip()
    start, end = 0, len(text)
    while end - start > 1 and text[start] == text[end - 1] and text[start] in _ENCLOSING:
        start, end = start + 1, end - 1
    return text[start:end].strip()


def _spelled(text: str) -> str:
    """Write what means the same in one way."""
    if not text.isascii():
        text = _SUPERSCRIPT.sub(lambda match: "^" + match[0].translate(_SUPERSCRIPTS), text)
        text = "".join(_plain_digit(one) for one in text.translate(_SUBSCRIPTS))
    text = text.translate(_SAME)
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    return text


def _plain_digit(character: str) -> str:
    if character.isascii():
        return character
    if unicodedata.category(character) in ("Cc", "Cf"):
        return ""
    if unicodedata.decomposition(character).startswith("<fraction>"):
        return " " + unicodedata.normalize("NFKC", character).replace("\u2044", "/") + " "
    return str(unicodedata.decimal(character)) if character.isdecimal() else character


def _number(text: str) -> str:
    """Write a number without separators and without zeros at the end of a decimal; `1.2.30` is no decimal."""
    text = text.replace(",", "")
    if text.count(".") != 1:
        return text
    whole, _, decimals = text.partition(".")
    decimals = decimals.rstrip("0")
    return f"{whole or '0'}.{decimals}" if decimals else whole or "0"


def _sign(matches: list[re.Match[str]], place: int, text: str, listed: bool) -> str:
    """Return a mark as it counts, empty for decoration. `listed`: the answer holds a list of numbers in brackets."""
    mark = matches[place][0]
    before = matches[place - 1] if place else None
    after = matches[place + 1] if place + 1 < len(matches) else None
    if mark == "-":
        return mark if _is_minus(matches[place], before, after, text) else ""
    if mark in _BETWEEN_NUMBERS:
        signed = after is not None and after[0] in "+-" and place + 2 < len(matches)
        following = matches[place + 2] if signed else after
        numbers = before is not None and following is not None and {before.lastgroup, following.lastgroup} == {"number"}
        return _BETWEEN_NUMBERS[mark] if numbers else ""
    if mark in "()[]":
        return mark if listed else ""
    if mark in "\"'":
        # Feet and inches, minutes and seconds.
        return (
            mark
            if before is not None and before.lastgroup == "number" and before.end() == matches[place].start()
            else ""
        )
    return "" if mark in _DECORATION else mark


def _is_minus(mark: re.Match[str], before: re.Match[str] | None, after: re.Match[str] | None, text: str) -> bool:
    """Tell a hyphen that counts (-3, 1-2, A-, -ve) from one that joins words (x-ray), and from a dash."""
    if after is not None and after.lastgroup == "number":
        return True
    touches_before = mark.start() > 0 and not text[mark.start() - 1].isspace()
    touches_after = mark.end() < len(text) and not text[mark.end()].isspace()
    if touches_before and touches_after:
        return (before is not None and before.lastgroup == "sign") or (after is not None and after.lastgroup == "sign")
    return touches_before or touches_after


def _with_signs(tokens: list[str]) -> list[str]:
    """Write `minus 3` as `- 3`."""
    return [
        _SIGN_WORDS.get(token, token) if number[:1].isdigit() else token
        for token, number in zip(tokens, [*tokens[1:], ""], strict=False)
    ]


def _without_articles(tokens: list[str]) -> tuple[str, ...]:
    kept: list[str] = []
    for place, word in enumerate(tokens):
        if word in _ARTICLES:
            following = tokens[place + 1] if place + 1 < len(tokens) else ""
            noun = following[:1].isalnum() and following not in _ARTICLES
            if word == "a":
                at_article = place == 0 or tokens[place - 1] in _BEFORE_ARTICLE
                noun = noun and at_article and len(following) > 1 and following not in _AFTER_LETTER
            if noun:
                continue
        kept.append(word.removeprefix(_LETTER))
    return tuple(kept)
