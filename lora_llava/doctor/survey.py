"""The first half of a check, without torch: read every source, open every image, split training from validation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from lora_llava.conversation.encode import check_turns
from lora_llava.data.bad_records import BadRecord, BadRecords, Exclusions
from lora_llava.data.load import image_kills_its_reader, read_source, split_records
from lora_llava.data.mixing import source_names
from lora_llava.data.questions import answered_part, check_keys, make_questions, without_blank_answer
from lora_llava.data.record import ImageSource, Record
from lora_llava.doctor.images import ImageFacts, look_at_image
from lora_llava.errors import DataError
from lora_llava.planning.preflight.data import sources as data_sources
from lora_llava.recipe.fields import data_name
from lora_llava.recipe.settings import Recipe
from lora_llava.recipe.stages import DataSettings, StageName
from lora_llava.system.processes import in_processes

Role = Literal["training", "validation", "evaluation"]


@dataclass(slots=True)
class Source:
    """One file or dataset of the recipe, and its records."""

    name: str
    """`align`, `instruct`, `instruct.validation`, `instruct.1` (the second of several), `evaluation`."""
    key: str
    """Recipe key of its settings."""
    data: DataSettings
    bad: BadRecords
    records: list[Record] = field(default_factory=list)
    """Readable records whose image can be decoded."""
    error: DataError | None = None
    """Why nothing could be read; None if something was."""

    @property
    def data_name(self) -> str:
        """Name of the file or data set."""
        return data_name(self.data.path)

    @property
    def is_evaluation(self) -> bool:
        """Whether its records are questions of the evaluation."""
        return self.key.startswith("evaluation.")

    def excluded(self) -> list[BadRecord]:
        """Return the records that `exclude` leaves out already."""
        return [
            BadRecord(self.data_name, number, identity, "excluded", "left out before")
            for number, identity in Exclusions(self.data.exclude).ids.items()
        ]


@dataclass(slots=True)
class Side:
    """Records of one stage and role: training, validation or evaluation."""

    name: str
    """Such as `instruct training`."""
    stage: StageName
    """Of the evaluation: the last stage, whose template it uses."""
    role: Role
    source: Source
    records: list[Record]
    others: Mapping[str, Source] = field(default_factory=dict)
    """All sources of a side, by the names in their records."""

    def source_of(self, record: Record) -> Source:
        """Return the source of a record."""
        return self.others.get(record.source, self.source)


@dataclass(slots=True)
class Survey:
    """Everything that was read and opened."""

    recipe: Recipe
    sources: list[Source]
    sides: list[Side]
    images: dict[str, ImageFacts]
    """By the identity of the image."""
    unanswered: list[tuple[Source, Record]]
    """Records of the evaluation whose last question has no answer."""

    def facts(self, image: ImageSource) -> ImageFacts:
        """Return the properties of an image."""
        return self.images[image.identity]


def survey(recipe: Recipe, workers: int | None = None) -> Survey:
    """Read every source of a recipe and open every image in `workers` processes; bad data raise nothing."""
    sources = list(_sources(recipe))
    by = recipe.evaluation.broken_down_by if recipe.evaluation else []
    for source in sources:
        _read(source, extra=bool(by) and source.is_evaluation)
    _check_keys([source for source in sources if source.is_evaluation], by)
    images = _open_images((record for source in sources for record in source.records), workers)
    unanswered: list[tuple[Source, Record]] = []
    for source in sources:
        _put_aside(source, images)
        if source.is_evaluation:
            unanswered += [(source, record) for record in source.records if record.turns[-1].role == "user"]
            answered = (answered_part(record) for record in source.records)
            source.records = [record for record in answered if record is not None]
    return Survey(recipe, sources, list(sides_of(recipe, sources)), images, unanswered)


def _open_images(records: Iterable[Record], workers: int | None) -> dict[str, ImageFacts]:
    """Open every image once, however often it occurs."""
    images = {record.image.identity: record.image for record in records if record.image is not None}
    looked_at = in_processes(
        look_at_image,
        list(images.values()),
        on_crash=lambda source: ImageFacts(image_kills_its_reader(source)),
        workers=workers,
        label="images",
    )
    return dict(zip(images, looked_at, strict=True))


def _sources(recipe: Recipe) -> Iterator[Source]:
    for key, data in data_sources(recipe):
        yield Source(key.removeprefix("stages.").replace(".data", ""), key, data, BadRecords(data, None))


def _read(source: Source, *, extra: bool) -> None:
    """Read the records of a source; `extra`: with their other keys."""
    try:
        records = read_source(source.data, source.bad, extra=extra)
        if source.is_evaluation:
            records = [without_blank_answer(record) for record in records]
        if not records and not source.bad.records:
            raise DataError(f"{source.data_name}: contains no records; correct path or split")
    except DataError as error:
        source.error = error
        return
    for record in records:
        try:
            check_turns(record.turns, record.turns[-1].role if source.is_evaluation else "assistant", record.where)
            source.records.append(record)
        except DataError as error:
            source.bad.add_record(record, error)


def _check_keys(evaluation: Sequence[Source], by: Sequence[str]) -> None:
    """Note at the first source of the evaluation that no record of any has a key of `by`."""
    if not by or any(source.error for source in evaluation):
        return
    records = [record for source in evaluation for record in source.records]
    try:
        check_keys(make_questions(records).questions, by)
    except DataError as error:
        evaluation[0].error = error


def _put_aside(source: Source, images: dict[str, ImageFacts]) -> None:
    """Set aside records whose image cannot be decoded."""
    usable = []
    for record in source.records:
        error = None if record.image is None else images[record.image.identity].error
        if error is None:
            usable.append(record)
        else:
            source.bad.add_record(record, error)
    source.records = usable


def sides_of(recipe: Recipe, sources: list[Source]) -> Iterator[Side]:
    """Yield the sides of all stages and of the evaluation; a validation share is drawn of the records of its source."""
    by_name = {source.name: source for source in sources}
    for stage in recipe.stage_names:
        training: list[Record] = []
        validation: list[Record] = []
        by_source = _named(recipe.stage(stage).data, stage, by_name)
        names, named = list(by_source), list(by_source.values())
        held_out = [by_name.get(f"{source.name}.validation") for source in named]
        for name, source, other in zip(names, named, held_out, strict=True):
            train, rest = source.records, other.records if other else []
            if other is None and train:
                try:
                    train, rest = split_records(source.data, train, recipe.seed)
                except DataError as error:
                    source.error = error
            training += _of_source(name, train)
            validation += _of_source(name, rest)
        yield Side(f"{stage} training", stage, "training", named[0], training, by_source)
        if validation:
            apart = [other or source for source, other in zip(named, held_out, strict=True)]
            by_held = dict(zip(names, apart, strict=True))
            yield Side(f"{stage} validation", stage, "validation", apart[0], validation, by_held)
    if recipe.evaluation is not None:
        asked = _named(recipe.evaluation.data, "evaluation", by_name)
        records = [record for name, source in asked.items() for record in _of_source(name, source.records)]
        yield Side("evaluation", recipe.stage_names[-1], "evaluation", by_name["evaluation"], records, asked)


def _of_source(name: str, records: list[Record]) -> list[Record]:
    return [replace(record, source=name) for record in records] if name else records


def _named(data: DataSettings, section: str, by_name: Mapping[str, Source]) -> dict[str, Source]:
    """Return the sources of a stage or of the evaluation by the names in their records; that of a single one is ""."""
    names = source_names(data.sources) if data.others else [""]
    return {name: by_name[f"{section}.{number}" if number else section] for number, name in enumerate(names)}
