"""The plan of a stage: which conversations form each row (micro-batch) and each optimizer step.

Pure Python, and a function of its arguments alone. Terms: a *tree* is the conversations of a step about one image;
they share one prefix (system prompt, image tokens). A *row* holds trees end to end and is one micro-batch. A *step*
is one optimizer step.

Contract: every step except the last of an epoch holds exactly `batch_size` conversations, and the same ones for any
packing and row length. Every conversation appears once per epoch. Every step has the same number of rows, so
gradient accumulation is constant; a step that needs fewer starts with empty rows, which cost nothing. The number of
its other rows is a multiple of the ranks, so data-parallel ranks work in parallel and finish together; if it has fewer
conversations than that, the last ranks have an empty row at its end.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count, islice
from typing import Literal

import numpy as np
import numpy.typing as npt

Tree = tuple[int, ...]
"""Indices of conversations that share one prefix."""
Row = tuple[Tree, ...]
"""Trees of one sequence; empty where a step needs fewer rows than another."""
Step = tuple[Row, ...]

Packing = Literal["tree", "none"]

_SAMPLED_STEPS = 32
"""Steps whose rows are counted to choose a row length."""


@dataclass(frozen=True, slots=True)
class PlanItem:
    """One conversation as the planner sees it."""

    length: int
    """Tokens of the conversation, prefix included."""
    prefix_length: int
    """Leading tokens that every conversation of the same group shares; 0 if it shares none."""
    group: int
    """Number of the image; conversations of different groups never share a prefix."""
    shared: int = 0
    """Of a pair, which is one item and never cut apart: the tokens of both its conversations that `length` has once."""


@dataclass(frozen=True, slots=True)
class RowSettings:
    """How the conversations of a step become rows."""

    tokens: int
    """Maximum length of a row."""
    branches_per_tree: int
    """Maximum number of conversations about one image that stay together in the order of an epoch."""
    packing: Packing = "tree"
    """`none`: each conversation is a tree by itself."""
    ranks: int = 1
    """Data-parallel processes; row r of a step belongs to rank r modulo `ranks`."""


@dataclass(frozen=True, slots=True)
class Plan:
    """All steps of a stage, and what they cost."""

    steps: tuple[Step, ...]
    rows_per_step: int
    num_conversations: int
    num_computed_tokens: int
    """Tokens that pass through the model."""
    num_separate_tokens: int
    """Tokens that would pass through it with one row per conversation."""

    @property
    def share_saved(self) -> float:
        """Fraction of the separate tokens that packing does not compute, 0 to 1."""
        return 1.0 - self.num_computed_tokens / self.num_separate_tokens if self.num_separate_tokens else 0.0


@dataclass(frozen=True, slots=True)
class SampledSteps:
    """The first steps of a plan, whose rows can be counted for any row length."""

    row_lengths: Callable[[int], npt.NDArray[np.int64]]
    """Maps the maximum length of a row to the tokens of each row, (steps, rows per step); 0 for an empty row."""
    num_separate_tokens: int
    """Tokens of the steps' conversations, unpacked."""
    ranks: int = 1
    """Data-parallel processes; row r of a step belongs to rank r modulo `ranks`."""


def conversations(rows: Iterable[Row]) -> Iterator[int]:
    """Yield the indices of the conversations in rows, such as those of a step."""
    return (index for row in rows for tree in row for index in tree)


def tree_length(tree: Sequence[int], items: Sequence[PlanItem]) -> int:
    """Count the tokens of a tree: its prefix once, then the remaining tokens of each conversation."""
    prefix = items[tree[0]].prefix_length
    return prefix + sum(items[index].length - prefix for index in tree)


def row_length(row: Row, items: Sequence[PlanItem]) -> int:
    """Count the tokens of a row, which a step computes; 0 for a row that only pads a step."""
    return sum(tree_length(tree, items) for tree in row)


