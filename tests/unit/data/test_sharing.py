"""What rows of a length compute, against the plan that is then made."""

from __future__ import annotations

import random

import pytest

from lora_llava.data.packing import Packing, PlanItem, RowSettings, make_plan, no_sharing, sharing

PREFIX = 10


def computed(items: list[PlanItem], branches_per_tree: int, packing: Packing, tokens: int) -> float:
    """Share of the tokens that a plan of one step computes."""
    settings = RowSettings(tokens, branches_per_tree, packing)
    made = make_plan(items, settings, batch_size=len(items), num_steps=1, seed=0)
    return 1 - made.share_saved


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("packing", ["tree", "none"])
def test_k32_sharing_is_that_of_the_plan(seed: int, packing: Packing) -> None:
    # Exact where the conversations about an image are of one length; images differ in prefix, length and number.
    rng = random.Random(seed)
    items = [PlanItem(rng.randint(1, 30), 0, -1) for _ in range(rng.randint(0, 4))]
    for group in range(5):
        prefix, own = PREFIX + group % 2, rng.randint(1, 9)
        items += [PlanItem(prefix + own, prefix, group)] * rng.randint(1, 9)
    share = sharing(items, branches_per_tree := rng.randint(1, 6), packing)
    for tokens in (30, 37, 48, 64, 1000):
        assert share(tokens) == pytest.approx(computed(items, branches_per_tree, packing, tokens))


def test_k32_one_group_of_two_prefixes_is_two_images() -> None:
    items = [PlanItem(PREFIX + 5, PREFIX, 0)] * 2 + [PlanItem(PREFIX + 9, PREFIX + 4, 0)] * 2
    separate = 2 * (PREFIX + 5) + 2 * (PREFIX + 9)
    assert sharing(items, 4, "tree")(1000) == pytest.approx((PREFIX + 10 + PREFIX + 4 + 10) / separate)


def test_k32_a_conversation_without_text_of_its_own_is_counted() -> None:
    # Lengths below one token an average would divide by nothing.
    items = [PlanItem(PREFIX, PREFIX, 0)] * 4
    assert sharing(items, 4, "tree")(20) == pytest.approx(1 / 4)


def test_k32_what_shares_nothing_computes_everything() -> None:
    assert no_sharing(1) == no_sharing(4096) == 1.0
    assert sharing([PlanItem(7, 0, -1)] * 3, 8, "tree")(100) == 1.0
