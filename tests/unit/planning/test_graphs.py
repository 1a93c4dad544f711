"""Which lengths rows are padded to for CUDA graphs, and when graphs are planned."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch

from lora_llava.modeling.structure import FLEX, TREES
from lora_llava.planning import graphs, memory_plan
from lora_llava.planning.graphs import choose_lengths, graph_bytes
from lora_llava.planning.memory_plan import (
    MemoryPlan,
    plan_line,
    plan_memory,
    predicted_seconds,
    with_possible_graphs,
)
from lora_llava.planning.speed import Machine, Speed
from tests.unit.planning.test_memory_plan import GIB, recipe, shapes_of

SLOW_HOST = Speed(launching=0.4, token=2e-5, dequantizing=7e-3, is_measured=True)
FAST_HOST = Speed(launching=0.01, token=2e-5, dequantizing=7e-3, is_measured=True)


def padded(lengths: list[int], chosen: list[int]) -> int:
    return sum(min(one for one in chosen if one >= length) for length in lengths)


@pytest.mark.parametrize("seed", range(20))
def test_the_lengths_are_the_fewest_that_add_little_and_the_best_of_so_many(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(seed)
    monkeypatch.setattr(graphs, "_MOST_LENGTHS", 3)
    lengths = [128 * draw.randint(2, 9) for _ in range(draw.randint(1, 30))]
    chosen = choose_lengths(lengths)
    assert chosen == sorted(set(chosen))
    assert chosen[-1] == max(lengths)
    others = sorted(set(lengths) - {max(lengths)})
    least = {
        count: min(padded(lengths, [*some, max(lengths)]) for some in combinations(others, count - 1))
        for count in range(1, min(3, len(set(lengths))) + 1)
    }
    enough = [count for count, tokens in least.items() if tokens <= 1.02 * sum(lengths)]
    assert len(chosen) == (enough[0] if enough else max(least))
    assert padded(lengths, chosen) == least[len(chosen)]


def test_no_rows_have_no_lengths() -> None:
    assert choose_lengths([]) == []
    assert choose_lengths([512]) == [512]


def plan_of(speed: Speed, attention: str = FLEX, usable: int = 24 * GIB, **settings: Any) -> MemoryPlan:
    shapes = shapes_of(recipe(**settings), torch.bfloat16, 700)
    return plan_memory(shapes, Machine("cuda", usable, attention, speed))


def test_graphs_are_planned_where_rows_take_longer_to_launch_than_to_compute() -> None:
    shapes = shapes_of(recipe(), torch.bfloat16, 700)
    machine = Machine("cuda", 24 * GIB, FLEX, SLOW_HOST)
    plan = plan_memory(shapes, machine)
    assert plan.graphs
    assert "cuda_graphs: on (auto)" in plan_line(plan, shapes)
    off = plan_memory(shapes_of(recipe(stage={"cuda_graphs": "off"}), torch.bfloat16, 700), machine)
    assert not off.graphs
    assert "cuda_graphs" not in plan_line(off, shapes)
    assert plan.cost < off.cost
    # What is launched otherwise is known from a measurement alone; where computing takes longer, nothing is gained.
    assert not plan_of(FAST_HOST).graphs
    assert not plan_of(replace(SLOW_HOST, is_measured=False)).graphs


def test_graphs_are_not_planned_where_they_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not plan_of(SLOW_HOST, TREES).graphs
    shapes = shapes_of(recipe(), torch.bfloat16, 700)
    machine = Machine("cuda", 24 * GIB, FLEX, SLOW_HOST)
    assert shapes.may_use_graphs(machine)
    dropping = shapes.adapter.model_copy(update={"lora_dropout": 0.05})
    assert not replace(shapes, adapter=dropping).may_use_graphs(machine)
    assert not shapes.may_use_graphs(replace(machine, device="cpu"))
    monkeypatch.setattr(memory_plan, "world_size", lambda: 2)
    assert not shapes.may_use_graphs(machine)


def test_the_graphs_of_a_checkpoint_are_left_where_weights_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = shapes_of(recipe(), torch.bfloat16, 700)
    machine = Machine("cuda", 24 * GIB, FLEX, SLOW_HOST)
    stored = plan_memory(shapes, machine)
    assert with_possible_graphs(stored, shapes, machine) == stored
    assert stored.graphs
    monkeypatch.setattr(memory_plan, "world_size", lambda: 2)
    assert with_possible_graphs(stored, shapes, machine) == replace(stored, graphs=False)


def test_a_row_through_graphs_launches_what_is_outside_of_them() -> None:
    shapes = shapes_of(recipe(), torch.bfloat16, 700)
    plan = plan_memory(shapes, Machine("cuda", 40 * GIB, FLEX, SLOW_HOST))
    layers = int(shapes.config.text_config.num_hidden_layers)
    expected = max(0.4 * 5 / (layers + 4), (plan.keep_dequantized is False) * 7e-3 + 2e-5 * 1000)
    assert plan.recompute.policy is False
    assert predicted_seconds(shapes, plan, 1000) == pytest.approx(expected)
    assert predicted_seconds(shapes, replace(plan, graphs=False), 1000) == pytest.approx(
        0.4 * (0.7 if plan.keep_dequantized else 1)
    )


def test_graphs_count_in_the_memory_of_a_plan() -> None:
    stage = {"tokens_per_micro_batch": 2176, "gradient_checkpointing": False}
    shapes = shapes_of(recipe(stage=stage), torch.bfloat16, 700)
    machine = Machine("cuda", 40 * GIB, FLEX, SLOW_HOST)
    plans = [one for one in memory_plan._candidates(shapes, machine) if one.optim == "adamw_torch"]
    with_graphs, without = ({one.keep_dequantized: one for one in plans if one.graphs is on} for on in (True, False))
    size = graph_bytes(shapes.config, shapes.dtype, 2176)
    assert with_graphs.keys() == without.keys() == {False, True}
    assert all(with_graphs[key].bytes_needed - one.bytes_needed == size for key, one in without.items())
    # Of the longest row: buffers and workspace.
    twice, none = (graph_bytes(shapes.config, shapes.dtype, tokens) for tokens in (4352, 0))
    assert twice - size == size - none
    assert size < GIB
