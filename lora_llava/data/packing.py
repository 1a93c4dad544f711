"""The plan of a stage: which conversations make up which row, micro-batch and optimizer step.

Pure Python, a function of its arguments alone. Words: a *tree* is the conversations of a step that share one
image, and with it one prefix (system text, image tokens); a *row* holds trees back to back and is one
micro-batch; a *step* is one optimizer step.

Contract: every step but an epoch's last holds exactly `batch_size` conversations, the same ones whatever the
packing and the size of a row; every conversation appears once an epoch; every step has the same number of rows, so
that gradient accumulation is the same in each. A step that needs fewer begins with empty ones, which cost nothing;
the others are a multiple of the ranks, so that data-parallel ranks compute side by side, and end together.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lora_llava.recipe.schedule import count_steps

Tree = tuple[int, ...]
"""Indices of conversations that share one prefix."""
Row = tuple[Tree, ...]
"""Trees of one sequence; empty where a step needs fewer rows than another."""
Step = tuple[Row, ...]

Packing = Literal["tree", "none"]


@dataclass(frozen=True, slots=True)
class PlanItem:
    """One conversation as the planner sees it."""

    length: int
    """Tokens of the conversation, prefix included."""
    prefix_length: int
    """Leading tokens that every conversation of the same group shares; 0 if it shares nothing."""
    group: int
    """Number of the image; conversations with another group never share a prefix."""


@dataclass(frozen=True, slots=True)
class Plan:
    """All steps of a stage, and what they cost."""

    steps: tuple[Step, ...]
    rows_per_step: int
    num_conversations: int
    num_computed_tokens: int
    """Tokens that pass through the model."""
    num_separate_tokens: int
    """Tokens that would, with every conversation in a row of its own."""

    @property
    def share_saved(self) -> float:
        """Share of the separate tokens that packing does not compute, 0 to 1."""
        return 1.0 - self.num_computed_tokens / self.num_separate_tokens if self.num_separate_tokens else 0.0


def tree_length(tree: Tree, items: Sequence[PlanItem]) -> int:
    """Tokens of a tree: its prefix once, then each conversation's own tokens."""
    prefix = items[tree[0]].prefix_length
    return prefix + sum(items[index].length - prefix for index in tree)


def make_plan(
    items: Sequence[PlanItem],
    *,
    batch_size: int,
    tokens_per_row: int,
    branches_per_tree: int,
    packing: Packing,
    num_train_epochs: float,
    max_steps: int,
    seed: int,
    ranks: int = 1,
) -> Plan:
    """Plan every step of a stage; row r of a step is that of rank r modulo `ranks`.

    Raises ValueError if a conversation alone is longer than `tokens_per_row`, or a step has fewer conversations
    than there are ranks.
    """
    for index, item in enumerate(items):
        if item.length > tokens_per_row:
            raise ValueError(f"conversation {index} has {item.length} tokens, a row holds {tokens_per_row}")
    steps_wanted = count_steps(len(items), batch_size, num_train_epochs, max_steps)
    batches: list[list[Tree]] = []
    epoch = 0
    while len(batches) < steps_wanted:
        batches.extend(_batches(_epoch_trees(items, branches_per_tree, f"{seed}/{epoch}"), batch_size))
        epoch += 1
    # Only now: which conversations make up a step must not depend on how they are packed.
    batches = [_cut(batch, items, packing, tokens_per_row) for batch in batches[:steps_wanted]]
    separate = packing == "none"
    packed = [[[tree] for tree in batch] if separate else _first_fit(batch, items, tokens_per_row) for batch in batches]
    rows_per_step = max(_whole_multiple(len(rows), ranks) for rows in packed)
    steps = tuple(
        _balance(batch, rows, items, ranks, rows_per_step, tokens_per_row)
        for batch, rows in zip(batches, packed, strict=True)
    )
    used = [index for batch in batches for tree in batch for index in tree]
    return Plan(
        steps=steps,
        rows_per_step=rows_per_step,
        num_conversations=len(used),
        num_computed_tokens=sum(tree_length(tree, items) for batch in batches for tree in batch),
        num_separate_tokens=sum(items[index].length for index in used),
    )


