"""Which lengths rows are padded to for CUDA graphs, and when graphs are tried."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from itertools import combinations

import pytest
import torch

from lora_llava.modeling.structure import FLEX
from lora_llava.planning import graphs
from lora_llava.planning.graphs import choose_lengths, graph_bytes, why_no_graphs
from lora_llava.planning.memory_plan import plan_memory
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


def test_graphs_are_tried_where_rows_take_longer_to_launch_and_memory_has_room() -> None:
    shapes = shapes_of(recipe(), torch.bfloat16, 700)
    plan = plan_memory(shapes, Machine("cuda", 40 * GIB, FLEX, SLOW_HOST))
    rows = [1152] * 9 + [2176]
    assert why_no_graphs(shapes, plan, rows) is None
    fast = str(why_no_graphs(shapes, replace(plan, speed=FAST_HOST), rows))
    assert re.fullmatch(r"rows take longer to compute, 0\.\d+ s in all, than to launch, 0\.\d+ s", fast)
    assert "not measured" in str(
        why_no_graphs(shapes, replace(plan, speed=replace(SLOW_HOST, is_measured=False)), rows)
    )
    needed = plan.bytes_needed + graph_bytes(shapes, 2176)
    assert why_no_graphs(shapes, replace(plan, bytes_usable=needed), rows) is None
    short = why_no_graphs(shapes, replace(plan, bytes_usable=needed - 1), rows)
    assert short is not None
    assert short.startswith("with graphs ")
    # Of the longest row: buffers and workspace.
    assert graph_bytes(shapes, 4352) - graph_bytes(shapes, 2176) == graph_bytes(shapes, 2176) - graph_bytes(shapes, 0)
    assert graph_bytes(shapes, 2176) < GIB
