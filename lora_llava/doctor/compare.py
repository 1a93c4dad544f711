"""Compare records: duplicates, contradictions, and leaks between the two sides of a split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

from lora_llava.conversation.encode import IMAGE_PLACEHOLDER
from lora_llava.data.images.grayscale import MIN_LEVELS
from lora_llava.data.mixing import split_leaks
from lora_llava.data.record import ImageSource, Record
from lora_llava.doctor.content.scripts import script_of
from lora_llava.doctor.images import MAX_BLANK_RANGE, NEARLY, ImageFacts, near_pairs
from lora_llava.doctor.survey import Side, Source, Survey
from lora_llava.system.text import counted, printable

_SHADES = {"#000000": "black", "#ffffff": "white"}
SHORT_ANSWER = 5
"""Words. Longer answers are descriptions: they hardly repeat, and different ones may both be true."""
_MIN_COMPARED, _ONE_SIDED = 20, 0.7
"""Pairs of answers of unlike length that show a bias, if this share of them differs in the same direction."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem, at one record or at a whole source."""

    kind: str
    source: str
    """`Source.name`."""
    data: str
    """Name of the file or data set."""
    record: int
    """Number of the record, from 1; 0: the whole source."""
    id: str | None
    problem: str
    images: tuple[ImageSource, ...] = ()
    """Images to show with it."""
    count: int = 1
    """Number of records with it; 1 unless many records fail in the same way."""


def finding_at(kind: str, source: Source, record: Record, problem: str, *images: ImageSource | None) -> Finding:
    """Return a finding at a record."""
    identity = None if record.id == str(record.number) else record.id
    shown = tuple(image for image in images if image is not None)
    return Finding(kind, source.name, source.data_name, record.number, identity, problem, shown)


def finding_about(kind: str, source: Source, problem: str) -> Finding:
    """Return a finding about a whole source."""
    return Finding(kind, source.name, source.data_name, 0, None, problem)


def compare_sides(survey: Survey) -> Iterator[Finding]:
    """Yield duplicates and contradictions in each source, and leaks between the sides of each split."""
    for source in survey.sources:
        yield from _duplicate_ids(source)
        yield from _image_findings(survey, source)
        yield from _gray_ranges(survey, source)
        yield from _without_image(source)
        for record in source.records:
            text = "\0".join(turn.text for turn in record.turns)
            if marker := next((mark for mark in ("USER:", "ASSISTANT:") if mark in text), None):
                yield finding_at("special_text", source, record, f"{record.where}: holds {marker}", record.image)
    for side in survey.sides:
        if side.role == "training":
            yield from _same_questions(survey, side)
            if survey.recipe.stage(side.stage).trains_on_pairs:
                yield from _length_bias(side)
    for trained, tested in _splits(survey):
        if tested.role == "validation":
            yield from _source_leaks(trained, tested)
        yield from _group_leaks(trained, tested)
        yield from _image_leaks(survey, trained, tested)


def _length_bias(side: Side) -> Iterator[Finding]:
    """Report, once, that chosen answers are mostly longer, or mostly shorter, than rejected ones."""
    lengths = [
        (len(record.turns[-1].text.strip()), len(record.rejected.strip()))
        for record in side.records
        if record.rejected is not None
    ]
    longer, shorter = (sum(sign * (chosen - rejected) > 0 for chosen, rejected in lengths) for sign in (1, -1))
    if longer + shorter < _MIN_COMPARED or max(longer, shorter) < _ONE_SIDED * (longer + shorter):
        return
    chosen, rejected = (sum(pair[index] for pair in lengths) / len(lengths) for index in (0, 1))
    problem = (
        f"{side.source.data_name}: the chosen answer is {'longer' if longer > shorter else 'shorter'} in "
        f"{max(longer, shorter):,} of {counted(len(lengths), 'pair')}; the means are {chosen:.0f} and {rejected:.0f} "
        "characters"
    )
    yield finding_about("length_bias", side.source, problem)


def _splits(survey: Survey) -> Iterator[tuple[Side, Side]]:
    """Pair each training side with what tests it: the validation of its stage, and the evaluation."""
    for trained in survey.sides:
        if trained.role == "training":
            for tested in survey.sides:
                if tested.role == "evaluation" or (tested.role == "validation" and tested.stage == trained.stage):
                    yield trained, tested


def _duplicate_ids(source: Source) -> Iterator[Finding]:
    first: dict[str, Record] = {}
    for record in source.records:
        other = first.setdefault(record.id, record)
        if other is not record:
            yield finding_at("duplicate_id", source, record, f"{record.where}: record {other.number} has this id too")


