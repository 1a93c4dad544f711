"""Prompts, their batches, and the layout in which a batch is prefilled.

Shapes: R prompts of a batch, N tokens that are computed for it, P tokens of its longest prompt.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from lora_llava.modeling.attention import Tree

_MAX_TREE = 4096
"""Maximum number of tokens that share one dense mask: in bf16 32 MiB."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A tokenized prompt and its image."""

    input_ids: list[int]
    prefix_length: int
    """Tokens that all prompts about this image share, image tokens included; 0 if none."""
    pixel_values: torch.Tensor | Callable[[], torch.Tensor] | None
    """(3, H, W), or a function that returns it; None for a prompt without an image."""
    group: Hashable
    """Key of the image; prompts with equal keys and prefix tokens share one image."""

    @property
    def shared(self) -> int:
        """Tokens to prefill once per image; 0 if there is no image, or no token after the prefix."""
        # The forward pass needs a token to predict from; under the plain template a prompt may be its prefix alone.
        return self.prefix_length if self.pixel_values is not None and self.prefix_length < len(self.input_ids) else 0

    def pixels(self) -> torch.Tensor:
        """Return the image, (3, H, W)."""
        if self.pixel_values is None:
            raise ValueError("this prompt has no image")
        return self.pixel_values() if callable(self.pixel_values) else self.pixel_values


def plan_batches(prompts: Sequence[Prompt], max_rows: int) -> list[list[int]]:
    """Group prompt indices into batches of at most `max_rows` that share one prefix.

    Prompts about one image stay together, unless there are more than `max_rows` of them. Prompts without a shared
    prefix are batched by length, to keep padding low.
    """
    by_prefix: dict[tuple[int, ...], dict[Hashable, list[int]]] = defaultdict(lambda: defaultdict(list))
    unshared: list[int] = []
    for index, prompt in enumerate(prompts):
        if prompt.shared:
            by_prefix[tuple(prompt.input_ids[: prompt.shared])][prompt.group].append(index)
        else:
            unshared.append(index)
    batches: list[list[int]] = []
    for groups in by_prefix.values():
        room = 0
        for group in groups.values():
            for start in range(0, len(group), max_rows):
                part = group[start : start + max_rows]
                if len(part) > room:
                    batches.append([])
                    room = max_rows
                batches[-1].extend(part)
                room -= len(part)
    unshared.sort(key=lambda index: len(prompts[index].input_ids))
    batches.extend(unshared[start : start + max_rows] for start in range(0, len(unshared), max_rows))
    return batches


@dataclass(frozen=True, slots=True)
class _PackedPrompts:
    """A batch of prompts as one sequence: tries of tokens end to end, one for the prompts about one image.

    A token that prompts begin with in common is in the sequence once. It attends to the tokens before it in its prompt.
    """

    input_ids: list[int]
    """(N,)"""
    positions: list[int]
    """(N,): of each token in its prompt."""
    trees: list[Tree]
    paths: list[list[int]]
    """Of each prompt: the index of each of its tokens in the sequence."""
    image_prompts: list[Prompt]
    """Prompts whose images the image tokens stand for, in the order of the sequence."""


def pack_prompts(
    prompts: Sequence[Prompt], image_token_id: int, dtype: torch.dtype, device: torch.device
) -> _PackedPrompts:
    """Lay out `prompts` for one forward pass; `dtype` and `device` are those of the attention masks."""
    packed = _PackedPrompts([], [], [], [[] for _ in prompts], [])
    by_image: dict[Hashable, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        # Text without an image has hardly a token in common, and a mask over all of it would be large.
        by_image[("text", index) if prompt.pixel_values is None else ("image", prompt.group)].append(index)
    for indices in by_image.values():
        trie = _Trie(len(packed.input_ids))
        for index in indices:
            ids = prompts[index].input_ids
            if trie.parents and len(trie.parents) + len(ids) > _MAX_TREE:
                _close(packed, trie, dtype, device)
                trie = _Trie(len(packed.input_ids))
            added, packed.paths[index] = trie.add(ids)
            packed.input_ids.extend(ids[len(ids) - added :])
            packed.positions.extend(range(len(ids) - added, len(ids)))
            if prompts[index].pixel_values is not None and image_token_id in ids[len(ids) - added :]:
                packed.image_prompts.append(prompts[index])
        _close(packed, trie, dtype, device)
    return packed


@dataclass(slots=True)
class _Trie:
    """Tokens of prompts that begin alike, numbered from `start` in the order in which they are added."""

    start: int
    parents: list[int] = field(default_factory=list)
    """Index of the token before each token; -1 for a first one."""
    children: dict[tuple[int, int], int] = field(default_factory=dict)
    """Index of a token by the index of the one before it and by its id."""
    first_length: int = 0
    """Tokens of the first prompt."""

    def add(self, ids: Sequence[int]) -> tuple[int, list[int]]:
        """Add a prompt; return how many of its tokens are new, and the indices of all of them."""
        path, last, added = [], -1, 0
        for token in ids:
            node = self.children.get((last, token))
            if node is None:
                node = self.start + len(self.parents)
                self.children[last, token] = node
                self.parents.append(last)
                added += 1
            path.append(node)
            last = node
        self.first_length = self.first_length or len(ids)
        return added, path


def _close(packed: _PackedPrompts, trie: _Trie, dtype: torch.dtype, device: torch.device) -> None:
    """Add the attention of a finished trie: causal for its first prompt, with a mask for all later tokens."""
    length, causal = len(trie.parents), trie.first_length
    seen = np.zeros((length - causal, length), dtype=np.bool_)
    for row, parent in enumerate(trie.parents[causal:]):
        before = parent - trie.start if parent >= 0 else -1
        if before >= causal:
            seen[row] = seen[before - causal]
        else:
            seen[row, : before + 1] = True
        seen[row, causal + row] = True
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~torch.from_numpy(seen), -torch.inf)
    packed.trees.append(Tree(length, causal, mask[None, None].to(device)))
