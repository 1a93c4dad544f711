"""The data of a stage, read, encoded and planned: all that is known before the first forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_llava.conversation import Encoded, Template, get_template
from lora_llava.data.batch import encode_records, plan_items
from lora_llava.data.packing import Plan, PlanItem, Row, make_plan, plan_in_order, tree_length
from lora_llava.data.records import Record, load_split
from lora_llava.errors import DataError
from lora_llava.recipe_stages import StageSettings
from lora_llava.training.progress import StepCounts


@dataclass(frozen=True, slots=True)
class StageData:
    """Records and encodings of one stage, and the plan over them."""

    template: Template
    records: list[Record]
    encoded: list[Encoded]
    plan: Plan
    counts: list[StepCounts]
    validation_records: list[Record]
    validation_encoded: list[Encoded]
    validation_rows: list[Row]


def prepare_data(
    stage: StageSettings,
    tokenizer: Any,
    *,
    image_token_id: int,
    num_image_tokens: int,
    seed: int,
) -> StageData:
    """Read, split, encode and plan the data of a stage; DataError names the first record that does not fit."""
    template = get_template(stage.template, stage.system)
    train, validation = load_split(stage.data, seed)
    if not train:
        raise DataError(f"{stage.data.path}: no record to train on")

    def encode_all(records: list[Record]) -> list[Encoded]:
        return encode_records(
            records,
            template,
            tokenizer,
            image_token_id=image_token_id,
            num_image_tokens=num_image_tokens,
            max_length=stage.max_length,
        )

    encoded = encode_all(train)
    validation_encoded = encode_all(validation)
    items = plan_items(train, encoded)
    plan = make_plan(
        items,
        batch_size=stage.batch_size,
        tokens_per_row=stage.tokens_per_micro_batch,
        branches_per_tree=stage.branches_per_tree,
        packing=stage.packing,
        num_train_epochs=stage.num_train_epochs,
        max_steps=stage.max_steps,
        seed=seed,
    )
    return StageData(
        template=template,
        records=train,
        encoded=encoded,
        plan=plan,
        counts=step_counts(plan, items, train, encoded),
        validation_records=validation,
        validation_encoded=validation_encoded,
        validation_rows=plan_in_order(
            plan_items(validation, validation_encoded), tokens_per_row=stage.tokens_per_micro_batch
        ),
    )


def step_counts(
    plan: Plan, items: Sequence[PlanItem], records: Sequence[Record], encoded: Sequence[Encoded]
) -> list[StepCounts]:
    """Count what each step holds; a conversation of several turns asks as many questions."""
    questions = [len(record.turns) // 2 for record in records]
    supervised = [one.num_supervised for one in encoded]
    return [
        StepCounts(
            questions=sum(questions[index] for row in step for tree in row for index in tree),
            supervised_tokens=sum(supervised[index] for row in step for tree in row for index in tree),
            computed_tokens=sum(tree_length(tree, items) for row in step for tree in row),
        )
        for step in plan.steps
    ]
