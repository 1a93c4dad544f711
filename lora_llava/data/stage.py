"""The data of a stage, read, encoded and planned: all that is known before the first forward pass.

Only the lengths of the encoded conversations are held. Their ids, as lists, would take many times the memory of the
texts, so they are encoded again when a row is built; that takes a fraction of a millisecond.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, overload

from lora_llava.conversation.encode import Encoded, ImageTokens
from lora_llava.conversation.templates import Template, Tokenizer, get_template
from lora_llava.data.bad_records import BadRecord
from lora_llava.data.load import load_split
from lora_llava.data.packing import (
    Plan,
    PlanItem,
    Row,
    RowSettings,
    SampledSteps,
    conversations,
    make_plan,
    plan_in_order,
    row_length,
    sample_steps,
)
from lora_llava.data.pairs import encode_record
from lora_llava.data.record import Record
from lora_llava.recipe.schedule import StageLength, eval_interval, stage_length, steps_line, validation_line
from lora_llava.recipe.stages import StageName, StageSettings
from lora_llava.system.progress import counting
from lora_llava.system.ranks import world_size
from lora_llava.system.text import counted


class Size(NamedTuple):
    """What is held of an encoded conversation."""

    length: int
    prefix_length: int
    num_supervised: int
    is_cut: bool
    shared: int = 0
    """Tokens that both conversations of a pair have, and `length` counts once."""


def size_of(encoded: Encoded) -> Size:
    """Count the tokens of a conversation, or of a pair with its prefix once.

    A pair shares no prefix with other pairs: its own reaches into its text.
    """
    length = len(encoded.input_ids)
    if encoded.rejected is None:
        return Size(length, encoded.prefix_length, encoded.num_supervised, encoded.is_cut)
    shared = encoded.prefix_length
    length += len(encoded.rejected.input_ids) - shared
    return Size(length, 0, encoded.num_supervised + encoded.rejected.num_supervised, encoded.is_cut, shared)


class EncodedRecords(Sequence[Encoded]):
    """The encoded conversations of `records`, in their order.

    Creating it encodes every record once, unless `sizes` are given; DataError names the first record that cannot be
    trained on.
    """

    def __init__(
        self,
        records: Sequence[Record],
        template: Template,
        tokenizer: Tokenizer,
        image_tokens: ImageTokens,
        *,
        max_length: int,
        pairs: bool = False,
        sizes: Iterable[Size] | None = None,
    ) -> None:
        self.records = records
        self.are_pairs = pairs
        """Whether each record is a pair of a chosen and a rejected answer."""
        settings: dict[str, Any] = {"template": template, "tokenizer": tokenizer, "image_tokens": image_tokens}
        self._encode: Callable[[Record], Encoded] = partial(
            encode_record, pairs=pairs, max_length=max_length, **settings
        )
        self.reference: Sequence[tuple[float, float]] | None = None
        """Of pairs, once it is known: what `Encoded.reference` of each is."""
        self.items: list[PlanItem] = []
        """Each conversation as the planner sees it; conversations about one image have the same group."""
        self.num_supervised = array("l")
        """Supervised tokens of each conversation."""
        self.num_cut = 0
        """Conversations that `max_length` truncates."""
        group_of: dict[tuple[str, str | None], int] = {}
        for record, size in zip(records, self._sizes() if sizes is None else sizes, strict=True):
            # Trees share all tokens up to the end of the image, and a system prompt comes before it.
            key = None if record.image is None else (record.image.identity, record.system)
            group = -1 if key is None else group_of.setdefault(key, len(group_of))
            self.items.append(PlanItem(size.length, size.prefix_length, group, size.shared))
            self.num_supervised.append(size.num_supervised)
            self.num_cut += size.is_cut

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources of the records, in their order; () if they are of one."""
        names = dict.fromkeys(record.source for record in self.records)
        return tuple(names) if len(names) > 1 else ()

    def _sizes(self) -> Iterator[Size]:
        with counting("encoding conversations", len(self.records)) as advance:
            for encoded in self:
                yield size_of(encoded)
                advance(1)

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        encoded = self._encode(self.records[index])
        return encoded if self.reference is None else replace(encoded, reference=self.reference[index])

    def __iter__(self) -> Iterator[Encoded]:
        return map(self.__getitem__, range(len(self)))


@dataclass(frozen=True, slots=True)
class StepCounts:
    """What one optimizer step holds, as planned."""

    questions: int
    supervised_tokens: int
    computed_tokens: int


class Longest(NamedTuple):
    """The longest conversation: a micro-batch must hold at least as many tokens."""

    length: int
    where: str
    """File and record, for messages."""


@dataclass(frozen=True, slots=True)
class StageRecords:
    """The conversations, or pairs, of one stage, read and encoded."""

    template: Template
    train: EncodedRecords
    validation: EncodedRecords
    skipped: Sequence[BadRecord] = ()
    """Unusable records, left out because of `on_bad_record: skip`."""

    @property
    def longest(self) -> Longest:
        """The longest conversation of training and validation."""
        return max(
            (
                Longest(item.length, record.where)
                for encoded in (self.train, self.validation)
                for item, record in zip(encoded.items, encoded.records, strict=True)
            ),
            key=lambda longest: longest.length,
        )

    def sample_steps(self, stage: StageSettings, seed: int) -> SampledSteps:
        """Return the first steps of the stage, to count their rows for a given row length."""
        length = stage_length(stage, len(self.train))
        settings = RowSettings(self.longest.length, stage.branches_per_tree, stage.packing, ranks=world_size())
        sizes = {"batch_size": length.batch_size, "num_steps": length.num_steps}
        return sample_steps(self.train.items, settings, **sizes, seed=seed)


