"""The plan of a stage: what it promises for any data, on random data and on examples done by hand."""

from __future__ import annotations

import math
import random
import time
from typing import Any

import pytest

from lora_llava.data import packing
from lora_llava.data.packing import Plan, PlanItem, RowSettings, make_plan, plan_in_order, tree_length
from lora_llava.recipe.schedule import count_steps

PREFIX = 10


def random_items(seed: int, count: int = 37, images: int = 9) -> list[PlanItem]:
    """Conversations of 11 to 40 tokens on a few images, some of text alone."""
    rng = random.Random(seed)
    items = []
    for _ in range(count):
        if rng.random() < 0.2:
            items.append(PlanItem(rng.randint(1, 40), 0, -1))
        else:
            items.append(PlanItem(PREFIX + rng.randint(1, 30), PREFIX, rng.randrange(images)))
    return items


def plan(items: list[PlanItem], **changes: Any) -> Plan:
    settings: dict[str, Any] = {
        "batch_size": 8,
        "tokens_per_row": 64,
        "branches_per_tree": 4,
        "packing": "tree",
        "num_train_epochs": 1.0,
        "max_steps": -1,
        "seed": 0,
    }
    settings |= changes
    num_steps = count_steps(len(items), settings["batch_size"], settings["num_train_epochs"], settings["max_steps"])
    rows = RowSettings(
        settings["tokens_per_row"], settings["branches_per_tree"], settings["packing"], settings.get("ranks", 1)
    )
    return make_plan(items, rows, batch_size=settings["batch_size"], num_steps=num_steps, seed=settings["seed"])


def conversations(made: Plan) -> list[list[int]]:
    """The conversations of each step, in row order."""
    return [[index for row in step for tree in row for index in tree] for step in made.steps]


def step_sets(made: Plan) -> list[list[int]]:
    return [sorted(step) for step in conversations(made)]


@pytest.mark.fault("records: some with an image, some without")
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("packing", ["tree", "none"])
def test_promises_for_any_data(seed: int, packing: str) -> None:
    items = random_items(seed)
    batch_size = random.Random(seed).randint(1, 12)
    made = plan(items, packing=packing, batch_size=batch_size, seed=seed)
    steps = conversations(made)
    assert [len(step) for step in steps[:-1]] == [batch_size] * (len(steps) - 1)
    assert sorted(index for step in steps for index in step) == list(range(len(items)))
    assert {len(step) for step in made.steps} == {made.rows_per_step}
    rows = [row for step in made.steps for row in step]
    assert max(sum(tree_length(tree, items) for tree in row) for row in rows) <= 64
    for tree in (tree for row in rows for tree in row):
        assert len(tree) <= 4
        assert len({(items[index].group, items[index].prefix_length) for index in tree}) == 1
        assert len(tree) == 1 or items[tree[0]].prefix_length == PREFIX


@pytest.mark.parametrize("seed", range(5))
def test_the_conversations_of_a_step_depend_neither_on_packing_nor_on_the_rows(seed: int) -> None:
    items = random_items(seed)
    plans = [plan(items, packing="none"), plan(items, tokens_per_row=40), plan(items, tokens_per_row=4096)]
    assert step_sets(plans[0]) == step_sets(plans[1]) == step_sets(plans[2])
    assert plans[0].rows_per_step >= plans[1].rows_per_step > plans[2].rows_per_step == 1


@pytest.mark.fault("records: an order that depends on the worker processes")
def test_is_a_function_of_its_arguments() -> None:
    items = random_items(1)
    assert plan(items, seed=3) == plan(items, seed=3)
    assert step_sets(plan(items, seed=3)) != step_sets(plan(items, seed=4))


def test_epochs_differ_in_order_and_hold_every_conversation_once() -> None:
    items = random_items(2)
    steps = step_sets(plan(items, num_train_epochs=3.0))
    an_epoch = math.ceil(len(items) / 8)
    epochs = [steps[start : start + an_epoch] for start in range(0, len(steps), an_epoch)]
    assert [sorted(index for step in epoch for index in step) for epoch in epochs] == [list(range(len(items)))] * 3
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.fault("records: none at all, or fewer than a step takes")
@pytest.mark.parametrize(
    ("epochs", "max_steps", "steps"),
    [(1.0, -1, 5), (2.0, -1, 10), (0.5, -1, 3), (1.2, -1, 6), (1e-9, -1, 1), (1.0, 2, 2), (1.0, 11, 11)],
)
def test_number_of_steps(epochs: float, max_steps: int, steps: int) -> None:
    # 37 conversations in steps of 8: five steps an epoch, the fifth of 5 conversations.
    made = plan(random_items(0), num_train_epochs=epochs, max_steps=max_steps)
    assert len(made.steps) == steps
    assert [len(step) for step in conversations(made)] == [5 if (n + 1) % 5 == 0 else 8 for n in range(steps)]


