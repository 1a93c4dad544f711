"""The rows of the first steps, for any length, against the plan that is then made."""

from __future__ import annotations

import random

import pytest

from lora_llava.data.packing import Packing, PlanItem, RowSettings, make_plan, sample_steps, tree_length

PREFIX = 10


def random_items(seed: int) -> list[PlanItem]:
    rng = random.Random(seed)
    items = [PlanItem(rng.randint(1, 30), 0, -1) for _ in range(rng.randint(0, 4))]
    for group in range(40):
        prefix = PREFIX + group % 2
        items += [PlanItem(prefix + rng.randint(1, 9), prefix, group) for _ in range(rng.randint(1, 9))]
    # The last step of an epoch has no fewer conversations than there are processes.
    return items[: len(items) // 8 * 8]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("packing", ["tree", "none"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_k32_the_counted_rows_are_those_of_the_plan(seed: int, packing: Packing, ranks: int) -> None:
    items, branches = random_items(seed), 1 + seed
    sizes = {"batch_size": 8, "num_steps": 50, "seed": seed}
    sampled = sample_steps(items, RowSettings(0, branches, packing, ranks), **sizes)
    assert sampled.ranks == ranks
    for tokens in (30, 37, 48, 64, 1000):
        made = make_plan(items, RowSettings(tokens, branches, packing, ranks), **sizes)
        # Steps after the sampled ones may need more rows, which are empty in these.
        lengths = [
            [length for row in step if (length := sum(tree_length(tree, items) for tree in row))]
            for step in made.steps[:32]
        ]
        assert [[one for one in step if one] for step in sampled.row_lengths(tokens).tolist()] == lengths
        assert sampled.row_lengths(tokens).shape[1] % ranks == 0
    used = [index for step in made.steps[:32] for row in step for tree in row for index in tree]
    assert sampled.num_separate_tokens == sum(items[index].length for index in used)


def test_k32_a_conversation_without_text_of_its_own_is_counted() -> None:
    items = [PlanItem(PREFIX, PREFIX, 0)] * 4
    sampled = sample_steps(items, RowSettings(0, 4), batch_size=4, num_steps=1, seed=0)
    assert sampled.row_lengths(20).tolist() == [[PREFIX]]
    assert sampled.num_separate_tokens == 4 * PREFIX
