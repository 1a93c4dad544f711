"""Questions to ask a model.

An evaluation asks one for each answered turn of a record, and counts turns without an answer. A prediction needs no
answers: it also asks a last turn without one, or one question about every image of a directory.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_llava.conversation.encode import IMAGE_PLACEHOLDER, Turn, check_turns
from lora_llava.data.bad_records import BadRecord, BadRecords
from lora_llava.data.images.directory import list_images
from lora_llava.data.images.root import ImageRoot
from lora_llava.data.load import drop_unusable, load_records
from lora_llava.data.mixing import source_names
from lora_llava.data.record import Record, Scalar, check_text, with_answer_prompt
from lora_llava.errors import DataError
from lora_llava.recipe.stages import DataSettings, QuestionSettings
from lora_llava.system.names import did_you_mean, similar
from lora_llava.system.progress import note
from lora_llava.system.text import counted, listed

_NO_VALUE = "(none)"
"""Value of questions whose record lacks the key."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question: the earlier turns with their reference answers, as in training, then itself and its answer."""

    record: Record
    references: tuple[str, ...]
    """Accepted answers, in the order of the data; that of the turns is one of them. Empty only in a prediction."""
    number: int = 1
    """Which of the answered questions of its record, from 1."""
    of: int = 1
    """Answered questions of its record."""

    @property
    def answer(self) -> str:
        """The answer of the turns; if the data list several, the one that training takes."""
        return self.record.turns[-1].text

    @property
    def image(self) -> str | None:
        """Identity of the image; None without one."""
        return None if self.record.image is None else self.record.image.identity

    @property
    def own(self) -> dict[str, Scalar]:
        """Other keys of the record."""
        return dict(self.record.extra)

    def value(self, key: str) -> str:
        """Return the value of another key of the record, as text."""
        value = self.own.get(key)
        return _NO_VALUE if value is None or value == "" else value if isinstance(value, str) else json.dumps(value)

    def described(self, answer: str, shared: Container[str], reserved: Collection[str]) -> dict[str, Any]:
        """Return the question, its references and the other keys of its record, as a line of predictions has them.

        `answer`: key of the first reference; `shared`: labels that several images have; `reserved`: keys that the line
        gets later. A key of the record that is taken gets the prefix `data_`.
        """
        image = self.record.image
        row: dict[str, Any] = {
            "id": self.record.id,
            "image": image.label if image else None,
            "question": self.record.question,
        }
        if self.record.source:
            row["source"] = self.record.source
        if self.references:
            row[answer] = self.answer
        if image and image.label in shared:
            row["image_key"] = image.key
        if self.of > 1:
            row["turn"] = self.number
        if len(self.references) > 1:
            row["references"] = list(self.references)
        taken = {*row, answer, "turn", "references", *reserved}
        return row | {f"data_{key}" if key in taken else key: value for key, value in self.own.items()}


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """The questions of an evaluation, and how many were left out."""

    questions: tuple[Question, ...]
    num_records: int
    unanswered: int = 0
    """Records without any answer."""
    open_ended: int = 0
    """Records whose last question has no answer; the earlier ones are asked."""
    skipped: Sequence[BadRecord] = ()
    """Unusable records, left out because of `on_bad_record: skip`."""

    def passed_over(self) -> list[str]:
        """Return what is not asked, one line per cause."""
        lines = []
        if self.unanswered:
            have = "has" if self.unanswered == 1 else "have"
            lines.append(f"{self.unanswered:,} of {counted(self.num_records, 'record')} {have} no answer: not asked")
        if self.open_ended:
            lines.append(
                f"{counted(self.open_ended, 'record')} of {self.num_records:,} with a last question without an answer: "
                "only the earlier ones are asked"
            )
        return lines


def answers_fingerprint(questions: Sequence[Question]) -> str:
    """Return the sha256 (hexadecimal) of the references and the other keys of questions, in order."""
    answers = [(question.references, question.own) for question in questions]
    return hashlib.sha256(json.dumps(answers).encode()).hexdigest()


def load_questions(data: DataSettings, by: Sequence[str] = ()) -> QuestionSet:
    """Read the questions of an evaluation, those of several sources one source after another.

    Raises DataError for an unusable record, if no record of a source has an answer, or if no record at all has a key of
    `by`.
    """
    skipped: list[BadRecord] = []
    records: list[Record] = []
    for source, name in zip(data.sources, source_names(data.sources), strict=True):
        own = load_records(source, skipped, _check, extra=True)
        for record in own:
            _check(record)
        if not any(map(answered_part, own)):
            raise DataError(
                f"evaluation: none of the {counted(len(own), 'record')} of {source.path} has an answer to compare "
                "with; add the answers, or ask single questions with lora-llava chat"
            )
        records += [replace(record, source=name) for record in own] if data.others else own
    question_set = make_questions(records)
    check_keys(question_set.questions, by)
    return replace(question_set, skipped=skipped)


