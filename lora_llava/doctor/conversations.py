"""The second half of a check, with the tokenizer: encode every conversation, and plan every stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from transformers import LlavaConfig

from lora_llava.conversation.encode import IMAGE_PLACEHOLDER, Encoded
from lora_llava.conversation.templates import get_template
from lora_llava.data.load import merge_turns
from lora_llava.data.mixing import mixed
from lora_llava.data.pairs import encode_record
from lora_llava.data.record import Record
from lora_llava.data.stage import EncodedRecords, Size, StageData, StageRecords, length_lines, plan_records, size_of
from lora_llava.doctor.compare import Finding, finding_about, finding_at
from lora_llava.doctor.survey import Side, Survey, sides_of
from lora_llava.doctor.tokens import TokenKind, token_runs
from lora_llava.errors import DataError, RecipeError, TrainingError
from lora_llava.modeling.metadata import describe_base
from lora_llava.modeling.structure import image_tokens
from lora_llava.planning.dry_run import compute_dtype, this_machine
from lora_llava.planning.memory_plan import plan_memory, stage_shapes
from lora_llava.recipe.schedule import FEW_STEPS, rate_factor
from lora_llava.recipe.settings import Recipe
from lora_llava.recipe.stages import StageName, StageSettings
from lora_llava.system.processes import in_processes
from lora_llava.system.text import counted

_NO_BOUND = 2**31
"""Maximum length of the questions of an evaluation, which are never truncated."""


@dataclass(slots=True)
class Conversations:
    """What the check learns from the tokenizer."""

    records: dict[str, list[Record]] = field(default_factory=dict)
    """Conversations of each side, by its name, as trained on or asked: merged, if its data merge turns."""
    sizes: dict[str, list[Size]] = field(default_factory=dict)
    """Sizes of these conversations."""
    plans: dict[StageName, dict[str, Any]] = field(default_factory=dict)
    mixes: dict[StageName, list[dict[str, Any]]] = field(default_factory=dict)
    """What each source is of an epoch, of the stages that mix several."""
    findings: list[Finding] = field(default_factory=list)
    encoders: dict[str, partial[Encoded]] = field(default_factory=dict)
    """By the name of the side."""
    tokenizer: Any = None
    image_token_id: int = -1


def encode_sides(survey: Survey, workers: int | None = None) -> Conversations:
    """Encode all conversations of a survey in `workers` processes and plan its stages; bad records are set aside."""
    conversations = Conversations()
    config, conversations.tokenizer = describe_base(survey.recipe.base)
    conversations.image_token_id = int(config.image_token_id)
    before = [len(source.records) for source in survey.sources]
    for side in survey.sides:
        _encode_side(survey.recipe, side, conversations, config, workers)
    if before != [len(source.records) for source in survey.sources]:
        # A run draws its validation share of the records that can be encoded.
        survey.sides = list(sides_of(survey.recipe, survey.sources))
        conversations.findings.clear()
        for side in survey.sides:
            _encode_side(survey.recipe, side, conversations, config, workers)
    for stage in survey.recipe.stage_names:
        conversations.plans[stage] = _plan(survey, stage, conversations, config)
    return conversations


def _encode_side(
    recipe: Recipe, side: Side, conversations: Conversations, config: LlavaConfig, workers: int | None
) -> None:
    """Encode the records of a side; then, if the stage merges turns, the merged conversations."""
    stage = recipe.stage(side.stage)
    encoder = partial(
        encode_record,
        pairs=stage.trains_on_pairs and side.role != "evaluation",
        template=get_template(stage.template, stage.system),
        tokenizer=conversations.tokenizer,
        image_tokens=image_tokens(config),
        max_length=_NO_BOUND if side.role == "evaluation" else stage.max_length,
    )
    conversations.encoders[side.name] = encoder
    results = in_processes(
        partial(_size, encoder), side.records, on_crash=_crashed, workers=workers, label=f"conversations, {side.name}"
    )
    special = [token for token in conversations.tokenizer.all_special_tokens if token != IMAGE_PLACEHOLDER]
    usable = []
    for record, (size, error) in zip(side.records, results, strict=True):
        if error is not None:
            side.source_of(record).bad.add_record(record, error)
            continue
        usable.append((record, size))
        if token := next((token for token in special if any(token in turn.text for turn in record.turns)), None):
            problem = f"{record.where}: holds {token}"
            conversations.findings.append(
                finding_at("special_text", side.source_of(record), record, problem, record.image)
            )
    side.records = [record for record, _ in usable]
    for source in {id(source): source for source in (side.source, *side.others.values())}.values():
        failed = {bad.record for bad in source.bad.records}
        source.records = [record for record in source.records if record.number not in failed]
    records, sizes = side.records, [size for _, size in usable if size is not None]
    if side.role == "training" and any(source.data.merge_turns for source in side.others.values()):
        records = _merged(side)
        merged = in_processes(partial(_size, encoder), records, on_crash=_crashed, workers=workers)
        sizes = [size for size, _ in merged if size is not None]
    conversations.records[side.name], conversations.sizes[side.name] = records, sizes
    for record, size in zip(records, sizes, strict=True):
        if size.is_cut:
            problem = f"{record.where}: is cut to {counted(size.length, 'token')}"
            conversations.findings.append(
                finding_at("truncated", side.source_of(record), record, problem, record.image)
            )


def _merged(side: Side) -> list[Record]:
    """Merge the turns of the sources that ask for it, each by itself, as a run does."""
    records: list[Record] = []
    for name, source in side.others.items():
        own = [record for record in side.records if record.source == name]
        most = source.data.merge_turns
        records += [replace(record, source=name) for record in merge_turns(own, most)] if most else own
    return records


def _size(encoder: partial[Encoded], record: Record) -> tuple[Size | None, DataError | None]:
    try:
        return size_of(encoder(record)), None
    except DataError as error:
        return None, error


def _crashed(record: Record) -> tuple[Size | None, DataError | None]:
    return None, DataError(f"{record.where}: encoding it crashed the process; remove the record")


def _plan(survey: Survey, stage: StageName, conversations: Conversations, config: LlavaConfig) -> dict[str, Any]:
    """Plan the steps of a stage as a run on this machine does."""
    recipe, settings = survey.recipe, survey.recipe.stage(stage)
    side = next(side for side in survey.sides if side.stage == stage and side.role == "training")
    if not side.records:
        return {"problem": "Nothing to train on: no record could be read."}
    training = _mixed(recipe, side, conversations)
    held_out = f"{stage} validation"
    validation = EncodedRecords(
        conversations.records.get(held_out, []),
        **conversations.encoders[side.name].keywords,
        sizes=conversations.sizes.get(held_out, []),
    )
    records = StageRecords(get_template(settings.template, settings.system), training, validation)
    longest, facts = records.longest.length, dict[str, Any]()
    try:
        dtype = compute_dtype(recipe.precision)
        shapes = stage_shapes(recipe, stage, config, dtype, records)
        tokens = plan_memory(shapes, this_machine(recipe.attn_implementation, None)).tokens_per_micro_batch
    except RecipeError as error:
        conversations.findings.append(finding_about("micro_batch", side.source, str(error)))
        tokens = longest
    except TrainingError as error:
        facts["problem"] = str(error)
        given = settings.tokens_per_micro_batch
        tokens = max(longest, settings.max_length) if given == "auto" else given
    data = plan_records(records, settings, tokens, recipe.seed)
    conversations.findings += _too_few_steps(stage, settings, data, side)
    if lines := length_lines(stage, settings, data):
        facts["steps"] = "; ".join(lines)
    return facts | _plan_facts(data, tokens, longest)


def _too_few_steps(stage: StageName, settings: StageSettings, data: StageData, side: Side) -> Iterator[Finding]:
    length = data.length
    if length.num_steps >= FEW_STEPS:
        return
    factors = (
        rate_factor(settings.lr_scheduler_type, step, length.num_steps, length.num_warmup_steps)
        for step in range(1, length.num_steps + 1)
    )
    rates = f"the learning rates add up to {settings.learning_rate * sum(factors):.1g}"
    problem = f"{stage}: {counted(length.num_steps, 'optimizer step')}; {rates}, the farthest that Adam moves a weight"
    yield finding_about("few_steps", side.source, problem)


def _mixed(recipe: Recipe, side: Side, conversations: Conversations) -> EncodedRecords:
    """Return the encoded training records of an epoch, those of several sources mixed; also note their mix."""
    sources, settings = recipe.stage(side.stage).data.sources, conversations.encoders[side.name].keywords
    own, sizes = conversations.records[side.name], conversations.sizes[side.name]
    if len(sources) == 1:
        return EncodedRecords(own, **settings, sizes=sizes)
    size_by_id = dict(zip(map(id, own), sizes, strict=True))
    of_source = {name: [record for record in own if record.source == name] for name in side.others}
    records = mixed(sources, list(of_source.values()), recipe.seed)
    encoded = EncodedRecords(records, **settings, sizes=(size_by_id[id(record)] for record in records))
    conversations.mixes[side.stage] = _mix(of_source, encoded)
    return encoded


def _mix(of_source: Mapping[str, Sequence[Record]], epoch: EncodedRecords) -> list[dict[str, Any]]:
    """Return what each source is of an epoch: records, supervised tokens, and the fractions of both."""
    records: Counter[str] = Counter()
    supervised: Counter[str] = Counter()
    for record, count in zip(epoch.records, epoch.num_supervised, strict=True):
        records[record.source] += 1
        supervised[record.source] += count
    return [
        {
            "source": name,
            "records": len(own),
            "records_of_epoch": records[name],
            "share_of_records": round(records[name] / len(epoch), 4),
            "supervised_tokens": supervised[name],
            "share_of_supervised_tokens": round(supervised[name] / max(1, supervised.total()), 4),
        }
        for name, own in of_source.items()
    ]


def _plan_facts(data: StageData, tokens: int, longest: int) -> dict[str, Any]:
    plan = data.plan
    return {
        "conversations": len(data.encoded),
        "validation_conversations": len(data.validation),
        "batch_size": data.length.batch_size,
        "optimizer_steps": len(plan.steps),
        "warmup_steps": data.length.num_warmup_steps,
        "micro_batches_per_step": plan.rows_per_step,
        "tokens_per_micro_batch": tokens,
        "longest_conversation": longest,
        "computed_tokens": plan.num_computed_tokens,
        "supervised_tokens": sum(step.supervised_tokens for step in data.counts),
        "share_saved_by_packing": round(plan.share_saved, 4),
        "conversations_cut": data.encoded.num_cut,
    }


def text_runs(record: Record, side: Side, conversations: Conversations) -> list[tuple[TokenKind, str]]:
    """Return a record as the model gets it, in runs of one kind of token, as text."""
    encoded = conversations.encoders[side.name](record)
    return [
        (kind, f"{IMAGE_PLACEHOLDER} x {len(ids)}" if kind == "image" else _text(ids, conversations.tokenizer))
        for kind, ids in token_runs(encoded, conversations.image_token_id)
    ]


def _text(ids: Sequence[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
