"""Steps, warm-up, batch and the rate of every step, against tables worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from lora_llava.recipe.schedule import (
    MIN_AUTO_STEPS,
    PROPOSED_STEPS,
    count_steps,
    count_warmup_steps,
    eval_interval,
    logging_interval,
    rate_factor,
    stage_length,
    steps_line,
    validation_line,
)
from lora_llava.recipe.stages import AlignSettings, DataSettings, InstructSettings
from tests.helpers.steps import made_rows, made_trainer


def settings(**changes: Any) -> InstructSettings:
    return InstructSettings(data=DataSettings(path="train.json"), template="vicuna_v1", **changes)


COS = [1.0, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 + math.cos(3 * math.pi / 4)) / 2]
TABLE = {
    # Six steps, two of them warmup: the third has the full rate, and a seventh would have none.
    ("cosine", 6, 2): [1 / 3, 2 / 3, *COS],
    ("linear", 6, 2): [1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25],
    ("constant_with_warmup", 6, 2): [1 / 3, 2 / 3, 1.0, 1.0, 1.0, 1.0],
    ("constant", 5, 0): [1.0, 1.0, 1.0, 1.0, 1.0],
    ("cosine", 4, 0): COS,
    ("cosine", 5, 1): [0.5, *COS],
    ("linear", 5, 1): [0.5, 1.0, 0.75, 0.5, 0.25],
    ("linear", 2, 1): [0.5, 1.0],
    ("cosine", 3, 1): [0.5, 1.0, 0.5],
    ("cosine", 1, 0): [1.0],
    ("linear", 1, 0): [1.0],
    ("constant_with_warmup", 1, 0): [1.0],
}


@pytest.mark.parametrize(("case", "rates"), TABLE.items())
def test_k5_rate_of_each_step(case: tuple[str, int, int], rates: list[float]) -> None:
    kind, steps, warmup = case
    assert [rate_factor(kind, step, steps, warmup) for step in range(1, steps + 1)] == pytest.approx(rates, abs=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_k32_the_rate_stays_0_after_the_last_step(kind: str) -> None:
    assert [rate_factor(kind, step, 6, 2) for step in (7, 8, 20)] == pytest.approx([0, 0, 0], abs=1e-12)


@pytest.mark.parametrize(
    ("records", "batch", "epochs", "max_steps", "steps"),
    # The last step of an epoch may be smaller; half a step is a whole one; 1.1 * 10 is 11.000000000000002.
    [(37, 8, 1.0, -1, 5), (37, 8, 1.0, 0, 5), (37, 8, 1.0, 1, 1), (80, 8, 1.1, -1, 11), (80, 8, 1.25, -1, 13)],
)
def test_k32_steps_by_hand(records: int, batch: int, epochs: float, max_steps: int, steps: int) -> None:
    assert count_steps(records, batch, epochs, max_steps) == steps


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "constant_with_warmup"])
@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.5, 0.999])
def test_k5_no_step_has_rate_0(kind: Any, ratio: float) -> None:
    for steps in (1, 2, 3, 33, 34, 200):
        warmup = count_warmup_steps(steps, settings(lr_scheduler_type=kind, warmup_ratio=ratio))
        rates = [rate_factor(kind, step, steps, warmup) for step in range(1, steps + 1)]
        assert all(0 < rate <= 1 for rate in rates)
        assert max(rates) == 1
        assert rates[:warmup] == pytest.approx([step / (warmup + 1) for step in range(1, warmup + 1)])
        assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant_with_warmup"])
def test_k5_rates_after_the_warmup_are_those_of_transformers(kind: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=3, num_training_steps=20)
    for step in range(1, 21):
        if step > 3:
            assert rate_factor(kind, step, 20, 3) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        else:
            assert rate_factor(kind, step, 20, 3) > theirs.get_last_lr()[0]
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(
    ("steps", "ratio", "warmup"),
    [(1, 0.03, 0), (2, 0.03, 1), (33, 0.03, 1), (34, 0.03, 2), (100, 0.07, 7), (100, 0, 0), (2, 0.9, 1), (5, 0.999, 4)],
)
def test_k5_warmup_is_never_all_of_a_stage(steps: int, ratio: float, warmup: int) -> None:
    assert count_warmup_steps(steps, settings(warmup_ratio=ratio)) == warmup
    assert count_warmup_steps(steps, settings(warmup_ratio=ratio, lr_scheduler_type="constant")) == 0


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "constant_with_warmup"])
def test_k5_trainer_logs_the_rate_of_each_step(tmp_path: Path, kind: str) -> None:
    trainer = made_trainer(tmp_path, made_rows(), lr_scheduler_type=kind, warmup_steps=2, learning_rate=1e-3)
    trainer.train()
    logged = [row["learning_rate"] for row in trainer.state.log_history if "loss" in row]
    assert logged == pytest.approx([1e-3 * rate_factor(kind, step, 6, 2) for step in range(1, 7)], rel=1e-12)
    # Both groups follow it, each from its own rate.
    assert trainer.lr_scheduler is not None
    assert trainer.lr_scheduler.base_lrs == [1e-3, 5e-4]


SIZES = {
    1: (1, 1),
    2: (1, 2),
    5: (1, 5),
    10: (1, 10),
    50: (1, 50),
    120: (4, 30),
    200: (4, 50),
    2_000: (64, 32),
    665_000: (128, 5196),
}


@pytest.mark.parametrize(("records", "expected"), SIZES.items())
def test_k5_auto_batch_by_number_of_records(records: int, expected: tuple[int, int]) -> None:
    length = stage_length(settings(), records)
    assert (length.batch_size, length.num_steps) == expected
    assert length.num_steps >= MIN_AUTO_STEPS or length.batch_size == 1
    larger = stage_length(settings(batch_size=2 * length.batch_size), records)
    assert larger.num_steps < MIN_AUTO_STEPS or length.batch_size == 128


def test_k5_auto_batch_is_llavas_own_where_it_can_be() -> None:
    align = AlignSettings(data=DataSettings(path="captions.json"))
    assert stage_length(align, 558_000).batch_size == 256
    assert stage_length(align, 558_000).batch_line(align) == ("batch_size: 256 (auto: 558,000 records; LLaVA's own)")
    # More epochs are more steps; max_steps is a shorter run of the same batch.
    assert stage_length(settings(num_train_epochs=3.0), 2_000).batch_size == 128
    short = stage_length(settings(max_steps=3), 200)
    assert (short.batch_size, short.num_steps) == (4, 3)
    assert stage_length(settings(batch_size=7), 200).batch_size == 7


def test_k5_lines_say_steps_batch_and_what_to_set() -> None:
    auto = stage_length(settings(), 200)
    assert steps_line(auto.num_steps, auto.num_warmup_steps) == "50 optimizer steps, 2 of them warmup"
    assert auto.batch_line(settings()) == ("batch_size: 4 (auto: 200 records; LLaVA's 128 would give 2 steps)")
    assert auto.proposal("instruct", settings()) is None
    llava = settings(batch_size=128)
    few = stage_length(llava, 200)
    assert steps_line(few.num_steps, few.num_warmup_steps) == "2 optimizer steps, 1 of them warmup"
    assert few.batch_line(llava) is None
    assert few.proposal("instruct", llava) == (
        "2 optimizer steps can change the model only a little; with stages.instruct.batch_size=8 "
        "stages.instruct.num_train_epochs=3: 75 steps"
    )
    ten = stage_length(settings(), 10)
    assert ten.proposal("instruct", settings()) == (
        "10 optimizer steps can change the model only a little; with stages.instruct.batch_size=1 "
        "stages.instruct.num_train_epochs=5: 50 steps"
    )
    one = stage_length(settings(), 1)
    assert one.proposal("instruct", settings()) == (
        "1 optimizer step can change the model only a little; with stages.instruct.batch_size=1 "
        "stages.instruct.num_train_epochs=10: 10 steps; more records would help more"
    )
    # Fifty steps are enough: the epochs stay those of the recipe.
    enough = settings(batch_size=16, num_train_epochs=3.3)
    assert stage_length(enough, 15).proposal("instruct", enough) == (
        "4 optimizer steps can change the model only a little; with stages.instruct.batch_size=1 "
        "stages.instruct.num_train_epochs=3.3: 50 steps"
    )
    # Nothing longer is left to propose.
    longest = settings(num_train_epochs=10.0)
    assert stage_length(longest, 1).proposal("instruct", longest) is None
    assert steps_line(one.num_steps, one.num_warmup_steps) == "1 optimizer step, none of them warmup"
    assert one.batch_line(settings()) == "batch_size: 1 (auto: 1 record; LLaVA's 128 would give 1 step)"


@pytest.mark.parametrize("records", [1, 2, 5, 10, 19, 20, 48, 200, 2_000])
@pytest.mark.parametrize("batch", [1, 16, 128])
def test_k5_a_proposal_has_the_steps_it_says(records: int, batch: int) -> None:
    before = settings(batch_size=batch)
    length = stage_length(before, records)
    text = length.proposal("instruct", before)
    assert (text is None) == (length.num_steps >= 20)
    if text is not None:
        batch_text, epochs_text = (
            text.partition("with stages.instruct.batch_size=")[2]
            .partition(":")[0]
            .split(" stages.instruct.num_train_epochs=")
        )
        after = settings(batch_size=int(batch_text), num_train_epochs=float(epochs_text))
        steps = stage_length(after, records).num_steps
        assert f": {steps:,} step" in text
        assert steps > length.num_steps
        assert steps >= PROPOSED_STEPS or after.num_train_epochs == 10
        assert ("more records" in text) == (steps < 20)
    assert length.proposal("instruct", settings(batch_size=batch, max_steps=1)) is None


@pytest.mark.parametrize(
    ("steps", "wanted", "interval"), [(1, 10, 1), (9, 10, 1), (19, 10, 1), (20, 10, 2), (135, 5, 5), (5000, 10, 10)]
)
def test_k5_a_stage_has_ten_lines_of_log(steps: int, wanted: int, interval: int) -> None:
    assert logging_interval(settings(logging_steps=wanted), steps) == interval


def test_k41_biases_do_not_decay(tmp_path: Path) -> None:
    trainer = made_trainer(tmp_path, made_rows(), weight_decay=0.1)
    trainer.create_optimizer()
    assert trainer.optimizer is not None
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    decay = {
        names[id(one)]: group["weight_decay"] for group in trainer.optimizer.param_groups for one in group["params"]
    }
    assert len(decay) == sum(one.requires_grad for one in trainer.model.parameters())
    assert {value for name, value in decay.items() if name.endswith("bias")} == {0.0}
    assert {value for name, value in decay.items() if not name.endswith("bias")} == {0.1}
    assert any(name.endswith("bias") for name in decay)
    rates = {group["name"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {"lora": 1e-3, "projector": 5e-4}


def test_k41_groups_keep_the_order_of_parameters(tmp_path: Path) -> None:
    orders = []
    for decay in (0.0, 0.1):
        trainer = made_trainer(tmp_path, made_rows(), weight_decay=decay)
        trainer.create_optimizer()
        assert trainer.optimizer is not None
        names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
        orders.append([names[id(one)] for group in trainer.optimizer.param_groups for one in group["params"]])
    # With no decay the groups are the two that they have always been.
    assert orders[0] == orders[1]
    assert json.dumps(orders[0]).find("multi_modal_projector") > json.dumps(orders[0]).rfind("lora_B")


@pytest.mark.parametrize(
    ("eval_steps", "steps", "trained", "held_out", "interval"),
    [
        ("auto", 100, 2_000, 0, None),
        (None, 100, 2_000, 50, 100),
        (7, 100, 2_000, 50, 7),
        # Ten validations of 50 records, with and without images, cost as much as 333 trained ones: too much.
        ("auto", 100, 2_000, 50, 17),
        ("auto", 100, 10_000, 50, 10),
        ("auto", 5, 10_000, 50, 1),
        ("auto", 100, 100, 50, 100),
    ],
)
def test_k6_validations_take_a_tenth_of_the_time(
    eval_steps: Any, steps: int, trained: int, held_out: int, interval: int | None
) -> None:
    assert eval_interval(settings(eval_steps=eval_steps), steps, trained, held_out) == interval


def test_k6_validations_are_said() -> None:
    assert validation_line(settings(), 100, 10) == "validation every 10 steps, 10 times, auto; keep: best"
    assert validation_line(settings(eval_steps=40, keep="last"), 100, 40) == (
        "validation every 40 steps, 3 times; keep: last"
    )
    assert validation_line(settings(eval_steps=None), 100, 100) == (
        "validation at the end only (eval_steps: null), so the last weights are kept"
    )


@pytest.mark.parametrize(("eval_steps", "acts"), [(50, False), (34, False), (25, True), (10, True), (100, False)])
def test_k36_patience_that_cannot_act_is_said(eval_steps: int, acts: bool) -> None:
    stage = settings(eval_steps=eval_steps).model_copy(update={"early_stopping_patience": 2})
    line = validation_line(stage, 100, eval_steps)
    assert ("stops after 2 validations without improvement" in line) == acts
    assert ("early_stopping_patience: 2 has no effect: it needs at least 4 validations" in line) == (not acts)


@pytest.mark.parametrize("missing", ["data.validation", "eval_steps"])
def test_k6_patience_without_validations_is_refused(missing: str) -> None:
    data = {"path": "train.json", "validation": {"share": 0.1}}
    changes: dict[str, Any] = {"early_stopping_patience": 2, "data": data}
    if missing == "eval_steps":
        changes["eval_steps"] = None
    else:
        del data["validation"]
    with pytest.raises(ValueError, match=f"early_stopping_patience needs {missing}"):
        InstructSettings.model_validate({"template": "vicuna_v1", **changes})