def load_open_questions(data: QuestionSettings) -> QuestionSet:
    """Read the questions of a prediction: references are optional. Raises DataError for an unusable record."""
    skipped: list[BadRecord] = []
    records = load_records(data, skipped, _check_open, extra=True)
    for record in records:
        _check_open(record)
    return QuestionSet(_open_questions(records), len(records), skipped=skipped)


def load_image_questions(directory: Path, question: str, data: QuestionSettings) -> QuestionSet:
    """Ask one question about every image below a directory; the id of a record is the path of its image.

    Of `data` only the settings that apply to any record count, such as `on_bad_record`. Raises DataError.
    """
    if not question.strip() or IMAGE_PLACEHOLDER in question:
        raise DataError(f"question {question!r:.80}: write a text without {IMAGE_PLACEHOLDER}")
    check_text(question, "question")
    bad, skipped = BadRecords.by_settings(data), []
    root = ImageRoot(directory, "image", data)
    turns = with_answer_prompt([Turn("user", f"{IMAGE_PLACEHOLDER}\n{question.strip()}")], data.answer_prompt)
    records: list[Record] = []
    images, others = list_images(directory)
    if others:
        note(f"{counted(len(others), 'file')} in {directory} left out, as no images: {listed(others)}")
    for number, name in enumerate(images[: data.max_records], start=1):
        where = f"{directory.name}, image {number}"
        try:
            # With "./", a colon in a name is not taken for a scheme.
            image = root.source(f"./{name}", where)
            records.append(Record(name, image, turns, where, number))
        except DataError as error:
            bad.add(number, name, error)
    if bad.collects:
        records = drop_unusable(records, None, bad)
        skipped = sorted(bad.records, key=lambda record: record.record)
    if not records:
        raise DataError(f"{directory}: none of its {counted(len(images), 'image')} can be used: {skipped[0].problem}")
    return QuestionSet(_open_questions(records), len(records), skipped=skipped)


def _open_questions(records: Sequence[Record]) -> tuple[Question, ...]:
    """Return the last question of each record that ends with one, and every question of an answered record."""
    questions: list[Question] = []
    for record in map(without_blank_answer, records):
        if record.turns[-1].role == "user":
            questions.append(Question(record, ()))
        else:
            questions += make_questions([record]).questions
    return tuple(questions)


def _check_open(record: Record) -> None:
    turns = without_blank_answer(record).turns
    check_turns(turns, turns[-1].role if turns else "user", record.where)


def make_questions(records: Sequence[Record]) -> QuestionSet:
    """Return a question for every answered turn, in the order of the records."""
    questions: list[Question] = []
    unanswered = open_ended = 0
    for record in records:
        answered = answered_part(record)
        if answered is None:
            unanswered += 1
            continue
        open_ended += len(answered.turns) < len(without_blank_answer(record).turns)
        ends = [index for index, turn in enumerate(answered.turns) if turn.role == "assistant"]
        questions += (_question(answered, end, number, len(ends)) for number, end in enumerate(ends, start=1))
    return QuestionSet(tuple(questions), len(records), unanswered, open_ended)


def answered_part(record: Record) -> Record | None:
    """Return a record up to its last answer; None if it has none."""
    record = without_blank_answer(record)
    turns = record.turns if not record.turns or record.turns[-1].role == "assistant" else record.turns[:-1]
    return replace(record, turns=turns) if turns else None


def without_blank_answer(record: Record) -> Record:
    """Return a record without its last answer if that is blank."""
    last = record.turns[-1] if len(record.turns) > 1 else None
    blank = last is not None and last.role == "assistant" and not last.text.strip()
    return replace(record, turns=record.turns[:-1]) if blank else record


def _check(record: Record) -> None:
    answered = answered_part(record)
    if answered is not None:
        check_turns(answered.turns, "assistant", record.where)


def _question(record: Record, end: int, number: int, of: int) -> Question:
    turns: tuple[Turn, ...] = record.turns[: end + 1]
    is_last = end + 1 == len(record.turns)
    shown = any(turn.role == "user" and IMAGE_PLACEHOLDER in turn.text for turn in turns)
    asked = replace(
        record,
        turns=turns,
        # The image is not shown before its turn.
        image=record.image if shown else None,
        where=record.where if of == 1 else f"{record.where}, question {number}",
    )
    return Question(asked, (is_last and record.references) or (turns[-1].text,), number, of)


def shared_labels(questions: Sequence[Question]) -> set[str]:
    """Return the labels that several images have, such as file names inside a table."""
    images = {image.identity: image.label for question in questions if (image := question.record.image) is not None}
    return {label for label, count in Counter(images.values()).items() if count > 1}


def check_keys(questions: Sequence[Question], by: Sequence[str]) -> None:
    """Raise DataError for a key of `by` that no record has; the message names the keys there are."""
    known = sorted({key for question in questions for key, _ in question.record.extra})
    for key in by:
        if key not in known:
            have = f"they have {listed(known)}" if known else "they have no other keys"
            hint = did_you_mean(similar(key, known))
            raise DataError(f"evaluation.by: no record has the key or column {key!r}; {have}. {hint}".rstrip(), "key")
