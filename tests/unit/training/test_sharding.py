"""The frozen weights of a model in parts: what it computes is equal to the bit, and a process holds its part."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.helpers.processes import run_together
from tests.helpers.sharded import CASES, main

IDS = ["-".join(map(str, case)) for case in CASES]
Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each of three processes found: not every weight divides evenly."""
    ended = run_together(tmp_path_factory.mktemp("sharding"), main, 3, timeout=400)
    assert [one.code for one in ended] == [0] * 3, ended
    return [json.loads(one.out.splitlines()[-1]) for one in ended]


@pytest.mark.parametrize("case", range(len(CASES)), ids=IDS)
def test_losses_and_gradients_are_those_of_the_whole_model(found: Found, case: int) -> None:
    for one in found:
        result = one["cases"][case]
        assert result["reason"] is None
        assert result["losses"] == [result["losses"][0]] * 3
        assert result["gradients"]
    losses = {one["cases"][case]["losses"][0] for one in found}
    assert len(losses) == (2 if CASES[case][3] == "instruct" else 1)


@pytest.mark.parametrize("case", range(len(CASES)), ids=IDS)
def test_a_process_holds_its_part_and_receives_the_rest_twice_a_row(found: Found, case: int) -> None:
    whole = found[0]["cases"][case]["held"][0]
    parts = [one["cases"][case]["held"][1] for one in found]
    assert sum(parts) == whole
    # Rows of a weight that do not divide evenly go to the first processes.
    assert max(parts) < 1.2 * whole / len(found)
    for one in found:
        received = one["cases"][case]["received"]
        assert received == pytest.approx(2 * whole * (len(found) - 1) / len(found), rel=0.05)


@pytest.mark.parametrize("case", range(len(CASES)), ids=IDS)
def test_the_parts_are_checked_against_change(found: Found, case: int) -> None:
    for one in found:
        assert one["cases"][case]["frozen"] == "checked: the frozen weights did not change"
    assert len({one["cases"][case]["checked"] for one in found}) == 1


def test_a_weight_that_is_not_finite_is_named_by_all(found: Found) -> None:
    for one in found:
        [name] = one["spoiled"]
        assert name.endswith("layers.1.mlp.down_proj.base_layer.weight")


def test_a_process_without_a_row_takes_part(found: Found) -> None:
    assert all(one["idle"] for one in found)