def make_plan(items: Sequence[PlanItem], settings: RowSettings, *, batch_size: int, num_steps: int, seed: int) -> Plan:
    """Plan every step of a stage.

    Raises ValueError if a single conversation is longer than a row.
    """
    for index, item in enumerate(items):
        if item.length > settings.tokens:
            raise ValueError(f"conversation {index} has {item.length} tokens, a row holds {settings.tokens}")

    batches = list(islice(_all_batches(items, settings.branches_per_tree, batch_size, seed), num_steps))
    steps = _pack(batches, items, settings)
    used = [index for step in steps for index in conversations(step)]
    return Plan(
        steps=steps,
        rows_per_step=len(steps[0]),
        num_conversations=len(used),
        num_computed_tokens=sum(row_length(row, items) for step in steps for row in step),
        num_separate_tokens=sum(items[index].length + items[index].shared for index in used),
    )


def sample_steps(
    items: Sequence[PlanItem], settings: RowSettings, *, batch_size: int, num_steps: int, seed: int
) -> SampledSteps:
    """Return the first steps of the plan that `make_plan` makes, to count their rows; `settings.tokens` is not used."""
    sampled = min(num_steps, _SAMPLED_STEPS)
    batches = list(islice(_all_batches(items, settings.branches_per_tree, batch_size, seed), sampled))

    @cache
    def row_lengths(tokens: int) -> npt.NDArray[np.int64]:
        steps = _pack(batches, items, replace(settings, tokens=tokens))
        lengths = [[row_length(row, items) for row in step] for step in steps]
        return np.array(lengths, dtype=np.int64)

    used = [index for batch in batches for tree in batch for index in tree]
    separate = sum(items[index].length + items[index].shared for index in used)
    return SampledSteps(row_lengths, separate, settings.ranks)


def plan_in_order(items: Sequence[PlanItem], *, tokens_per_row: int, indices: Sequence[int] | None = None) -> list[Row]:
    """Return rows for evaluation: every conversation once, no shuffling; a tree is split only if a row is too short.

    `indices`: those by which the rows name the conversations of `items`; None: their positions.
    """
    groups, single = _by_image(items)
    trees = [tree for members in groups for tree in _trees_that_fit(members, items, tokens_per_row)]
    rows = [tuple(row) for row in _first_fit(trees + single, items, tokens_per_row)]
    if indices is None:
        return rows
    return [tuple(tuple(indices[index] for index in tree) for tree in row) for row in rows]


def _by_image(items: Sequence[PlanItem]) -> tuple[list[list[int]], list[Tree]]:
    """Group the conversations that share a prefix by their image; return the others as trees of one."""
    groups: dict[int, list[int]] = {}
    single: list[Tree] = []
    for index, item in enumerate(items):
        if item.prefix_length:
            groups.setdefault(item.group, []).append(index)
        else:
            single.append((index,))
    return list(groups.values()), single


def _all_batches(items: Sequence[PlanItem], branches_per_tree: int, batch_size: int, seed: int) -> Iterator[list[Tree]]:
    """Yield the batches of epoch after epoch, each epoch in a new order, without end."""
    for epoch in count():
        yield from _batches(_epoch_trees(items, branches_per_tree, f"{seed}/{epoch}"), batch_size)


def _pack(batches: Sequence[list[Tree]], items: Sequence[PlanItem], settings: RowSettings) -> tuple[Step, ...]:
    """Pack each batch into the fewest rows, of similar length; all steps get as many rows as the largest."""
    # Trees that fit a row. Only now: the conversations of a step must not depend on how they are packed.
    batches = [_split_trees(batch, items, settings) for batch in batches]
    if settings.packing == "none":
        packed = [[[tree] for tree in batch] for batch in batches]
    else:
        packed = [_first_fit(batch, items, settings.tokens) for batch in batches]
    rows_per_step = max(_round_up(len(rows), settings.ranks) for rows in packed)
    return tuple(
        _balance(batch, rows, items, settings, rows_per_step) for batch, rows in zip(batches, packed, strict=True)
    )


def _epoch_trees(items: Sequence[PlanItem], branches_per_tree: int, seed: str) -> list[Tree]:
    """Shuffle an epoch's conversations, keeping up to `branches_per_tree` about one image together."""
    rng = random.Random(seed)
    groups, trees = _by_image(items)
    for members in groups:
        rng.shuffle(members)
        trees += [
            tuple(members[start : start + branches_per_tree]) for start in range(0, len(members), branches_per_tree)
        ]
    rng.shuffle(trees)
    return trees