def plan_in_order(items: Sequence[PlanItem], *, tokens_per_row: int) -> list[Row]:
    """Rows for evaluation: every conversation once, trees whole where a row holds them, no shuffling."""
    groups: dict[int, list[int]] = {}
    alone: list[Tree] = []
    for index, item in enumerate(items):
        if item.prefix_length:
            groups.setdefault(item.group, []).append(index)
        else:
            alone.append((index,))
    trees = [tree for members in groups.values() for tree in _chunks(members, items, tokens_per_row)]
    return [tuple(row) for row in _first_fit(trees + alone, items, tokens_per_row)]


def _epoch_trees(items: Sequence[PlanItem], branches_per_tree: int, seed: str) -> list[Tree]:
    """Put an epoch's conversations in a random order in which those of one image, up to a number, stay together."""
    rng = random.Random(seed)
    groups: dict[int, list[int]] = {}
    trees: list[Tree] = []
    for index, item in enumerate(items):
        if item.prefix_length:
            groups.setdefault(item.group, []).append(index)
        else:
            trees.append((index,))
    for members in groups.values():
        rng.shuffle(members)
        trees += [
            tuple(members[start : start + branches_per_tree]) for start in range(0, len(members), branches_per_tree)
        ]
    rng.shuffle(trees)
    return trees


def _cut(trees: Sequence[Tree], items: Sequence[PlanItem], packing: Packing, tokens_per_row: int) -> list[Tree]:
    """Cut a step's trees as far as needed: to single conversations without packing, else until each fits a row."""
    if packing == "none":
        return [(index,) for tree in trees for index in tree]
    return [part for tree in trees for part in _chunks(tree, items, tokens_per_row)]


def _chunks(members: Sequence[int], items: Sequence[PlanItem], tokens_per_row: int) -> Iterator[Tree]:
    """Cut one image's conversations into trees that fit a row."""
    tree: list[int] = []
    length = 0
    for index in members:
        own = items[index].length - items[index].prefix_length
        if tree and length + own > tokens_per_row:
            yield tuple(tree)
            tree = []
        length = (length if tree else items[index].prefix_length) + own
        tree.append(index)
    if tree:
        yield tuple(tree)


def _batches(trees: Sequence[Tree], batch_size: int) -> Iterator[list[Tree]]:
    """Group trees into batches of exactly `batch_size` conversations, cutting the tree that crosses the border."""
    batch: list[Tree] = []
    room = batch_size
    for tree in trees:
        rest = tree
        while rest:
            batch.append(rest[:room])
            room -= len(batch[-1])
            rest = rest[len(batch[-1]) :]
            if room == 0:
                yield batch
                batch, room = [], batch_size
    if batch:
        yield batch


def _first_fit(trees: Sequence[Tree], items: Sequence[PlanItem], tokens_per_row: int) -> list[list[Tree]]:
    """First-fit decreasing: the longest tree first, each into the first row with room."""
    rows: list[list[Tree]] = []
    room: list[int] = []
    for tree in sorted(trees, key=lambda tree: -tree_length(tree, items)):
        length = tree_length(tree, items)
        place = next((row for row, free in enumerate(room) if free >= length), None)
        if place is None:
            rows.append([])
            room.append(tokens_per_row)
            place = len(rows) - 1
        rows[place].append(tree)
        room[place] -= length
    return rows


def _whole_multiple(count: int, ranks: int) -> int:
    return -(-count // ranks) * ranks


def _balance(
    trees: Sequence[Tree],
    fallback: list[list[Tree]],
    items: Sequence[PlanItem],
    ranks: int,
    rows_per_step: int,
    tokens_per_row: int,
) -> Step:
    """Spread a step's trees over as many rows of like length as `fallback` has; or take it, if that overfills one."""
    num_rows = _whole_multiple(len(fallback), ranks)
    if len(trees) < num_rows:
        trees = [(index,) for tree in trees for index in tree]
    if len(trees) < num_rows:
        raise ValueError(f"a step of {len(trees)} conversations leaves some of {ranks} processes nothing to do")
    rows: list[list[Tree]] = [[] for _ in range(num_rows)]
    heap = [(0, row) for row in range(num_rows)]
    for tree in sorted(trees, key=lambda tree: -tree_length(tree, items)):
        filled, row = heapq.heappop(heap)
        rows[row].append(tree)
        heapq.heappush(heap, (filled + tree_length(tree, items), row))
    if max(filled for filled, _ in heap) > tokens_per_row:
        rows = [list(row) for row in fallback]
        while len(rows) < num_rows:
            rows.append([max(rows, key=len).pop()])
    empty: list[Row] = [()] * (rows_per_step - num_rows)
    return (*empty, *(tuple(row) for row in rows))
