"""The lengths that rows are padded to for CUDA graphs, and the memory that graphs take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from transformers import LlavaConfig

from lora_llava.modeling.structure import ElementType

_MOST_LENGTHS = 8
"""Capturing a length takes about as long as five rows, and its graphs some tens of MiB."""
_MOST_PADDING = 0.02
"""Fewer lengths are chosen if they add at most this share of tokens."""
_GRAPHS = 0.6 * 2**30
"""What the driver keeps for the graphs of all lengths: an estimate."""
_BUFFERS = 4
"""Buffers (T, hidden size) for input, output and their gradients."""
_WORKSPACE = (5, 2)
"""Hidden and intermediate widths a token of a layer's backward pass, which graphs hold apart from everything else."""


def choose_lengths(lengths: Sequence[int]) -> list[int]:
    """Choose the lengths to pad rows of `lengths` tokens to, ascending; the longest row is one of them.

    As few as add at most `_MOST_PADDING` tokens, at most `_MOST_LENGTHS`, and of so many those that add the fewest.
    """
    counts = sorted(Counter(lengths).items())
    if not counts:
        return []
    tokens = [length for length, _ in counts]
    before = np.cumsum([0, *(number for _, number in counts)])
    # least[k, n]: tokens of the first n distinct lengths in k groups, each padded to its longest; start of the last.
    least: dict[tuple[int, int], tuple[int, int]] = {(0, 0): (0, 0)}
    for groups in range(1, min(_MOST_LENGTHS, len(tokens)) + 1):
        for end in range(groups, len(tokens) + 1):
            least[groups, end] = min(
                (least[groups - 1, start][0] + int(before[end] - before[start]) * tokens[end - 1], start)
                for start in range(groups - 1, end)
                if (groups - 1, start) in least
            )
        if least[groups, len(tokens)][0] <= (1 + _MOST_PADDING) * sum(lengths):
            break
    chosen, end = [], len(tokens)
    for number in range(groups, 0, -1):
        chosen.append(tokens[end - 1])
        end = least[number, end][1]
    return chosen[::-1]


def graph_bytes(config: LlavaConfig, dtype: ElementType, tokens: int) -> int:
    """Return what the graphs of rows of up to `tokens` tokens take besides what the same rows take without graphs."""
    text, (hidden, mlp) = config.text_config, _WORKSPACE
    widths = (_BUFFERS + hidden) * int(text.hidden_size) + mlp * int(text.intermediate_size)
    return round(_GRAPHS + tokens * widths * dtype.itemsize)
