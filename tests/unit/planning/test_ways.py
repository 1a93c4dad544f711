"""The tables of docs/several_gpus.md: they are the planner's, and each way costs what it must."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_llava.modeling.structure import linear_weights
from tests.ways import MODELS, RANKS, memory_columns, shapes_of, smallest_way, tables, traffic, trained

ROOT = Path(__file__).parents[3]


def test_the_page_has_these_tables() -> None:
    page = (ROOT / "docs/several_gpus.md").read_text(encoding="utf-8")
    for table in tables().split("\n\n"):
        assert table in page, "run: python -m tests.ways, and put the tables into docs/several_gpus.md"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("rank", RANKS)
def test_sharding_saves_its_share_of_the_frozen_weights(model: str, rank: int) -> None:
    shapes = shapes_of(model, rank)
    needed = memory_columns(shapes)
    frozen = 0.5 * linear_weights(shapes.config) / 2**30
    between = needed["sharded over 2, 8-bit Adam"] - needed["sharded over 4, 8-bit Adam"]
    assert between == pytest.approx(frozen / 4, rel=1e-3)
    assert needed["each card whole, AdamW"] - needed["each card whole, 8-bit Adam"] == pytest.approx(
        6 * trained(shapes) / 2**30
    )
    assert smallest_way(shapes, 80) == "whole"


def test_sums_travel_once_a_step_and_weights_twice_a_row() -> None:
    shapes = shapes_of("7B", 128)
    two, four = traffic(shapes, 2), traffic(shapes, 4)
    assert two["each card whole"] * 1e9 == pytest.approx(4 * trained(shapes))
    assert four["each card whole"] == pytest.approx(1.5 * two["each card whole"])
    weights = two["sharded"] - two["each card whole"]
    assert weights * 1e9 == pytest.approx(4 * 2 * 0.5 * 0.5 * linear_weights(shapes.config))
