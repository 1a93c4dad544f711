"""The planner's choice against a brute force over real packings, and the speed that it measures."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit

import lora_llava.planning.calibration as calibration
from lora_llava.data.packing import PlanItem, make_plan, sample_steps, tree_length
from lora_llava.modeling.fused.layer import FusedLayer
from lora_llava.modeling.structure import BF16, FLEX, TREES
from lora_llava.planning.calibration import measure_speed
from lora_llava.planning.memory import Recompute, activation_bytes, expected_memory, in_4_bits
from lora_llava.planning.memory_plan import GIB, StageShapes, plan_memory, predicted_seconds, usable_bytes
from lora_llava.planning.speed import ASSUMED, Machine, Passes, Speed
from lora_llava.recipe.settings import Recipe
from tests.helpers.tiny import tiny_config
from tests.plans import CASES, SPEEDS, items_of, plan_of, row_settings, shapes_of, table
from tests.unit.planning.test_memory_plan import recipe
from tests.unit.planning.test_memory_plan import shapes_of as any_shapes

LAYERS = 32
Choice = tuple[int, str, str, bool]
"""Tokens of a row, recomputation, optimizer, whether weights are dequantized once."""


def rows_of(questions: int, tokens: int) -> Counter[int]:
    """Lengths of the rows of the whole plan."""
    items = items_of(questions)
    made = make_plan(items, row_settings(questions, tokens), batch_size=44, num_steps=4, seed=0)
    rows = [row for step in made.steps for row in step if row]
    return Counter(sum(tree_length(tree, items) for tree in row) for row in rows)


def brute_force(shapes: StageShapes, questions: int, usable: int, speed: Speed) -> Iterator[tuple[float, int, Choice]]:
    """Yield time, bytes and choice of everything that fits."""
    base = shapes.parameters
    nf4 = in_4_bits(base, shapes.config, shapes.quantization, BF16)
    layer = shapes.layers(FLEX)
    policies = [(Recompute(False), 1.0, 0.0), (Recompute(True), 1.5, 1.0)]
    # Of fused layers, some are recomputed in full, and the others not at all.
    policies += [(Recompute("selective", full), 1 + 0.5 * full / LAYERS, full / LAYERS) for full in range(4, LAYERS, 4)]
    rows = {tokens: rows_of(questions, tokens) for tokens in [*range(8192, shapes.longest, -64), shapes.longest]}
    for keep, (policy, launches, repeated) in product((False, True), policies):
        launching = speed.launching * launches * (0.7 if keep else 1.0)
        for tokens, lengths in rows.items():
            held = activation_bytes(shapes.config, layer, policy, tokens, tokens)
            seconds = 0.0
            for length, count in lengths.items():
                computing = (2 + repeated) / 2 * ((0.0 if keep else speed.dequantizing) + length)
                seconds += count * max(launching, computing)
            for optim in ("adamw_torch", "paged_adamw_8bit"):
                needed = held + sum(part.total for part in expected_memory(optim, base if keep else nf4))
                if needed <= usable:
                    yield seconds, needed, (tokens, str(policy), optim, keep)


def smallest_of_the_fastest(found: list[tuple[float, int, Choice]]) -> tuple[float, Choice]:
    fastest = min(seconds for seconds, _, _ in found)
    seconds, _, choice = min((one for one in found if one[0] <= 1.005 * fastest), key=lambda one: one[1])
    return seconds, choice


@pytest.mark.parametrize(("size", "rank", "questions"), CASES)
def test_the_plan_is_the_fastest_of_all_over_the_real_rows(size: int, rank: int, questions: int) -> None:
    shapes = shapes_of(rank, questions)
    for name, speed in SPEEDS.items():
        found = list(brute_force(shapes, questions, usable_bytes("cuda", size * GIB), speed))
        seconds, choice = smallest_of_the_fastest(found)
        exact = [one for one in found if one[2][2] == "adamw_torch"]
        if choice[2] != "adamw_torch" and exact and (other := smallest_of_the_fastest(exact))[0] <= 1.1 * seconds:
            seconds, choice = other
        plan = plan_of(name, size, rank, questions)
        chosen = (plan.tokens_per_micro_batch, str(plan.recompute), plan.optim, plan.keep_dequantized)
        assert chosen == choice, name
        separate = sum(item.length for item in items_of(questions))
        assert plan.cost == pytest.approx(seconds / separate)


def test_the_table_of_the_plans_is_up_to_date() -> None:
    page = (Path(__file__).parents[3] / "docs/memory.md").read_text(encoding="utf-8")
    assert table() in page, "run: python -m tests.plans, and put the table into docs/memory.md"


@pytest.mark.parametrize("seed", range(12))
def test_nothing_is_recomputed_selectively_where_launching_dominates(seed: int) -> None:
    rng = random.Random(seed)
    speed = Speed(0.2, 2e-5, rng.uniform(0.0, 0.02), is_measured=True)
    shapes = shapes_of(rng.choice((16, 64, 128)), rng.choice((1, 4, 11)))
    # DoRA is not fused, so selective recomputation would keep less than none.
    shapes = replace(shapes, adapter=shapes.adapter.model_copy(update={"type": "dora"}))
    assert not shapes.is_fused
    plan = plan_memory(shapes, Machine("cuda", usable_bytes("cuda", rng.randint(10, 48) * GIB), FLEX, speed))
    assert plan.recompute.policy != "selective"


def test_a_row_takes_the_longer_of_launching_and_computing() -> None:
    speed = Speed(100.0, 1.0, 30.0)
    lengths = np.array([[0, 50, 200]])

    def times(policy: Any, keep: bool = False, full: int = 0) -> list[float]:
        return Passes(4, Recompute(policy, full), True, keep, is_fused=False).row_times(lengths, speed)[0].tolist()

    assert times(False) == [0, 100, 230]
    assert times(False, keep=True) == [0, pytest.approx(54), 200]
    assert times(True) == [0, pytest.approx(180), 345]
    assert times("selective") == [0, 300, 300]
    assert times("selective", full=2) == [0, pytest.approx(240), pytest.approx(1.3125 * 230)]
    assert Passes(4, Recompute(False), False, False).row_times(lengths, speed)[0].tolist() == [0, 100, 200]
    # Fused layers: no selective recomputation, so two of four in full cost half of what four do.
    half = Passes(4, Recompute("selective", 2), True, False, is_fused=True)
    assert half.row_times(lengths, speed)[0].tolist() == [0, 125, pytest.approx(1.25 * 230)]


def test_of_several_processes_the_slowest_counts() -> None:
    items = [PlanItem(length, 0, -1) for length in (90, 80, 20, 10)]
    settings = replace(row_settings(1, 100), ranks=2)
    steps = sample_steps(items, settings, batch_size=4, num_steps=1, seed=0)
    machine, shapes = Machine("cpu", 64 * GIB, TREES), any_shapes(recipe(), BF16, 90)
    plan = plan_memory(replace(shapes, steps=steps, settings=shapes.settings), machine)
    lengths = steps.row_lengths(plan.tokens_per_micro_batch)
    assert lengths.shape[1] % 2 == 0
    slowest = max(lengths[0, 0::2].sum(), lengths[0, 1::2].sum())
    assert plan.cost == pytest.approx(slowest / 200)


def tiny_shapes(**changes: Any) -> StageShapes:
    made = any_shapes(Recipe.model_validate(recipe(**changes)), torch.float32, 300)
    return replace(made, config=tiny_config())


@pytest.mark.parametrize("changes", [{}, {"quantization": {"type": "none"}}, {"adapter": {"type": "dora", "r": 4}}])
def test_a_layer_is_measured_and_leaves_no_trace(changes: Any) -> None:
    drawn = torch.get_rng_state()
    speed, line = measure_speed(tiny_shapes(**changes), TREES, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), drawn)
    assert speed is not None
    assert speed.is_measured
    assert speed.launching > 0
    assert speed.token > 0
    assert (speed.dequantizing == 0) or "quantization" not in changes
    assert "to launch" in line
    assert Speed(**asdict(speed)) == speed


@pytest.mark.parametrize(
    ("changes", "fused", "nf4"),
    [({}, True, True), ({"quantization": {"type": "none"}}, True, False), ({"adapter": {"type": "dora"}}, False, True)],
)
def test_the_measured_layer_is_that_of_the_run(changes: Any, fused: bool, nf4: bool) -> None:
    timer = calibration._LayerTimer(tiny_shapes(**changes), TREES, torch.device("cpu"))
    layer = timer.text.layers[0]
    assert isinstance(layer, FusedLayer) == fused
    query = layer.self_attn.q_proj
    assert isinstance(query.base_layer, Linear4bit) == nf4
    assert query.lora_A["default"].weight.shape[0] == tiny_shapes(**changes).adapter.r
    assert timer.seconds(100) > 0
    assert timer.seconds(100, 4) > 0
    # All of LoRA has a gradient, as in a pass of the run.
    lora = [one for name, one in layer.named_parameters() if "lora_" in name]
    assert lora and all(one.grad is not None for one in lora)


@pytest.mark.parametrize(
    ("launching", "token", "dequantizing"), [(0.2, 2e-5, 0.015), (0.008, 2e-5, 0.007), (0.02, 1.5e-4, 0.02)]
)
def test_the_constants_of_a_machine_are_found(launching: float, token: float, dequantizing: float) -> None:
    # A machine whose rows take exactly what the planner assumes.
    asked: list[int] = []

    def seconds(tokens: int, chain: int = 1) -> float:
        assert chain == (calibration._CHAIN if tokens == calibration._SHORT["cuda"] else 1)
        asked.append(tokens)
        return max(launching, dequantizing + token * tokens) / LAYERS

    speed = calibration._speed(seconds, shapes_of(128, 4), "cuda")
    # Rounded to one and a half digits. The launches outside of the layers are those of four more layers. In the third
    # machine even 128 tokens take longer to compute; in the first nothing is known of dequantizing, since launching
    # hides it up to 10,000 tokens.
    assert speed.launching == pytest.approx(max(launching, dequantizing + 128 * token) * 36 / 32, rel=0.25)
    assert speed.token == pytest.approx(token, rel=0.25)
    assert speed.dequantizing == (0.0 if launching == 0.2 else pytest.approx(dequantizing, rel=0.25))
    assert max(asked) <= 16_384


@pytest.mark.parametrize("tokens", [1, 24, 300, 640, 1024, 1500, 2048 + 650])
def test_a_timed_row_has_the_tokens_that_it_is_timed_for(tokens: int) -> None:
    assert calibration._row(tokens)["input_ids"].shape[1] == tokens


def test_a_speed_is_described_in_one_line() -> None:
    times = "and 15 ms + 20 us per token to compute (measured on one layer)"
    assert str(Speed(0.2, 2e-5, 0.015, is_measured=True)) == f"a row takes 200 ms to launch, {times}"
    without = times.replace("15 ms + ", "")
    assert str(Speed(0.2, 2e-5, 0.0, is_measured=True)) == f"a row takes 200 ms to launch, {without}"


@pytest.mark.parametrize(
    ("value", "rounded"),
    [(0.0, 0.0), (-1.0, 0.0), (0.123, 0.1), (0.1251, 0.15), (9.8, 10.0), (2.24e-5, 2e-5), (37, 35)],
)
def test_constants_have_one_and_a_half_digits(value: float, rounded: float) -> None:
    assert calibration._rounded(value) == rounded


def test_a_layer_that_cannot_be_timed_leaves_the_assumed_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(calibration, "_LayerTimer", fail)
    speed, line = measure_speed(tiny_shapes(), TREES, torch.device("cpu"))
    assert speed is None
    assert "OutOfMemoryError: CUDA out of memory" in line
    assert Machine("cuda", GIB, FLEX, speed).speed == ASSUMED["cuda"]


def test_only_a_measured_speed_predicts_seconds() -> None:
    shapes = shapes_of(128, 11)
    card = Machine("cuda", usable_bytes("cuda", 24 * GIB), FLEX, Speed(0.01, 2e-5, 0.005, is_measured=True))
    plan = plan_memory(shapes, card)
    passes = shapes.passes(plan.recompute, keep_dequantized=plan.keep_dequantized)
    assert predicted_seconds(shapes, plan, 1000) == passes.row_times(np.array([1000]), card.speed)[0]
    assert predicted_seconds(shapes, replace(plan, speed=ASSUMED["cuda"]), 1000) is None
