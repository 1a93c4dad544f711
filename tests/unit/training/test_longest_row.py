"""The trial on the longest row, and the end of a run that runs out of memory."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console

import lora_llava.training.checks.longest_row as trial
from lora_llava.cli.common import memory_size
from lora_llava.data.packing import PlanItem
from lora_llava.data.rows import Batch
from lora_llava.errors import TrainingError
from lora_llava.modeling.attention import attention_of, set_attention
from lora_llava.modeling.packed import llava_in
from lora_llava.modeling.structure import FLEX, TREES
from lora_llava.planning import memory_plan
from lora_llava.planning.memory_plan import (
    MemoryPlan,
    StageShapes,
    plan_line,
    plan_memory,
    predicted_seconds,
    usable_bytes,
)
from lora_llava.planning.speed import Machine, Speed
from tests.parity.test_packed import branches, build_model, row_of
from tests.unit.planning.test_memory_plan import GIB, recipe, shapes_of

CONVERSATIONS = [*branches(4)]
ITEMS = [PlanItem(len(one.input_ids), one.prefix_length, 0) for one in CONVERSATIONS]
CARD = Machine("cuda", 20 * GIB, FLEX)


class Rows(list[Batch]):
    """What the trial needs of `PackedRows`."""

    rows = (((0,),), ((1, 2),), ())


def rows() -> Any:
    return Rows(
        [row_of([[CONVERSATIONS[index] for index in tree] for tree in row], torch.float32) for row in Rows.rows[:2]]
    )


def shapes(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> StageShapes:
    return shapes_of(recipe(**changes), dtype, 700)


def test_the_longest_row_passes_twice_and_the_weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model().eval()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    seen = []
    loss = trial.packed_loss
    monkeypatch.setattr(trial, "packed_loss", lambda *inputs: seen.append(inputs[1]) or loss(*inputs))
    made = rows()
    tried = trial.try_longest_row(model, made, ITEMS, torch.float32, Console(quiet=True))
    assert tried.seconds > 0
    assert tried.tokens == made[1]["input_ids"].shape[1]
    assert [one["input_ids"].tolist() for one in seen] == 2 * [made[1]["input_ids"].tolist()]
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training


def fails_in_flex(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model whose FlexAttention raises; how often each attention was taken."""
    model = build_model()
    set_attention(llava_in(model), FLEX)
    taken: list[str] = []
    loss = trial.packed_loss

    def compute(*inputs: Any) -> Any:
        taken.append(attention_of(llava_in(model)))
        if taken[-1] == FLEX:
            raise TypeError("no such kernel")
        return loss(*inputs)

    monkeypatch.setattr(trial, "packed_loss", compute)
    return model, taken


def test_flex_attention_that_fails_in_the_model_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    model, taken = fails_in_flex(monkeypatch)
    trial.try_longest_row(model, rows(), ITEMS, torch.float32, Console(quiet=True))
    assert taken == [FLEX, TREES, TREES]
    assert attention_of(llava_in(model)) == TREES


def test_what_flex_attention_computed_is_gone_before_another_one_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    class Activations:
        pass

    model, _ = fails_in_flex(monkeypatch)
    held: list[weakref.ref[Activations]] = []
    compute = trial.packed_loss

    def watched(*inputs: Any) -> Any:
        assert not any(one() for one in held)
        activations = Activations()
        held.append(weakref.ref(activations))
        return compute(*inputs)

    monkeypatch.setattr(trial, "packed_loss", watched)
    trial.try_longest_row(model, rows(), ITEMS, torch.float32, Console(quiet=True))
    assert len(held) == 3


def test_an_error_without_flex_attention_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tried = build_model(), []
    monkeypatch.setattr(trial, "packed_loss", lambda *inputs: tried.append(inputs) or {}["no such part"])
    with pytest.raises(KeyError, match="no such part"):
        trial.try_longest_row(model, rows(), ITEMS, torch.float32, Console(quiet=True))
    assert len(tried) == 1


def test_flex_attention_that_is_asked_for_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = fails_in_flex(monkeypatch)
    with pytest.raises(TrainingError, match=r"flex_attention does not work with this model .*no such kernel"):
        trial.try_longest_row(model, rows(), ITEMS, torch.float32, Console(quiet=True), attn_implementation=FLEX)


@pytest.mark.fault("training: too little GPU memory")
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_names_the_next_smaller_plan(monkeypatch: pytest.MonkeyPatch, error: RuntimeError) -> None:
    chosen = plan_memory(shapes(), CARD)
    plans: dict[int, MemoryPlan] = {}

    def record(shapes: StageShapes, machine: Machine) -> MemoryPlan:
        return plans.setdefault(machine.usable, plan_memory(shapes, machine))

    monkeypatch.setattr(memory_plan, "plan_memory", record)
    with (
        pytest.raises(
            TrainingError, match=r"stage instruct: out of memory .* with --memory [\d.]+GiB, which plans"
        ) as told,
        trial.out_of_memory_named(shapes(), CARD, chosen),
    ):
        raise error
    size, _, line = str(told.value).partition("--memory ")[2].partition(", which plans ")
    [(usable, planned)] = plans.items()
    assert usable == usable_bytes(CARD.device, memory_size(size)), "a run with the option plans the same"
    retry = 0.85 * min(chosen.bytes_needed, CARD.usable)
    assert retry - 0.1 * memory_plan.GIB < usable <= retry
    assert line == plan_line(planned, shapes())
    assert planned.bytes_needed < chosen.bytes_needed


def test_out_of_memory_with_nothing_smaller_says_what_to_lower() -> None:
    stage = {"tokens_per_micro_batch": 2048, "gradient_checkpointing": True, "optim": "paged_adamw_8bit"}
    fixed = shapes(stage=stage, quantization={"keep_dequantized": False})
    chosen = plan_memory(fixed, CARD)
    with (
        pytest.raises(TrainingError, match=r"out of memory.*Lower adapter\.r"),
        trial.out_of_memory_named(fixed, CARD, chosen),
    ):
        raise torch.OutOfMemoryError


def test_other_errors_stay_what_they_are() -> None:
    with (
        pytest.raises(RuntimeError, match="shapes"),
        trial.out_of_memory_named(shapes(), CARD, plan_memory(shapes(), CARD)),
    ):
        raise RuntimeError("shapes do not fit")


@pytest.mark.parametrize(("factor", "warns"), [(1.0, False), (1.29, False), (1.31, True), (0.4, False)])
def test_the_time_of_the_trial_is_compared_with_the_predicted(factor: float, warns: bool) -> None:
    speed = Speed(0.1, 1e-4, 0.01, is_measured=True)
    chosen = plan_memory(shapes(), replace(CARD, measured=speed))
    predicted = predicted_seconds(shapes(), chosen, 700)
    assert predicted is not None
    line, *warning = trial.trial_lines(trial.Trial(700, factor * predicted), shapes(), chosen)
    assert f"{1e3 * factor * predicted:.0f} ms a pass, predicted {1e3 * predicted:.0f} ms" in line
    assert bool(warning) == warns
    assert all(f"{factor:.1f} times as long as predicted" in text for text in warning)


def test_an_assumed_speed_predicts_nothing() -> None:
    [line] = trial.trial_lines(trial.Trial(700, 0.5), shapes(), plan_memory(shapes(), CARD))
    assert "500 ms a pass" in line
    assert "predicted" not in line
