"""The data of a stage: what is counted beforehand is what comes out, and the plan and its lines by hand."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_llava.conversation.encode import ImageTokens, Turn, encode
from lora_llava.conversation.templates import get_template
from lora_llava.data import stage as stage_module
from lora_llava.data.bad_records import BadRecord
from lora_llava.data.packing import PlanItem
from lora_llava.data.record import ImageSource, Record
from lora_llava.data.stage import (
    EncodedRecords,
    Longest,
    Size,
    StageData,
    StageRecords,
    StepCounts,
    _repeated,
    cache_offer,
    length_lines,
    plan_records,
    read_records,
)
from lora_llava.errors import DataError
from lora_llava.recipe.stages import DataSettings, InstructSettings
from tests.helpers.tiny import IMAGE_ID, NUM_IMAGE_TOKENS, tiny_tokenizer

OPTIONS = {"image_tokens": ImageTokens(IMAGE_ID, NUM_IMAGE_TOKENS), "max_length": 170}


def record(image: str | None, question: str, answer: str = "yes") -> Record:
    source = None if image is None else ImageSource(image, Path(image), None)
    shown = "<image>\n" if image else ""
    return Record(question, source, (Turn("user", shown + question), Turn("assistant", answer)), f"at {question}")


def test_counts_are_those_of_what_comes_out() -> None:
    records = [record("a", "one"), record(None, "two"), record("b", "three"), record("a", "four", "no " * 90)]
    encoded = EncodedRecords(records, get_template("vicuna_v1"), tiny_tokenizer(), **OPTIONS)
    assert len(encoded) == 4
    expected = [
        encode(one.turns, get_template("vicuna_v1"), tiny_tokenizer(), where=one.where, **OPTIONS) for one in records
    ]
    assert list(encoded) == encoded[:] == [encoded[index] for index in range(4)] == expected
    assert encoded.items == [
        PlanItem(len(one.input_ids), one.prefix_length, group)
        for one, group in zip(expected, (0, -1, 1, 0), strict=True)
    ]
    assert list(encoded.num_supervised) == [one.num_supervised for one in expected]
    assert [one.is_cut for one in expected] == [False, False, False, True]
    assert encoded.num_cut == 1


def test_conversations_about_an_image_are_a_group_if_their_system_prompt_is_the_same() -> None:
    asked = [dataclasses.replace(record("a", name), system="Be brief.") for name in ("two", "four")]
    records = [record("a", "one"), asked[0], record("a", "three"), asked[1]]
    encoded = EncodedRecords(records, get_template("vicuna_v1"), tiny_tokenizer(), **OPTIONS)
    assert [item.group for item in encoded.items] == [0, 1, 0, 1]


def test_sources_are_told_apart_if_there_are_several() -> None:
    records = [dataclasses.replace(record(None, name), source=name) for name in ("own", "replay", "own")]
    for count, expected in ((1, ()), (2, ("own", "replay")), (3, ("own", "replay"))):
        assert sized(records[:count], [Size(5, 0, 1, False)] * count).sources == expected


def test_the_first_that_cannot_be_trained_on_is_named() -> None:
    with pytest.raises(DataError, match=r"at two: .*empty"):
        EncodedRecords(
            [record("a", "one"), record("b", "two", " "), record("b", "three", " ")],
            get_template("vicuna_v1"),
            tiny_tokenizer(),
            **OPTIONS,
        )


def test_k32_sizes_that_are_given_must_be_those_of_all_records() -> None:
    with pytest.raises(ValueError, match="zip"):
        sized([record("a", "one")], [Size(15, 10, 1, False)] * 2)


def test_k32_encoding_advances_once_for_each_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []

    @contextmanager
    def counting(label: str, total: int) -> Iterator[Any]:
        seen.append((label, total))
        yield lambda count: seen.append(("advance", count))

    monkeypatch.setattr(stage_module, "counting", counting)
    EncodedRecords([record("a", "one"), record(None, "two")], get_template("vicuna_v1"), tiny_tokenizer(), **OPTIONS)
    assert seen == [("encoding conversations", 2), ("advance", 1), ("advance", 1)]


def settings(**changes: Any) -> InstructSettings:
    return InstructSettings(data=DataSettings(path="train.json"), **changes)


def sized(records: Sequence[Record], sizes: Sequence[Size]) -> EncodedRecords:
    """Conversations of sizes that are set by hand."""
    return EncodedRecords(records, get_template("vicuna_v1"), tiny_tokenizer(), **OPTIONS, sizes=sizes)


def texts(count: int) -> EncodedRecords:
    """Conversations of 5 tokens without an image."""
    return sized([record(None, f"t{number}") for number in range(count)], [Size(5, 0, 1, False)] * count)


@pytest.fixture
def by_hand() -> StageRecords:
    """Four conversations of 5 tokens on one image of 10, one on another, a text of 7; two held out on one image."""
    four = [record("a", f"q{number}") for number in range(3)]
    turns = (Turn("user", "<image>\nx"), Turn("assistant", "y"), Turn("user", "z"), Turn("assistant", "y"))
    four.append(Record("two", four[0].image, turns, "at two"))
    train = sized(
        [*four, record("b", "q0"), record(None, "text")],
        [Size(15, 10, number, False) for number in range(1, 6)] + [Size(7, 0, 6, True)],
    )
    validation = sized([record("c", "v0"), record("c", "v1")], [Size(12, 10, 2, False), Size(17, 10, 7, False)])
    return StageRecords(get_template("vicuna_v1"), train, validation)


def test_k32_the_longest_conversation_is_that_of_training_and_validation(by_hand: StageRecords) -> None:
    assert by_hand.longest == Longest(17, "at v1")
    swapped = StageRecords(by_hand.template, by_hand.validation, by_hand.train)
    assert swapped.longest == Longest(17, "at v1")
    assert StageRecords(by_hand.template, by_hand.train, texts(1)).longest == Longest(15, "at q0")


@pytest.mark.parametrize(
    ("packing", "branches", "computed"),
    # Apart 82 tokens: 5 conversations of 15 and a text of 7. Two trees of two, or one of four, save 2 or 3 prefixes.
    [("tree", 2, 62), ("tree", 4, 52), ("none", 4, 82)],
)
def test_k32_the_sampled_steps_follow_packing_branches_and_processes(
    by_hand: StageRecords, monkeypatch: pytest.MonkeyPatch, packing: Any, branches: int, computed: int
) -> None:
    stage = settings(packing=packing, branches_per_tree=branches, batch_size=6)
    sampled = by_hand.sample_steps(stage, seed=0)
    assert sampled.row_lengths(64).sum() == computed
    assert (sampled.num_separate_tokens, sampled.ranks) == (82, 1)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert by_hand.sample_steps(stage, seed=0).row_lengths(64).shape[1] % 3 == 0


def test_k32_a_planned_stage_counts_and_says_what_it_holds(by_hand: StageRecords) -> None:
    stage = settings(batch_size=6, branches_per_tree=4)
    data = plan_records(by_hand, stage, 64, seed=3)
    # One of the seven questions is the second of its conversation. One prefix is computed instead of four.
    assert data.counts == [StepCounts(questions=7, supervised_tokens=21, computed_tokens=52)]
    assert isinstance(data.counts[0].questions, int)
    assert [sorted(index for tree in row for index in tree) for row in data.plan.steps[0]] == [[0, 1, 2, 3, 4, 5]]
    assert (data.template, data.encoded, data.validation) == (by_hand.template, by_hand.train, by_hand.validation)
    assert data.validation_rows == [((0, 1),)]
    assert data.summary() == (
        "6 conversations and 2 for validation; 1 optimizer step, none of them warmup; 1 micro-batch a step; "
        "52 tokens, 37% saved by packing; 1 conversation cut short by max_length"
    )
    data.encoded.are_pairs = True
    assert data.summary().startswith("6 pairs and 2 for validation; ")
    assert data.summary().endswith("; 1 pair cut short by max_length")


def test_k32_a_plan_follows_row_length_branches_packing_seed_and_processes(
    by_hand: StageRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(tokens: int = 64, seed: int = 3, **changes: Any) -> StageData:
        return plan_records(by_hand, settings(**{"batch_size": 6, **changes}), tokens, seed)

    # Rows of 17 tokens hold one conversation; one held-out conversation has 17 tokens, and both need 19.
    assert (plan(17).plan.rows_per_step, plan(17).plan.num_computed_tokens) == (6, 82)
    assert plan(17).validation_rows == [((1,),), ((0,),)]
    assert plan(packing="none").plan.rows_per_step == 6
    assert plan(branches_per_tree=2).plan.num_computed_tokens == 62
    assert {plan(seed=seed).plan.steps for seed in range(8)} != {plan().plan.steps}
    two_epochs = plan(batch_size=3, num_train_epochs=2.0)
    assert (len(two_epochs.plan.steps), two_epochs.length.num_steps) == (4, 4)
    assert [one.questions for one in two_epochs.counts] in ([3, 4, 3, 4], [3, 4, 4, 3], [4, 3, 3, 4], [4, 3, 4, 3])
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert plan().plan.rows_per_step == 2


def test_k32_what_was_left_out_and_what_repeats_is_said() -> None:
    same = [record("a", "one"), record("b", "one"), record("a", "one"), record(None, "one"), record("a", "one")]
    train = sized(same, [Size(1205, 4, 1, False)] * 3 + [Size(1204, 0, 1, False), Size(1205, 4, 1, False)])
    bad = BadRecord("train.json", 3, None, "form", "no answer")
    records = StageRecords(get_template("vicuna_v1"), train, sized([], []), [bad, bad])
    data = plan_records(records, settings(batch_size=2, num_train_epochs=2.0, branches_per_tree=1), 1300, 0)
    assert data.skipped == [bad, bad]
    assert data.validation_rows == []
    # Five conversations an epoch in steps of two: two micro-batches a step, each of one conversation.
    assert data.summary() == (
        "5 conversations; 6 optimizer steps, 1 of them warmup; 2 micro-batches a step; 12,048 tokens, "
        "0% saved by packing; 2 bad records skipped; 2 of 5 records repeat another: same image, same text"
    )


@pytest.mark.parametrize(
    ("eval_steps", "interval"),
    # 4 held-out conversations without an image cost as much as 8 / 3 trained ones: 7 times are a tenth of 200.
    [("auto", 15), (None, 100), (30, 30)],
)
def test_k32_validations_follow_steps_and_conversations(eval_steps: Any, interval: int) -> None:
    stage = settings(batch_size=2, eval_steps=eval_steps)
    records = StageRecords(get_template("vicuna_v1"), texts(200), texts(4))
    data = plan_records(records, stage, 64, 0)
    assert data.eval_interval(stage) == interval
    assert (
        plan_records(StageRecords(get_template("vicuna_v1"), texts(200), texts(0)), stage, 64, 0).eval_interval(stage)
        is None
    )


def test_k32_lines_of_a_short_stage_and_of_a_long_one() -> None:
    short = StageRecords(get_template("vicuna_v1"), texts(5), texts(2))
    stage = settings()
    assert length_lines("instruct", stage, plan_records(short, stage, 64, 0)) == [
        "batch_size: 1 (auto: 5 records; LLaVA's 128 would give 1 step)",
        "5 optimizer steps can change the model only a little; with stages.instruct.batch_size=1 "
        "stages.instruct.num_train_epochs=10: 50 steps",
        "validation at the end only (eval_steps: auto), so the last weights are kept",
    ]
    long = StageRecords(get_template("vicuna_v1"), texts(100), texts(0))
    stage = settings(batch_size=4)
    assert length_lines("instruct", stage, plan_records(long, stage, 64, 0)) == []
    held_out = StageRecords(get_template("vicuna_v1"), texts(100), texts(4))
    stage = settings(batch_size=4, eval_steps=10)
    assert length_lines("instruct", stage, plan_records(held_out, stage, 64, 0)) == [
        "validation every 10 steps, 3 times; keep: best"
    ]


def test_caching_features_is_offered_where_images_come_often() -> None:
    # Records 0 and 1 are of one image, 2 of another, 3 has none.
    records = [record("a", "one"), record("a", "two"), record("b", "three"), record(None, "four")]
    once, often = [[((0, 1), (2,))], [((3,),)]], [[((0,), (2,))], [((1,), (3,))], [((2,),)]]
    off = SimpleNamespace(cache_image_features="off")

    def offer(steps: Any, settings: Any = off) -> str | None:
        encoded, plan = SimpleNamespace(records=records), SimpleNamespace(steps=steps)
        data: Any = SimpleNamespace(encoded=encoded, plan=plan)
        return cache_offer(settings, data)

    assert offer(once) is None
    assert offer([[((3,),)]]) is None
    tip = "tip: each image is encoded {} times; cache_image_features: memory (or disk) does it once"
    assert offer(often) == tip.format("2.0")
    # Three trees of two images: 1.5 times each, from which on it pays. The image of a tree is that of its first record.
    assert offer([[((0,), (2,))], [((1, 3),)]]) == tip.format("1.5")
    assert offer([[((0,), (2,))], [((3, 1),)]]) is None
    assert offer(often, SimpleNamespace(cache_image_features="disk")) is None


def write_texts(directory: Path, answers: Sequence[str], question: str = "Is it so?") -> Path:
    """Write records without images; return the file."""
    rows = [
        {"id": f"r{number}", "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
        for number, answer in enumerate(answers)
    ]
    (directory / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    return directory / "train.json"


def test_k32_records_are_read_with_the_settings_of_their_stage(tmp_path: Path) -> None:
    path = write_texts(tmp_path, [f"yes {number} " + "no " * 40 for number in range(6)])
    data = {"path": str(path), "validation": {"share": 0.4}}
    image_tokens = ImageTokens(IMAGE_ID, NUM_IMAGE_TOKENS)

    def read(seed: int = 0, **changes: Any) -> StageRecords:
        stage = InstructSettings.model_validate({"data": data, "template": "chatml", "max_length": 90, **changes})
        return read_records(stage, tiny_tokenizer(), image_tokens, seed)

    records = read()
    assert records.template == get_template("chatml")
    assert (len(records.train), len(records.validation), list(records.skipped)) == (4, 2, [])
    assert records.longest.length == 90
    assert (records.train.num_cut, records.validation.num_cut) == (4, 2)
    uncut = read(max_length=400)
    assert (uncut.train.num_cut, uncut.longest.length > 90) == (0, True)
    assert read(system="Be brief.").template == get_template("chatml", "Be brief.")
    held_out = {tuple(one.id for one in read(seed).validation.records) for seed in range(8)}
    assert len(held_out) > 1
    assert read(0).train.records == records.train.records


def test_k32_a_record_that_cannot_be_encoded_is_skipped_or_stops_the_reading(tmp_path: Path) -> None:
    path = write_texts(tmp_path, ["yes", "no"], question="Is it so? " * 40)
    rows = json.loads(path.read_text(encoding="utf-8"))
    rows[0]["conversations"][0]["value"] = "Is it?"
    path.write_text(json.dumps(rows), encoding="utf-8")
    image_tokens = ImageTokens(IMAGE_ID, NUM_IMAGE_TOKENS)

    def read(handling: str) -> StageRecords:
        stage = {"data": {"path": str(path), "on_bad_record": handling}, "template": "chatml", "max_length": 100}
        return read_records(InstructSettings.model_validate(stage), tiny_tokenizer(), image_tokens, 0)

    with pytest.raises(DataError, match=r"train\.json, record 2 \(id r1\): nothing to train on"):
        read("error")
    records = read("skip")
    assert [one.id for one in records.train.records] == ["r0"]
    [skipped] = records.skipped
    assert (skipped.record, skipped.id, skipped.kind) == (2, "r1", "unsupervised")
    assert skipped.problem.startswith("train.json, record 2 (id r1): nothing to train on: of its ")


def test_what_the_weight_of_a_source_repeats_is_no_repetition() -> None:
    # The same file by another name.
    one, other = record("a", "one"), dataclasses.replace(record("a", "one"), image=ImageSource("b", Path("a"), None))
    asked = dataclasses.replace(other, system="Be brief.")
    assert _repeated([one, one, one]) == ""
    assert _repeated([one, one, asked]) == ""
    pairs = [dataclasses.replace(one, rejected="no"), dataclasses.replace(other, rejected="never")]
    assert _repeated(pairs) == ""
    assert _repeated([one, one, other]) == "1 of 2 records repeat another: same image, same text"