def test_more_conversations_than_branches_make_more_trees() -> None:
    items = [PlanItem(PREFIX + 1, PREFIX, 0)] * 10
    made = plan(items, batch_size=10, branches_per_tree=4, tokens_per_row=4096)
    assert sorted(len(tree) for row in made.steps[0] for tree in row) == [2, 4, 4]


def test_a_tree_cut_by_a_row_or_by_a_step_keeps_its_prefix() -> None:
    items = [PlanItem(PREFIX + 5, PREFIX, 0)] * 6
    by_row = plan(items, batch_size=6, branches_per_tree=6, tokens_per_row=PREFIX + 10)
    assert [len(tree) for row in by_row.steps[0] for tree in row] == [2, 2, 2]
    by_step = plan(items, batch_size=4, branches_per_tree=6, tokens_per_row=4096)
    assert [[len(tree) for row in step for tree in row] for step in by_step.steps] == [[4], [2]]
    assert by_step.num_computed_tokens == (PREFIX + 20) + (PREFIX + 10)
    assert by_row.num_computed_tokens == 3 * (PREFIX + 10)


def test_a_conversation_longer_than_a_row_is_refused() -> None:
    items = [PlanItem(64, PREFIX, 0), PlanItem(65, PREFIX, 0)]
    assert plan(items[:1]).num_conversations == 1
    with pytest.raises(ValueError, match="conversation 1 has 65 tokens, a row holds 64"):
        plan(items)


def test_without_packing_every_row_is_one_conversation() -> None:
    made = plan(random_items(3), packing="none")
    shapes = {tuple(len(tree) for tree in row) for step in made.steps for row in step}
    assert shapes == {(1,), ()}
    assert made.rows_per_step == 8
    assert made.share_saved == 0.0


def test_share_saved_by_hand() -> None:
    # Four questions of 5 tokens on one image, one on another, a text of 7: apart, 5 * 15 + 7 = 82 tokens.
    items = [PlanItem(PREFIX + 5, PREFIX, 0)] * 4 + [PlanItem(PREFIX + 5, PREFIX, 1), PlanItem(7, 0, -1)]
    made = plan(items, batch_size=6)
    assert made.num_separate_tokens == 82
    assert made.num_computed_tokens == (10 + 4 * 5) + 15 + 7 == 52
    assert made.share_saved == pytest.approx(1 - 52 / 82)
    assert made.num_conversations == 6
    # Of nothing, nothing is saved.
    assert Plan((), 0, 0, 0, 0).share_saved == 0.0


@pytest.mark.fault("records: none at all, or fewer than a step takes")
def test_a_short_step_is_filled_up_with_empty_rows() -> None:
    items = [PlanItem(60, PREFIX, group) for group in range(5)]
    made = plan(items, batch_size=4)
    assert made.rows_per_step == 4
    # Empty ones first.
    assert [[len(row) for row in step] for step in made.steps] == [[1, 1, 1, 1], [0, 0, 0, 1]]


def test_a_step_takes_no_more_rows_than_it_needs() -> None:
    # Steps of 2: one of two long conversations, others of short ones that fit one row.
    items = [PlanItem(60 if index < 2 else 5, 0, -1) for index in range(12)]
    made = plan(items, batch_size=2)
    used = [sum(bool(row) for row in step) for step in made.steps]
    lengths = [sum(items[index].length for index in step) for step in conversations(made)]
    assert used == [1 if length <= 64 else 2 for length in lengths]
    assert made.rows_per_step == max(used)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_ranks_compute_as_many_rows_side_by_side(seed: int, ranks: int) -> None:
    items = random_items(seed, count=40)
    made = plan(items, ranks=ranks)
    assert step_sets(made) == step_sets(plan(items))
    assert made.rows_per_step % ranks == 0
    assert max(sum(tree_length(tree, items) for tree in row) for step in made.steps for row in step) <= 64
    for step in made.steps:
        used = [bool(row) for row in step]
        assert used == sorted(used)
        assert sum(used) % ranks == 0


def test_ranks_without_a_conversation_have_an_empty_row_at_the_end_of_a_step() -> None:
    made = plan(random_items(0, count=9), ranks=3)
    last = made.steps[-1]
    assert [len(row) for row in last] == [0] * (len(last) - 3) + [1, 0, 0]
    # Three long conversations take a row each: the second rank has one less.
    made = plan([PlanItem(60, PREFIX, group) for group in range(3)], batch_size=3, ranks=2)
    assert [len(row) for row in made.steps[0]] == [1, 1, 1, 0]


