"""Exact match: whether two answers mean the same, strict about meaning and lenient about spelling.

Ignored are case, articles, quotation marks, punctuation of sentences, number words to twenty, thousands separators and
trailing zeros of a decimal. Signs, comparisons, fractions, ratios, ranges, lists of numbers, percent and units count.
Text with nothing else, such as "?", equals only itself. One option letter, as `A`, `(A)` or `Answer: A`, equals every
answer that names this option and no other: `A. Pneumonia`. After `A.` the text of an option does not start with a
lower-case letter, because `E. coli` looks the same.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal
from functools import lru_cache

from lora_llava.evaluation.scoring.vqa_v2 import CONTRACTIONS

_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
_NUMBER_WORDS = {word: str(number) for number, word in enumerate(_WORDS)}
_SIGN_WORDS = {"minus": "-", "plus": "+"}
_ARTICLES = frozenset({"a", "an", "the"})
_LETTER = "\0"
"""Marks a letter that looks like an article."""
# "a" may be a letter: vitamin a, type a. It is an article at the start and after these words.
_BEFORE_ARTICLE = frozenset(
    "and or with without is was are of in on at by like has have as for to from not than near under over it's that's "
    "there's".split()
)
_AFTER_LETTER = frozenset({"and", "or", "is", "are", "to"})

_LEAD = re.compile(r"(?:the |my )?(?:final |correct |best |right )*answer\s*(?:is\s*:?|:)\s*(?=\S)")
_OPTION_LEAD = re.compile(
    r"(?:#+\s+)?(?:(?:so|thus|hence|therefore),?\s+)?(?:"
    r"(?:the |my )?(?:final |correct |best |right )*(?:answer|option|choice)\s*(?:is\s*:?|[-:=\u2013\u2014])?"
    r"\s*(?:option\s+)?|"
    # "It is a" may be the start of a sentence.
    r"(?:i (?:think|believe|choose)(?: that)?(?: it is| it's| the answer is)?|it is|it's)(?: option)?\s+"
    r"(?=[*(\[\"']*(?-i:[A-Z])(?!\w))|)",
    re.IGNORECASE,
)
_MARKUP = re.compile(r"\$+([^$]+)\$+|<([a-z])>|\\(?:boxed|text|mathrm|mathbf)\{(.*)\}", re.IGNORECASE | re.DOTALL)
_MAX_MARKUP = 3
"""Maximum layers of markup around a short answer, such as `$<a>$`."""
_REPLY = re.compile(r"\W*no\s*[,.;:\u2013\u2014-]", re.IGNORECASE)
_NEGATIONS = frozenset({"no", "not", "never", "without", "neither", "nor"})
_ENCLOSING = "*_`\"'"
_EMPHASIS = re.compile(r"(?<![\w*])(\*{1,3}|__)(?=\S)([^\n]{1,200}?)(?<=\S)\1(?![\w*])")
"""Markdown bold and italics; of bounded length, so that the time is linear in the length of the answer."""
_MAX_CHARACTERS = 10_000
"""Characters. Longer texts are not short answers; they are compared word by word."""
_BARE_LETTER = re.compile(r"[(\[{]?\s*([a-z])\s*[)\]}]?\s*[.,:;]?\)?", re.IGNORECASE)
_OPTIONS = tuple(
    re.compile(pattern, re.DOTALL | re.IGNORECASE)
    for pattern in (
        r"[(\[{]\s*([a-z])\s*[)\]}](?:\s*[.:,])?(.+)",
        r"([a-z])\s*[)\]](?:\s*[.:])?(.+)",
        # No lower-case letter after a period in the same line: "E. coli", "A. is wrong".
        r"([a-z])\s*\.(?![^\S\n]*(?-i:[a-z]))(.+)",
        r"([a-z])\s*[:,;](.+)",
        r"([a-z])\s*\n(.+)",
        r"([a-z])\s+[-\u2013\u2014](\s.+)",
        r"([a-z])[\u2013\u2014]((?-i:[^\W\d_a-z]).+)",
        r"[(\[]?([a-z])[)\]]?( is (?:the )?(?:correct|right|best|answer)[^?]*)",
    )
)
_REJECTED = re.compile(r"\s*(?:is|was)(?:n't| not| wrong| incorrect| false)\b", re.IGNORECASE)
# Further options after the first, which is {0} and precedes {1}.
_OTHERS = (
    r"(?:^|[\s,;])[(\[]?(?!{0})[a-z][)\]]\s*\S",
    r"(?:[,;]|\b(?:and|or|nor)\b)\s*(?!{0})[a-z](?:[.:]\s|\s+[-\u2013\u2014]\s)\s*\S",
    # A letter after a comma or a conjunction, except in "hepatitis A and B".
    r"^\s*[(\[]?(?!{0})[a-z][)\]]?\s*(?:[,;/]|\b(?:and|or|nor)\b)",
    r"(?:(?<![\s(][a-z])[,;/]|(?<![\s(][a-z]\s)(?<!\s[a-z],\s)\b(?:and|or|nor)\b)\s*[(\[]?(?!{0})[a-z][)\]]?"
    r"\s*(?:[,;/.:]|\b(?:and|or|nor)\b|$)",
    r"(?:^|\s)(?!{0})(?:{1}|(?-i:[A-E]))(?:[.:]|\s+[-\u2013\u2014]\s)\s*\S",
)
_OTHER_LINE = r"^[ \t]*(?:[-*][ \t]+)?[(\[]?(?!{0})[a-z](?:[)\].:]|[ \t]*$|[ \t]+[-\u2013\u2014]\s)"

# From Chinese and Japanese keyboards.
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
        (r"[\u2013\u2014]|(?<![\d-])-{2,}(?!\d)|(?<=\d)-{2,}(?=[^\W\d_])", " "),
        (r"\bper\s?cent\b", "%"),
        (r"(?<=\d)\s*x\s*(?=\d)", " x "),
        (r"(?<![^\W\d_])\u03bc(?=[a-z])", "u"),  # Micro.
        (r"(?<![\w.,])(?:\d+(?:\.\d+)?|\.\d+)e[-+]?\d\d?(?!\w|\.\d)", lambda match: f"{Decimal(match[0]):f}"),
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
_DECIMAL = re.compile(r"(\d*)(?:(\.\d*[1-9])0*|\.0*)?")
"""Digits before the point, and those after it up to the last that is not 0."""
_TOKEN = re.compile(rf"(?P<number>{_NUMBER})|(?P<word>[^\W\d_][^\W_]*(?:'[^\W_]+)*)|(?P<sign>\S)")
_NUMBER_LIST = re.compile(rf"[(\[]\s*[-+]?(?:{_NUMBER})\s*[,;]\s*[-+]?(?:{_NUMBER})[^()\[\]]*[)\]]")
_SQUARE_LIST = re.compile(r"\[([^()\[\]]*)\][\s.]*")
_DECORATION = frozenset(".,;:!?\"'()[]{}_*\u2026\u2022\u00b7")
_BRACKETS = frozenset("()[]")
_UNITS = frozenset("\"'")
"""Feet and inches, minutes and seconds."""
_BETWEEN_NUMBERS = {",": ",", ";": ",", ":": ":", "*": "*"}


def exact_match(prediction: str, reference: str) -> bool:
    """Return whether two answers mean the same, as the module defines it; symmetric."""
    first, second = _bare_letter(prediction), _bare_letter(reference)
    if first and second:
        return first == second
    if second:
        return _option_letter(prediction) == second
    if first:
        return _option_letter(reference) == first
    # Text without a token equals only itself.
    return (answer_tokens(prediction) or (prediction.strip(),)) == (answer_tokens(reference) or (reference.strip(),))


def holds_answer(prediction: str, reference: str) -> bool:
    """Return whether an answer contains the words of the reference in a row and does not negate it."""
    if letter := _bare_letter(reference):
        pattern = rf"(?<!\w)(?<!not )(?<!not \()(?<!n't )\(?{letter.upper()}(?=[).:,]|$)"
        return re.search(pattern, _EMPHASIS.sub(r"\2", prediction).strip()) is not None
    words, expected = answer_tokens(prediction), answer_tokens(reference)
    if not expected:
        return False
    # "No, red" does not negate.
    first = 1 if _REPLY.match(prediction) else 0
    return any(
        words[start : start + len(expected)] == expected
        and not (expected[0][0].isdigit() and _is_signed(words, start))
        and not (start > first and _is_negation(words[start - 1]))
        for start in range(len(words))
    )


def _is_negation(word: str) -> bool:
    return word in _NEGATIONS or word.endswith("n't")


def _is_signed(words: tuple[str, ...], index: int) -> bool:
    """Return whether a mark is next to the word at `index`, which changes a number."""
    return any(not word[0].isalnum() for word in (*words[max(0, index - 1) : index], *words[index + 1 : index + 2]))


@lru_cache(maxsize=8192)
def answer_tokens(text: str) -> tuple[str, ...]:
    """Return the significant words, numbers and signs of an answer in one spelling; empty for "" and "?"."""
    if len(text) > _MAX_CHARACTERS:
        return tuple(text.casefold().split())
    text = _spelled(_unwrapped(text))
    text = text[lead.end() :] if (lead := _LEAD.match(text)) else text
    text = square[1] if (square := _SQUARE_LIST.fullmatch(text)) else text
    listed = _NUMBER_LIST.search(text) is not None
    matches = list(_TOKEN.finditer(text))
    tokens: list[str] = []
    for index, match in enumerate(matches):
        if match.lastgroup == "number":
            tokens.append(_number(match[0]))
        elif match.lastgroup == "word":
            word = CONTRACTIONS.get(match[0], match[0])
            # An article precedes a space: "A." may be an option, "a/b" a fraction.
            is_letter = word in _ARTICLES and not text[match.end() : match.end() + 1].isspace()
            tokens.append(_LETTER + word if is_letter else _NUMBER_WORDS.get(word, word))
        elif sign := _sign(matches, index, text, listed):
            tokens.append(sign)
    return _without_articles(_with_marks(tokens))


@lru_cache(maxsize=8192)
def _bare_letter(text: str) -> str:
    """Return the option letter if that is the whole answer; otherwise empty."""
    match = _BARE_LETTER.fullmatch(_option_text(text))
    return match[1].casefold() if match and match[1].isascii() else ""


@lru_cache(maxsize=8192)
def _option_letter(text: str) -> str:
    """Return the letter of the option that an answer starts with; empty if it names none, or several."""
    text = _option_text(text)
    for pattern in _OPTIONS:
        # Without regard to case, [a-z] matches a few letters of other alphabets, too.
        if (match := pattern.fullmatch(text)) and match[1].isascii():
            letter, rest = match[1].casefold(), match[2]
            # "a.m." and "1.5" are not options, and "A. B" is two; "A. 5" and "A: x" are one.
            short = r"\s+[\da-z]" if text[match.start(2) - 1] in ":)]" else r"\s+\d"
            has_text = len(re.findall(r"\w", rest)) > 1 or re.match(short, rest) is not None
            is_number = re.match(r"\d", rest) is not None
            names_it = has_text and not is_number and not _REJECTED.match(rest)
            return letter if names_it and not _names_others(letter, rest) else ""
    return ""


def _names_others(letter: str, rest: str) -> bool:
    """Return whether the text after an option letter names another option in its line, or starts a line with one."""
    line, _, lines = rest.partition("\n")
    following = chr(min(ord(letter) + 1, ord("z")))
    if any(re.search(pattern.format(letter, following), line, re.IGNORECASE) for pattern in _OTHERS):
        return True
    return re.search(_OTHER_LINE.format(letter), lines, re.IGNORECASE | re.MULTILINE) is not None


def _option_text(text: str) -> str:
    """Return an answer without a lead such as "The answer is", emphasis, and enclosing markup; keeps the case."""
    text = _stripped(_EMPHASIS.sub(r"\2", text))
    if lead := _OPTION_LEAD.match(text):
        text = _stripped(text[lead.end() :])
    for _ in range(_MAX_MARKUP):
        if not (marked := _MARKUP.fullmatch(text.removesuffix("."))):
            break
        text = _stripped(marked[marked.lastindex or 0])
    return text


def _unwrapped(text: str) -> str:
    """Return text in lower case, without enclosing quotation or bold marks."""
    return _stripped(_half_width(text).casefold())


def _half_width(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFC", text).translate(_FULL_WIDTH)


def _stripped(text: str) -> str:
    text = _half_width(text).strip()
    start, end = 0, len(text)
    while end - start > 1 and text[start] == text[end - 1] and text[start] in _ENCLOSING:
        start, end = start + 1, end - 1
    return text[start:end].strip()


def _spelled(text: str) -> str:
    """Return text with one spelling for what means the same."""
    if not text.isascii():
        text = _SUPERSCRIPT.sub(lambda match: "^" + match[0].translate(_SUPERSCRIPTS), text)
        text = "".join(_plain_digit(letter) for letter in text.translate(_SUBSCRIPTS))
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
        return f" {unicodedata.normalize('NFKC', character)} "
    return str(unicodedata.decimal(character)) if character.isdecimal() else character


def _number(text: str) -> str:
    """Return a number without separators and trailing zeros of a decimal; `1.2.30` is not a decimal."""
    text = text.replace(",", "")
    if not (decimal := _DECIMAL.fullmatch(text)):
        return text
    return (decimal[1] or "0") + (decimal[2] or "")


def _sign(matches: list[re.Match[str]], index: int, text: str, listed: bool) -> str:
    """Return a significant mark; empty for decoration. `listed`: the answer has a list of numbers in brackets."""
    mark = matches[index][0]
    before = matches[index - 1] if index else None
    after = matches[index + 1] if index + 1 < len(matches) else None
    if mark == "-":
        return mark if _is_minus(matches[index], before, after, text) else ""
    if mark in _BETWEEN_NUMBERS:
        signed = after is not None and after[0] in _SIGN_WORDS.values() and index + 2 < len(matches)
        following = matches[index + 2] if signed else after
        numbers = before is not None and following is not None and {before.lastgroup, following.lastgroup} == {"number"}
        return _BETWEEN_NUMBERS[mark] if numbers else ""
    if mark in _BRACKETS:
        return mark if listed else ""
    if mark in _UNITS:
        return (
            mark
            if before is not None and before.lastgroup == "number" and before.end() == matches[index].start()
            else ""
        )
    return "" if mark in _DECORATION else mark


def _is_minus(mark: re.Match[str], before: re.Match[str] | None, after: re.Match[str] | None, text: str) -> bool:
    """Return whether a hyphen is significant (-3, 1-2, A-, -ve), not one that joins words (x-ray), nor a dash."""
    if after is not None and after.lastgroup == "number":
        return True
    touches_before = mark.start() > 0 and not text[mark.start() - 1].isspace()
    touches_after = mark.end() < len(text) and not text[mark.end()].isspace()
    if touches_before and touches_after:
        return (before is not None and before.lastgroup == "sign") or (after is not None and after.lastgroup == "sign")
    return touches_before or touches_after


def _with_marks(tokens: list[str]) -> list[str]:
    """Replace `minus 3` by `- 3`, and `1 and 2` by `1, 2`, but not `1 and 1/2`."""
    numbers = [token[0].isdigit() for token in tokens]
    marked = list(tokens)
    for index, word in enumerate(tokens):
        if numbers[index + 1 : index + 2] == [True]:
            marked[index] = _SIGN_WORDS.get(word, word)
        joins_numbers = word == "and" and numbers[index - 1 : index + 2] == [True, False, True]
        if joins_numbers and tokens[index + 2 : index + 3] != ["/"]:
            marked[index] = ","
    return marked


def _without_articles(tokens: list[str]) -> tuple[str, ...]:
    significant: list[str] = []
    for index, word in enumerate(tokens):
        if word in _ARTICLES:
            following = tokens[index + 1] if index + 1 < len(tokens) else ""
            noun = following[:1].isalnum() and following not in _ARTICLES
            if word == "a":
                at_article = index == 0 or tokens[index - 1] in _BEFORE_ARTICLE
                noun = noun and at_article and len(following) > 1 and following not in _AFTER_LETTER
            if noun:
                continue
        significant.append(word.removeprefix(_LETTER))
    return tuple(significant)
