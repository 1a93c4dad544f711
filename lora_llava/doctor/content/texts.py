"""Findings in single texts: image tags of other tools, answers that say nothing, letters without a choice, boxes."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator

from lora_llava.conversation.encode import IMAGE_PLACEHOLDER
from lora_llava.data.record import Record
from lora_llava.doctor.compare import Finding, finding_about, finding_at
from lora_llava.doctor.content.scripts import script_of
from lora_llava.doctor.survey import Side, Source, Survey
from lora_llava.system.text import counted, printable

_IMAGE_TAG = re.compile(
    r"<\|(?:image|img|video|vision|image_pad|video_pad|vision_(?:start|end|pad)|(?:begin|end)_of_image|image_\d+)\|>"
    r"|</?(?:img|im_patch|im_start|im_end|image_?placeholder|imagehere|image_soft_token|img_context|"
    r"(?:start|end)_of_image|video|images?[_-]?\d*)(?:\s[^<>]{0,200})?>"
    r"|\[/?(?:img|image|img_break|img_end|image[_-]?\d+)\]",
    re.IGNORECASE,
)
"""Image placeholders of Qwen-VL, InternVL, Pixtral, Phi, Gemma, MiniGPT-4, LLaVA's earlier versions, and of HTML."""
_LEFT_BY_TABLES = frozenset({"nan", "null", "undefined", "#n/a", "#ref!", "#value!", "#name?", "#div/0!"})
"""What spreadsheets and data frames write for an empty cell or an error."""
_CHOICE = re.compile(r"^\s*\(?([A-Z])[.):]\s+\S", re.MULTILINE)
_LETTER = re.compile(r"\(?([A-Z])[.):]?")
_MIN_MIXED_SHARE = 0.01
"""Records of a script that make a source mixed; fewer are names and quotations."""


def text_findings(survey: Survey) -> Iterator[Finding]:
    """Yield what is wrong with the questions and answers of each source."""
    for source in survey.sources:
        for record in source.records:
            yield from _image_tags(source, record)
            # Those of an evaluation are judged by its metric, as `void_reference`.
            if not source.is_evaluation:
                yield from _answers_that_say_nothing(source, record)
            yield from _missing_choices(source, record)
    for side in survey.sides:
        yield from _mixed_scripts(side)


def _image_tags(source: Source, record: Record) -> Iterator[Finding]:
    for turn in record.turns:
        for match in _IMAGE_TAG.finditer(turn.text):
            if match[0] != IMAGE_PLACEHOLDER:
                problem = f"{record.where}: {turn.role} text holds {printable(match[0], 60)}"
                yield finding_at("image_tag", source, record, problem, record.image)
                return


def _answers_that_say_nothing(source: Source, record: Record) -> Iterator[Finding]:
    for turn in record.turns[1::2]:
        text = turn.text.strip()
        if text.casefold() in _LEFT_BY_TABLES or all(unicodedata.category(mark)[0] in "PZC" for mark in text):
            problem = f"{record.where}: the answer is {printable(text, 40)!r}"
            yield finding_at("void_answer", source, record, problem, record.image)
            return


def _missing_choices(source: Source, record: Record) -> Iterator[Finding]:
    """Yield a record that answers a question with choices A to D by another letter."""
    for asked, answered in zip(record.turns[::2], record.turns[1::2], strict=False):
        letter = _LETTER.fullmatch(answered.text.strip())
        letters = _CHOICE.findall(asked.text)
        # Two lines that begin so may be anything; choices begin with A.
        if letter and letters[:2] == ["A", "B"] and letter[1] not in letters:
            problem = f"{record.where}: the answer is {letter[1]}, the choices are {', '.join(letters)}"
            yield finding_at("choice", source, record, problem, record.image)
            return


def _mixed_scripts(side: Side) -> Iterator[Finding]:
    """Yield one finding for a side with questions in several scripts."""
    scripts = Counter(script for record in side.records if (script := script_of(record.question)) is not None)
    used = [(script, count) for script, count in scripts.items() if count >= _MIN_MIXED_SHARE * scripts.total()]
    if len(used) > 1:
        shown = ", ".join(
            f"{counted(count, 'record')} in {script}"
            for script, count in sorted(used, key=lambda pair: (-pair[1], pair[0]))
        )
        yield finding_about("mixed_languages", side.source, f"{side.name}: {shown}")