@dataclass(frozen=True, slots=True)
class StageData:
    """Records and encodings of one stage, and the plan over them."""

    template: Template
    encoded: EncodedRecords
    plan: Plan
    counts: list[StepCounts]
    validation: EncodedRecords
    validation_rows: list[Row]
    length: StageLength
    skipped: Sequence[BadRecord] = ()

    def eval_interval(self, stage: StageSettings) -> int | None:
        """Return the optimizer steps from one validation to the next; None without validation records."""
        return eval_interval(stage, self.length.num_steps, self.plan.num_conversations, len(self.validation))

    def summary(self) -> str:
        """Describe in one line what the stage trains on, and what was truncated or skipped."""
        plan, cut = self.plan, self.encoded.num_cut
        record = "pair" if self.encoded.are_pairs else "conversation"
        held_out = f" and {len(self.validation):,} for validation" if self.validation else ""
        parts = [
            f"{counted(len(self.encoded), record)}{held_out}",
            steps_line(self.length.num_steps, self.length.num_warmup_steps),
            f"{counted(plan.rows_per_step, 'micro-batch', 'micro-batches')} a step",
            f"{plan.num_computed_tokens:,} tokens, {plan.share_saved:.0%} saved by packing",
            f"{counted(cut, record)} cut short by max_length" if cut else "",
            f"{counted(len(self.skipped), 'bad record')} skipped" if self.skipped else "",
            _repeated(self.encoded.records),
        ]
        return "; ".join(part for part in parts if part)


def _repeated(records: Sequence[Record]) -> str:
    """Report how many records have the same image and text as another; empty if none has.

    Such records count twice in training, and they make the validation loss meaningless if one of them is held out.
    """
    # A record that the weight of its source repeats is meant to count twice.
    own = {id(record): record for record in records}.values()
    distinct = {(record.image and record.image.identity, _texts(record)) for record in own}
    count = len(own) - len(distinct)
    return f"{count:,} of {counted(len(own), 'record')} repeat another: same image, same text" if count else ""


def _texts(record: Record) -> tuple[object, ...]:
    return record.system, record.turns, record.rejected


_MIN_ENCODINGS = 1.5
"""Mean number of times that an image is encoded from which caching its features pays."""


def cache_offer(stage: StageSettings, data: StageData) -> str | None:
    """Suggest caching image features if the vision tower would encode many images repeatedly; None otherwise."""
    records = data.encoded.records
    trees = [tree for step in data.plan.steps for row in step for tree in row]
    seen = [image.identity for tree in trees if (image := records[tree[0]].image) is not None]
    if stage.cache_image_features != "off" or len(seen) < _MIN_ENCODINGS * len(set(seen)) or not seen:
        return None
    return (
        f"tip: each image is encoded {len(seen) / len(set(seen)):.1f} times; cache_image_features: memory (or disk) "
        "does it once"
    )


def length_lines(name: StageName, stage: StageSettings, data: StageData) -> list[str]:
    """Report the chosen batch size, a proposal if there are few steps, and when validation runs."""
    interval = data.eval_interval(stage)
    validation = None if interval is None else validation_line(stage, data.length.num_steps, interval)
    lines = (data.length.batch_line(stage), data.length.proposal(name, stage), validation)
    return [line for line in lines if line]


def read_records(stage: StageSettings, tokenizer: Any, image_tokens: ImageTokens, seed: int) -> StageRecords:
    """Read, split and encode the data of a stage; DataError names the first unusable record."""
    template = get_template(stage.template, stage.system)
    settings: dict[str, Any] = {
        "template": template,
        "tokenizer": tokenizer,
        "image_tokens": image_tokens,
        "max_length": stage.max_length,
        "pairs": stage.trains_on_pairs,
    }
    skipped: list[BadRecord] = []
    train, validation = load_split(stage.data, seed, skipped, partial(encode_record, **settings))
    return StageRecords(template, EncodedRecords(train, **settings), EncodedRecords(validation, **settings), skipped)


def plan_records(records: StageRecords, stage: StageSettings, tokens_per_micro_batch: int, seed: int) -> StageData:
    """Plan every step of a stage, and its validation rows."""
    length = stage_length(stage, len(records.train))
    settings = RowSettings(tokens_per_micro_batch, stage.branches_per_tree, stage.packing, ranks=world_size())
    plan = make_plan(records.train.items, settings, batch_size=length.batch_size, num_steps=length.num_steps, seed=seed)
    return StageData(
        template=records.template,
        encoded=records.train,
        plan=plan,
        counts=_step_counts(plan, records.train),
        validation=records.validation,
        validation_rows=_validation_rows(records.validation, tokens_per_micro_batch),
        length=length,
        skipped=records.skipped,
    )


def _validation_rows(validation: EncodedRecords, tokens_per_row: int) -> list[Row]:
    """Plan the rows of the validation; each holds records of one source, so that their losses can be told apart."""
    by_source: dict[str, list[int]] = {}
    for index, record in enumerate(validation.records):
        by_source.setdefault(record.source, []).append(index)
    rows: list[Row] = []
    for indices in by_source.values():
        items = [validation.items[index] for index in indices]
        rows += plan_in_order(items, tokens_per_row=tokens_per_row, indices=indices)
    return rows


def _step_counts(plan: Plan, encoded: EncodedRecords) -> list[StepCounts]:
    """Count what each step holds; a conversation of several turns has as many questions."""
    questions = [len(record.turns) // 2 for record in encoded.records]
    return [
        StepCounts(
            questions=sum(questions[index] for index in conversations(step)),
            supervised_tokens=sum(encoded.num_supervised[index] for index in conversations(step)),
            computed_tokens=sum(row_length(row, encoded.items) for row in step),
        )
        for step in plan.steps
    ]