def _batches(trees: Sequence[Tree], batch_size: int) -> Iterator[list[Tree]]:
    """Group trees into batches of exactly `batch_size` conversations; a tree that crosses the boundary is split."""
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


def _split_trees(trees: Sequence[Tree], items: Sequence[PlanItem], settings: RowSettings) -> list[Tree]:
    """Split a step's trees: into single conversations without packing, else only until each fits a row."""
    if settings.packing == "none":
        return [(index,) for tree in trees for index in tree]
    return [part for tree in trees for part in _trees_that_fit(tree, items, settings.tokens)]


def _trees_that_fit(members: Sequence[int], items: Sequence[PlanItem], tokens_per_row: int) -> Iterator[Tree]:
    """Split one image's conversations into trees that fit a row; each tree repeats the prefix."""
    tree: list[int] = []
    length = 0
    for index in members:
        branch_length = items[index].length - items[index].prefix_length
        if tree and length + branch_length > tokens_per_row:
            yield tuple(tree)
            tree = []
        length = (length if tree else items[index].prefix_length) + branch_length
        tree.append(index)
    if tree:
        yield tuple(tree)


def _longest_first(trees: Sequence[Tree], items: Sequence[PlanItem]) -> list[Tree]:
    return sorted(trees, key=lambda tree: -tree_length(tree, items))


def _first_fit(trees: Sequence[Tree], items: Sequence[PlanItem], tokens_per_row: int) -> list[list[Tree]]:
    """Pack trees into few rows by first-fit decreasing: longest tree first, each into the first row with room."""
    rows: list[list[Tree]] = []
    # A binary tree over as many rows as there may be: `room[node]` is the most room of a row below the node, whose
    # children are 2 node and 2 node + 1. The first row with room is found without a look at every row.
    leaves = 1 << max(0, len(trees) - 1).bit_length()
    room = [tokens_per_row] * (2 * leaves)
    for tree in _longest_first(trees, items):
        length = min(tree_length(tree, items), tokens_per_row)
        node = 1
        while node < leaves:
            node *= 2
            node += room[node] < length
        if node - leaves == len(rows):
            rows.append([])
        rows[node - leaves].append(tree)
        room[node] -= length
        while node := node // 2:
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _balance(
    trees: Sequence[Tree],
    fallback: list[list[Tree]],
    items: Sequence[PlanItem],
    settings: RowSettings,
    rows_per_step: int,
) -> Step:
    """Spread a step's trees over as many rows as `fallback` has, of similar length; fall back if one overflows."""
    # Every rank gets the same number of rows, none of them empty: split trees if there are too few.
    num_rows = _round_up(len(fallback), settings.ranks)
    if len(trees) < num_rows:
        trees = [(index,) for tree in trees for index in tree]
    num_used = min(num_rows, len(trees))

    # Longest tree first, each into the row that is shortest so far.
    rows: list[list[Tree]] = [[] for _ in range(num_used)]
    heap = [(0, row) for row in range(num_used)]
    for tree in _longest_first(trees, items):
        filled, row = heapq.heappop(heap)
        rows[row].append(tree)
        heapq.heappush(heap, (filled + tree_length(tree, items), row))

    # A row overflows: take the first-fit rows, and move trees to the rows that the ranks still lack.
    if max(filled for filled, _ in heap) > settings.tokens:
        rows = [list(row) for row in fallback]
        while len(rows) < num_used:
            rows.append([_take_tree(rows)])

    # Empty rows come first; those of the ranks that a small step has no conversation for come last.
    empty: list[Row] = [()] * (rows_per_step - num_rows)
    idle: list[Row] = [()] * (num_rows - num_used)
    return (*empty, *(tuple(row) for row in rows), *idle)


def _take_tree(rows: list[list[Tree]]) -> Tree:
    """Take a tree from the row that has most of them; if each has one, take half of the widest."""
    most = max(rows, key=len)
    if len(most) > 1:
        return most.pop()
    widest = max(rows, key=lambda row: len(row[0]))
    tree = widest[0]
    widest[0] = tree[: len(tree) // 2]
    return tree[len(tree) // 2 :]