def test_no_step_leaves_a_rank_out() -> None:
    widest = 0
    for seed in range(1000):
        rng = random.Random(seed)
        # Lengths as of LLaVA-1.5: a prefix with an image takes most of a row, so that rows are hard to balance.
        tokens, prefix = rng.choice([(1024, 610), (2048, 610), (64, 10)])
        ranks = rng.randint(1, 4)
        items = [
            PlanItem(prefix + rng.randint(1, tokens - prefix), prefix, rng.randrange(rng.randint(1, 8)))
            if rng.random() < 0.8
            else PlanItem(rng.randint(1, tokens), 0, -1)
            for _ in range(rng.randint(1, 40))
        ]
        settings = {"tokens_per_row": tokens, "batch_size": rng.randint(1, 25), "branches_per_tree": rng.randint(1, 16)}
        settings["packing"] = rng.choice(["tree", "tree", "none"])
        made, alone = plan(items, ranks=ranks, **settings), plan(items, **settings)
        assert step_sets(made) == step_sets(alone), seed
        assert made.rows_per_step % ranks == 0
        assert max(sum(tree_length(tree, items) for tree in row) for step in made.steps for row in step) <= tokens
        for step, conversations_of_step in zip(made.steps, step_sets(made), strict=True):
            shares = [step[rank::ranks] for rank in range(ranks)]
            working = sum(any(share) for share in shares)
            assert working == min(ranks, len(conversations_of_step)), (seed, step)
            # They finish together: no rank has two more rows than another.
            used = [sum(map(bool, share)) for share in shares]
            assert max(used) - min(used) <= 1, (seed, step)
            widest = max(widest, *(len(tree) for row in step for tree in row), 0)
    assert widest > 3


def test_rows_of_a_step_are_balanced() -> None:
    # First-fit alone would make rows of 100 and 60.
    items = [PlanItem(length, 0, -1) for length in (40, 40, 20, 20, 20, 20)]
    made = plan(items, batch_size=6, tokens_per_row=100)
    assert [sum(tree_length(tree, items) for tree in row) for row in made.steps[0]] == [80, 80]


def test_balance_gives_way_where_it_would_overfill_a_row() -> None:
    # Longest first onto the emptiest row makes 13 of a row of 12; first-fit fits.
    items = [PlanItem(length, 0, -1) for length in (6, 6, 4, 4, 4)]
    made = plan(items, batch_size=5, tokens_per_row=12)
    lengths = [sum(tree_length(tree, items) for tree in row) for row in made.steps[0]]
    assert lengths == [12, 12]


def test_evaluation_rows_hold_every_conversation_once_in_whole_trees() -> None:
    items = random_items(4)
    rows = plan_in_order(items, tokens_per_row=4096)
    trees = [tree for row in rows for tree in row]
    assert sorted(index for tree in trees for index in tree) == list(range(len(items)))
    groups = [items[tree[0]].group for tree in trees if items[tree[0]].prefix_length]
    assert len(groups) == len(set(groups))
    assert plan_in_order(items, tokens_per_row=64) == plan_in_order(items, tokens_per_row=64)
    assert plan_in_order([], tokens_per_row=64) == []


