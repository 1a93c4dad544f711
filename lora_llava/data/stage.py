"""The data of a stage, read, encoded and planned: all that is known before the first forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lora_llava.conversation.encode import encode
from lora_llava.conversation.templates import Template, get_template
from lora_llava.data.bad_records import BadRecord
from lora_llava.data.encoded import EncodedRecords
from lora_llava.data.load import Record, load_split
from lora_llava.data.packing import Plan, Row, make_plan, plan_in_order, tree_length
from lora_llava.data.sharing import Sharing, sharing
from lora_llava.errors import DataError
from lora_llava.recipe.schedule import StageLength, eval_interval, stage_length, validation_line
from lora_llava.recipe.stages import StageName, StageSettings
from lora_llava.system.device import world_size
from lora_llava.system.text import counted


@dataclass(frozen=True, slots=True)
class StepCounts:
    """What one optimizer step holds, known from the plan."""

    questions: int
    supervised_tokens: int
    computed_tokens: int


class Longest(NamedTuple):
    """The conversation that decides how many tokens a micro-batch must hold at the least."""

    length: int
    where: str
    """File and record, for messages."""


@dataclass(frozen=True, slots=True)
class StageRecords:
    """The conversations of one stage, read and encoded."""

    template: Template
    train: EncodedRecords
    validation: EncodedRecords
    skipped: Sequence[BadRecord] = ()
    """Records left out because they cannot be used, as `on_bad_record: skip` asks."""

    @property
    def longest(self) -> Longest:
        """Find the longest conversation, of training or validation."""
        return max(
            (
                Longest(item.length, record.where)
                for encoded in (self.train, self.validation)
                for item, record in zip(encoded.items, encoded.records, strict=True)
            ),
            key=lambda one: one.length,
        )

    def sharing(self, stage: StageSettings) -> Sharing:
        """Tell what rows of a length compute of the conversations' tokens."""
        return sharing(self.train.items, stage.branches_per_tree, stage.packing)


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
        """Say in a line what will be trained on, and what was cut."""
        plan, cut = self.plan, self.encoded.num_cut
        held_out = f" and {len(self.validation):,} for validation" if self.validation else ""
        parts = [
            f"{counted(len(self.encoded), 'conversation')}{held_out}",
            self.length.steps_line(),
            f"{counted(plan.rows_per_step, 'micro-batch', 'micro-batches')} a step",
            f"{plan.num_computed_tokens:,} tokens, {plan.share_saved:.0%} saved by packing",
            f"{counted(cut, 'conversation')} cut short by max_length" if cut else "",
            f"{counted(len(self.skipped), 'bad record')} skipped" if self.skipped else "",
            repeated(self.encoded.records),
        ]
        return "; ".join(part for part in parts if part)


def repeated(records: Sequence[Record]) -> str:
    """Say how many records have the image and the text of another one; empty if none has.

    They count twice, and where one is held out for validation its loss tells nothing.
    """
    kinds = {(record.image.key if record.image else None, record.turns) for record in records}
    count = len(records) - len(kinds)
    return f"{count:,} of {counted(len(records), 'record')} repeat another: same image, same text" if count else ""


SEEN_OFTEN = 1.5
"""Times that an image passes through the vision tower, on average, from which keeping its features pays."""


def cache_offer(stage: StageSettings, data: StageData) -> str | None:
    """Offer to keep what the vision tower makes of images, where many of them would pass through it again."""
    records = data.encoded.records
    seen = [
        image.key
        for step in data.plan.steps
        for row in step
        for tree in row
        if (image := records[tree[0]].image) is not None
    ]
    if stage.cache_image_features != "off" or len(seen) < SEEN_OFTEN * len(set(seen)) or not seen:
        return None
    return (
        f"tip: each image is encoded {len(seen) / len(set(seen)):.1f} times; cache_image_features: memory (or disk) "
        "does it once"
    )


def length_lines(name: StageName, stage: StageSettings, data: StageData) -> list[str]:
    """Say which batch was chosen, propose another and more epochs where the steps are few, and say when to validate."""
    interval = data.eval_interval(stage)
    validation = None if interval is None else validation_line(stage, data.length.num_steps, interval)
    lines = (data.length.batch_line(name, stage), data.length.proposal(name, stage), validation)
    return [line for line in lines if line]


def read_records(
    stage: StageSettings, tokenizer: Any, seed: int, *, image_token_id: int, num_image_tokens: int
) -> StageRecords:
    """Read, split and encode the data of a stage; DataError names the first record that does not fit."""
    template = get_template(stage.template, stage.system)
    settings: dict[str, Any] = {
        "template": template,
        "tokenizer": tokenizer,
        "image_token_id": image_token_id,
        "num_image_tokens": num_image_tokens,
        "max_length": stage.max_length,
    }

    def check(record: Record) -> None:
        encode(record.turns, where=record.where, **settings)

    skipped: list[BadRecord] = []
    train, validation = load_split(stage.data, seed, skipped, check)
    if not train:
        raise DataError(f"{stage.data.path}: no record to train on")
    return StageRecords(template, EncodedRecords(train, **settings), EncodedRecords(validation, **settings), skipped)


def plan_records(
    records: StageRecords, name: StageName, stage: StageSettings, tokens_per_micro_batch: int, seed: int
) -> StageData:
    """Plan every step of a stage, and the rows of its validation."""
    length = stage_length(name, stage, len(records.train))
    plan = make_plan(
        records.train.items,
        batch_size=length.batch_size,
        tokens_per_row=tokens_per_micro_batch,
        branches_per_tree=stage.branches_per_tree,
        packing=stage.packing,
        num_train_epochs=stage.num_train_epochs,
        max_steps=stage.max_steps,
        seed=seed,
        ranks=world_size(),
    )
    return StageData(
        template=records.template,
        encoded=records.train,
        plan=plan,
        counts=step_counts(plan, records.train),
        validation=records.validation,
        validation_rows=plan_in_order(records.validation.items, tokens_per_row=tokens_per_micro_batch),
        length=length,
        skipped=records.skipped,
    )


def step_counts(plan: Plan, encoded: EncodedRecords) -> list[StepCounts]:
    """Count what each step holds; a conversation of several turns asks as many questions."""
    questions = [len(record.turns) // 2 for record in encoded.records]
    return [
        StepCounts(
            questions=sum(questions[index] for row in step for tree in row for index in tree),
            supervised_tokens=sum(encoded.num_supervised[index] for row in step for tree in row for index in tree),
            computed_tokens=sum(tree_length(tree, encoded.items) for row in step for tree in row),
        )
        for step in plan.steps
    ]