def _image_findings(survey: Survey, source: Source) -> Iterator[Finding]:
    """Yield images that are stored twice, transparent, or named otherwise in the data, and those that show nothing."""
    first: dict[bytes, ImageSource] = {}
    for record, image in _images(source.records):
        facts, name = survey.facts(image), printable(image.key, 80)
        where = f"{record.where}: image {name}"
        if (other := first.setdefault(facts.sha256, image)) is not image:
            problem = f"{where} has the bytes of {printable(other.key, 80)}"
            yield finding_at("duplicate_image", source, record, problem, image, other)
        if facts.is_transparent:
            yield finding_at("transparent", source, record, where, image)
        if image.asked:
            problem = f"{record.where}: {printable(image.asked, 80)} is {name}"
            yield finding_at("other_extension", source, record, problem, image)
        if (shown := _blank(facts)) is not None:
            yield finding_at("blank_image", source, record, f"{where} {shown}", image)
        elif facts.levels < MIN_LEVELS:
            problem = f"{where} keeps {counted(facts.levels, 'shade')} in the 8 bits that are seen"
            yield finding_at("few_levels", source, record, problem, image)


def _blank(facts: ImageFacts) -> str | None:
    """Return in which way an image shows nothing; None if it shows something."""
    low, high, contrast = facts.usual
    if facts.contrast == 0:
        color = "#" + facts.colors[:3].hex()
        return f"is all {_SHADES.get(color, color)}"
    if facts.contrast <= MAX_BLANK_RANGE:
        return f"has values at most {facts.contrast} of 255 apart"
    if contrast <= MAX_BLANK_RANGE:
        return f"has values at most {contrast} of 255 apart in 99.9% of its pixels"
    if high <= NEARLY:
        return f"is nearly black: 99.9% of its values are at most {high} of 255"
    if low >= 255 - NEARLY:
        return f"is nearly white: 99.9% of its values are at least {low} of 255"
    return None


def _gray_ranges(survey: Survey, source: Source) -> Iterator[Finding]:
    """Yield one finding for all gray images of more than 8 bits in a source: which values they use."""
    deep = [(record, image, span) for record, image in _images(source.records) if (span := survey.facts(image).deep)]
    if not deep:
        return
    record, image, _ = deep[0]
    lows, highs = [span[0] for *_, span in deep], [span[1] for *_, span in deep]
    window = source.data.gray_window
    how = "each is scaled by its own range" if window is None else f"{window[0]:g} is black and {window[1]:g} white"
    clipped = 0 if window is None else sum(span[0] < window[0] or span[1] > window[1] for *_, span in deep)
    lost = f"; values of {counted(clipped, 'image')} lie outside and are clipped" if clipped else ""
    problem = (
        f"{record.where}: {counted(len(deep), 'image')} of more than 8 bits; their lowest values are {min(lows):g} to "
        f"{max(lows):g}, their highest {min(highs):g} to {max(highs):g}; {how}{lost}"
    )
    yield Finding("gray_range", source.name, source.data_name, record.number, None, problem, (image,), len(deep))


def _without_image(source: Source) -> Iterator[Finding]:
    """Yield one finding for all records of a source whose column of the image is empty, if others have an image."""
    columns = source.data.columns
    without = [record for record in source.records if record.image is None]
    if columns is None or columns.image is None or not 0 < len(without) < len(source.records):
        return
    first, number = without[0], len(without)
    problem = f"{first.where}: {columns.image} is empty, as in {counted(number, 'record')} of {len(source.records):,}"
    yield Finding("no_image", source.name, source.data_name, first.number, None, problem, (), number)


def _same_questions(survey: Survey, side: Side) -> Iterator[Finding]:
    """Yield duplicates and contradictions among records with the same first question about the same image."""
    first_of_question: dict[tuple[bytes, str], Record] = {}
    first_of_texts: dict[bytes, Record] = {}
    for record in side.records:
        image = b"" if record.image is None else survey.facts(record.image).sha256
        texts = _texts(record)
        # Hashed: the texts of all records would be held twice.
        digest = hashlib.sha256(json.dumps([image.hex(), *texts]).encode()).digest()
        if (other := first_of_texts.setdefault(digest, record)) is not record:
            problem = f"{record.where}: the same as {other.where}"
            yield finding_at("duplicate_record", side.source_of(record), record, problem, record.image)
            continue
        if (other := first_of_question.setdefault((image, texts[0]), record)) is record:
            continue
        ours, theirs = normalized(record.turns[1].text), normalized(other.turns[1].text)
        if ours != theirs and max(len(ours.split()), len(theirs.split())) <= SHORT_ANSWER:
            asked = printable(record.turns[0].text.replace(IMAGE_PLACEHOLDER, "").strip(), 80)
            answers = f"'{printable(ours, 80)}', and '{printable(theirs, 80)}' in record {other.number}"
            problem = f"{record.where}: '{asked}' is answered {answers}"
            yield finding_at("contradiction", side.source_of(record), record, problem, record.image)