def test_k32_the_plan_of_a_seed_stays_what_it_is() -> None:
    # An old checkpoint resumes in the plan of its seed: another order would repeat and drop records.
    items = [PlanItem(PREFIX + 1 + index, PREFIX, index // 3) for index in range(6)] + [PlanItem(3, 0, -1)] * 2
    made = plan(items, batch_size=4, branches_per_tree=2, num_train_epochs=2.0)
    assert made.steps == (
        (((0, 2), (7,), (6,)),),
        (((3, 4), (5,), (1,)),),
        (((3, 4), (2,), (7,)),),
        (((5,), (0, 1), (6,)),),
    )


@pytest.mark.parametrize("seed", range(4))
def test_k32_the_trees_of_an_epoch_come_in_random_order(seed: int) -> None:
    # Two conversations an image, in steps of two: each step is one image, and the images do not come by their number.
    items = [PlanItem(PREFIX + 1, PREFIX, index // 2) for index in range(40)]
    made = plan(items, batch_size=2, seed=seed)
    images = [items[step[0]].group for step in conversations(made)]
    assert sorted(images) == list(range(20))
    assert images != sorted(images)


@pytest.mark.parametrize("seed", range(4))
def test_k32_the_conversations_of_an_image_come_in_random_order(seed: int) -> None:
    items = [PlanItem(PREFIX + 1, PREFIX, 0)] * 20
    order = [
        index for step in conversations(plan(items, branches_per_tree=20, batch_size=20, seed=seed)) for index in step
    ]
    assert sorted(order) == list(range(20))
    assert order != sorted(order)


def test_k32_epochs_of_two_seeds_share_no_order() -> None:
    # Seed and number of the epoch are both in the seed of its shuffle, the first epoch has number 0.
    items = [PlanItem(5, 0, -1) for _ in range(30)]
    orders = [conversations(plan(items, batch_size=30, num_train_epochs=2.0, seed=seed)) for seed in (0, 1)]
    shuffled = [tuple(sorted(range(30), key=step.index)) for steps in orders for step in steps]
    assert len(set(shuffled)) == 4


@pytest.mark.parametrize(("max_steps", "steps"), [(0, 5), (1, 1), (5, 5)])
def test_k32_a_number_of_steps_counts_from_one(max_steps: int, steps: int) -> None:
    assert len(plan(random_items(0), max_steps=max_steps).steps) == steps


def test_k32_evaluation_trees_hold_one_image_each() -> None:
    items = random_items(5)
    for row in plan_in_order(items, tokens_per_row=4096):
        for tree in row:
            assert len({(items[index].group, items[index].prefix_length) for index in tree}) == 1


def test_k32_the_longest_tree_finds_its_row_first() -> None:
    # In the order given, 30 and 30 would share a row, and 60 and 60 need one each.
    items = [PlanItem(length, 0, -1) for length in (30, 30, 60, 60)]
    assert plan(items, batch_size=4, tokens_per_row=90).rows_per_step == 2


def test_k32_rows_are_balanced_longest_first_up_to_the_last_token() -> None:
    # In the order given, rows of 100 and 60 would come out. Rows of exactly 80 tokens are not too long: the fallback,
    # first-fit, would put the two of 40 together.
    items = [PlanItem(length, 0, -1) for length in (20, 20, 20, 40, 20, 40)]
    [step] = plan(items, batch_size=6, tokens_per_row=80).steps
    assert [sorted(items[index].length for tree in row for index in tree) for row in step] == [[20, 20, 40]] * 2


def test_k32_a_fallback_of_too_few_rows_is_filled_up_from_the_fullest() -> None:
    items = [PlanItem(length, 0, -1) for length in (6, 6, 4, 4, 4)]
    trees = [(index,) for index in range(5)]
    fallback = [[(0,)], [(2,), (3,), (1,)], [(4,)]]
    rows = packing._balance(trees, fallback, items, RowSettings(5, 1, ranks=4), 8)
    assert [len(row) for row in rows] == [0, 0, 0, 0, 1, 2, 1, 1]
    assert sorted(tree for row in rows for tree in row) == trees
    assert [len(row) for row in fallback] == [1, 3, 1]


def test_a_fallback_of_single_trees_is_filled_up_with_halves_of_the_widest() -> None:
    # 16 conversations of two images: balanced over two rows, one of them would be too long.
    items = [PlanItem(8, 6, index % 2) for index in range(9)]
    fallback = [[(0, 2, 4, 6, 8)]]
    rows = packing._balance([(0, 2, 4, 6, 8)], fallback, items, RowSettings(10, 1, ranks=3), 3)
    assert sorted(index for row in rows for tree in row for index in tree) == [0, 2, 4, 6, 8]
    assert all(rows)
    assert fallback == [[(0, 2, 4, 6, 8)]]


def first_fit(items: list[PlanItem], tokens_per_row: int) -> list[list[int]]:
    """First-fit decreasing as it is defined, with a look at every row for every conversation."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(items)), key=lambda index: -items[index].length):
        row = next((row for row, free in enumerate(room) if free >= items[index].length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(tokens_per_row)
        rows[row].append(index)
        room[row] -= items[index].length
    return rows


@pytest.mark.parametrize("seed", range(20))
def test_each_conversation_goes_into_the_first_row_with_room(seed: int) -> None:
    rng = random.Random(seed)
    items = [PlanItem(rng.randint(1, 60), 0, -1) for _ in range(rng.randint(0, 70))]
    rows = plan_in_order(items, tokens_per_row=50)
    assert [[index for tree in row for index in tree] for row in rows] == first_fit(items, 50)


def test_rows_of_many_conversations_are_found_without_a_look_at_each() -> None:
    items = [PlanItem(60 + index % 30, 50, index) for index in range(10_000)]
    start = time.process_time()
    assert sum(map(len, plan_in_order(items, tokens_per_row=200))) == 10_000
    assert time.process_time() - start < 5
