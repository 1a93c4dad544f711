"""Attention within the trees of a row on a CPU: each branch with its prefix and with itself, never with another branch.

A mask over all branches would compute every branch against every other, and read as many numbers as it computes. Here
a branch's attention to its prefix and to itself are two calls of PyTorch's kernel, joined by their log-sum-exps:

    o = o1 exp(l1 - l) + o2 exp(l2 - l),  l = log(exp(l1) + exp(l2))

PyTorch's causal kernel computes up to 512 keys for a query and drops those that it must not see, nearly the whole
square of an image's prefix. So a long causal sequence is cut into blocks of queries, each with the keys up to its end.

The backward kernel computes the probabilities from the log-sum-exp that it is given. Given the joined output and l, it
returns each part's share of the gradients (as in ring attention, Liu, Zaharia and Abbeel 2023).

Shapes: H heads, T tokens of the row, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch.autograd.function import once_differentiable

_BLOCK = 100
"""Fewest queries of a block of a causal sequence: with fewer, a call costs more than it saves."""


@dataclass(frozen=True, slots=True)
class _Block:
    """Queries of a causal sequence that attend in one call of the kernel, as positions of the row."""

    queries: slice
    keys: slice
    mask: torch.Tensor | None
    """Additive mask (1, 1, queries, keys); None: queries and keys are the same, and the kernel masks them itself."""


@dataclass(frozen=True)
class Spans:
    """Where a tree and its branches are in a row."""

    start: int
    prefix: int
    """Tokens of the prefix; 0 only for a tree of one branch."""
    branches: tuple[int, ...]
    """Tokens of each branch."""
    dtype: torch.dtype
    """What attention computes in."""

    @cached_property
    def blocks(self) -> list[_Block]:
        """Blocks of `causal`, whose masks all layers share."""
        start, length = self.causal.start, self.causal.stop - self.causal.start
        count = max(1, length // _BLOCK)
        ends = [length * number // count for number in range(count + 1)]
        return [
            _Block(
                slice(start + begin, start + end),
                slice(start, start + end),
                torch.full((end - begin, end), -torch.inf, dtype=self.dtype).triu_(begin + 1)[None, None]
                if begin
                else None,
            )
            for begin, end in pairwise(ends)
        ]

    @cached_property
    def is_single(self) -> bool:
        """Whether the tree is one causal sequence."""
        return len(self.branches) == 1

    @cached_property
    def causal(self) -> slice:
        """Positions of the prefix, and of the branch if it is the only one."""
        return slice(self.start, self.start + self.prefix + (self.branches[0] if self.is_single else 0))

    @cached_property
    def rest(self) -> slice:
        """Positions of all branches after the prefix."""
        start = self.start + self.prefix
        return slice(start, start + sum(self.branches))

    def each(self) -> Iterator[tuple[slice, slice]]:
        """Yield the positions of each branch, in the row and in `rest`."""
        start = 0
        for length in self.branches:
            yield slice(self.rest.start + start, self.rest.start + start + length), slice(start, start + length)
            start += length


def spans_of(segments: torch.Tensor, tree_spans: Sequence[Sequence[int]], dtype: torch.dtype) -> list[Spans] | None:
    """Return the spans of a row's trees; None if one of them has branches without a prefix.

    `segments` (2, T), on the CPU, and `tree_spans` (trees, 3) as `data.rows.lay_out` makes them.
    """
    trees = []
    for start, _, end in tree_spans:
        prefix, *branches = torch.bincount(segments[1, start:end]).tolist()
        if not prefix and len(branches) > 1:
            return None
        # A branch may have nothing after the prefix.
        trees.append(Spans(start, prefix, tuple(length for length in branches if length), dtype))
    return trees


class _TreeAttention(torch.autograd.Function):
    """Compute the output (1, H, T, D) from query, key and value (1, H, T, D)."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, trees: Sequence[Spans], scale: float
    ) -> torch.Tensor:
        """`scale` multiplies the products of queries and keys."""
        output = torch.empty_like(query)
        sums: list[torch.Tensor] = []

        def attend(
            queries: slice, keys: slice, mask: torch.Tensor | None = None, *, causal: bool
        ) -> tuple[torch.Tensor, torch.Tensor]:
            parts = query[:, :, queries], key[:, :, keys], value[:, :, keys]
            attended, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *parts, 0.0, causal, attn_mask=mask, scale=scale
            )
            return attended, log_sum

        for tree in trees:
            for block in tree.blocks:
                output[:, :, block.queries], log_sum = attend(
                    block.queries, block.keys, block.mask, causal=block.mask is None
                )
                sums.append(log_sum)
            if tree.is_single:
                continue
            to_prefix, prefix_sum = attend(tree.rest, tree.causal, causal=False)
            within = [attend(branch, branch, causal=True) for branch, _ in tree.each()]
            to_itself, own_sum = (torch.cat(tensors, dim=2) for tensors in zip(*within, strict=True))
            share = torch.sigmoid(own_sum - prefix_sum).to(query.dtype).unsqueeze(-1)
            output[:, :, tree.rest] = torch.lerp(to_prefix, to_itself, share)
            sums.append(torch.logaddexp(prefix_sum, own_sum))
        ctx.trees, ctx.scale = trees, scale
        ctx.save_for_backward(query, key, value, output, *sums)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: torch.Tensor) -> Any:
        """Return the gradients of query, key and value."""
        query, key, value, output, *sums = ctx.saved_tensors
        d_query, d_key, d_value = (torch.empty_like(tensor) for tensor in (query, key, value))

        def gradients(
            queries: slice, keys: slice, log_sum: torch.Tensor, mask: torch.Tensor | None = None, *, causal: bool
        ) -> Any:
            parts = d_output[:, :, queries], query[:, :, queries], key[:, :, keys], value[:, :, keys]
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *parts, output[:, :, queries], log_sum, 0.0, causal, attn_mask=mask, scale=ctx.scale
            )

        log_sums = iter(sums)
        for tree in ctx.trees:
            # The last block sees all keys, so its gradients are the first of each key.
            block_sums = [next(log_sums) for _ in tree.blocks]
            for block, log_sum in zip(reversed(tree.blocks), reversed(block_sums), strict=True):
                is_first = block is tree.blocks[-1]
                d_query[:, :, block.queries], *d_keys_values = gradients(
                    block.queries, block.keys, log_sum, block.mask, causal=block.mask is None
                )
                _add_at(block.keys, (d_key, d_value), d_keys_values, is_first=is_first)
            if not tree.is_single:
                log_sum = next(log_sums)
                d_query[:, :, tree.rest], *d_keys_values = gradients(tree.rest, tree.causal, log_sum, causal=False)
                _add_at(tree.causal, (d_key, d_value), d_keys_values)
                for branch, within in tree.each():
                    own, *d_keys_values = gradients(branch, branch, log_sum[:, :, within], causal=True)
                    d_query[:, :, branch] += own
                    _add_at(branch, (d_key, d_value), d_keys_values, is_first=True)
        return d_query, d_key, d_value, None, None


def _add_at(
    positions: slice, totals: Sequence[torch.Tensor], parts: Sequence[torch.Tensor], *, is_first: bool = False
) -> None:
    """Add `parts` to `totals` (1, H, T, D) at `positions`; the first ones are written over what is there."""
    for total, part in zip(totals, parts, strict=True):
        if is_first:
            total[:, :, positions] = part
        else:
            total[:, :, positions] += part


attend_in_trees: Callable[..., torch.Tensor] = _TreeAttention.apply