def _texts(record: Record) -> list[str]:
    """Return all texts of a record, the first question first, without differences of case and white space."""
    turns = (turn.text.replace(IMAGE_PLACEHOLDER, "") for turn in record.turns)
    texts = [*turns, record.rejected or "", record.system or ""]
    return [" ".join(text.casefold().split()) for text in texts]


def normalized(text: str) -> str:
    """Return a text without differences of case, white space, and periods at its ends."""
    return " ".join(text.casefold().split()).strip(" .")


def _source_leaks(trained: Side, tested: Side) -> Iterator[Finding]:
    """Yield what one source of a stage holds out and another trains on, which stops a run."""
    for record, other, kind in split_leaks(trained.records, tested.records):
        what = f"group {printable(str(record.group), 80)}"
        if kind == "image" and record.image is not None:
            what = f"image {printable(record.image.key, 80)}"
        problem = f"{record.where}: {what} is held out here, and trained on in {other.where}"
        yield finding_at("source_leak", tested.source_of(record), record, problem, record.image, other.image)


def _is_across(tested: Side, record: Record, other: Record) -> bool:
    """Tell whether two records are of two sources of a stage, of which one holds out what the other trains on."""
    return tested.role == "validation" and record.source != other.source


def _group_leaks(trained: Side, tested: Side) -> Iterator[Finding]:
    known = {record.group: record for record in reversed(trained.records) if record.group is not None}
    seen = set()
    for record in tested.records:
        if record.group in known and record.group not in seen and not _is_across(tested, record, known[record.group]):
            seen.add(record.group)
            other = known[record.group]
            source = tested.source_of(record)
            group = f"{printable(str(source.data.group), 80)} {printable(str(record.group), 80)}"
            problem = f"{record.where}: {group} is in the training set too ({other.where})"
            yield finding_at("group_leak", source, record, problem, record.image, other.image)


def _image_leaks(survey: Survey, trained: Side, tested: Side) -> Iterator[Finding]:
    """Yield images of the tested side that are, or nearly are, on the training side."""
    known: dict[bytes, tuple[Record, ImageSource]] = {}
    for record, image in _images(trained.records):
        known.setdefault(survey.facts(image).sha256, (record, image))
    asked = []
    scripts_trained, scripts_asked = _scripts(trained.records), _scripts(tested.records)
    for record, image in _images(tested.records):
        if (other := known.get(survey.facts(image).sha256)) is None:
            asked.append((record, image))
            continue
        if other[1].identity == image.identity and _is_across(tested, record, other[0]):
            continue
        ours, theirs = scripts_asked.get(image.identity, set()), scripts_trained.get(other[1].identity, set())
        across = bool(ours and theirs and not ours & theirs)
        how = f", with questions in {' and '.join(sorted(theirs))}" if across else ""
        problem = f"{record.where}: image {printable(image.key, 80)} is in the training set too ({other[0].where}){how}"
        kind = "language_leak" if across else "image_leak"
        yield finding_at(kind, tested.source_of(record), record, problem, image, other[1])
    training = list(known.values())
    pairs = near_pairs([survey.facts(image) for _, image in asked], [survey.facts(image) for _, image in training])
    for tested_index, training_index in pairs:
        (record, image), (other_record, other_image) = asked[tested_index], training[training_index]
        problem = (
            f"{record.where}: image {printable(image.key, 80)} looks almost like {printable(other_image.key, 80)}, "
            f"which is in the training set ({other_record.where})"
        )
        yield finding_at("near_leak", tested.source_of(record), record, problem, image, other_image)


def _scripts(records: list[Record]) -> dict[str, set[str]]:
    """Return the scripts of the questions about each image, by its identity."""
    scripts: dict[str, set[str]] = {}
    for record in records:
        if record.image is not None and (script := script_of(record.question)) is not None:
            scripts.setdefault(record.image.identity, set()).add(script)
    return scripts


def _images(records: list[Record]) -> Iterator[tuple[Record, ImageSource]]:
    """Yield each image once, with the first record that shows it."""
    seen = set()
    for record in records:
        if record.image is not None and (name := record.image.identity) not in seen:
            seen.add(name)
            yield record, record.image
