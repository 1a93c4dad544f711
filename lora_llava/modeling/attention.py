"""Who sees whom in a packed row, in the form that the language model's attention takes.

Three mistakes here would train a wrong model without a word (relative error of the gradients measured on a small
random model): a bool mask with eager attention, which adds it (0.73); tree positions without a mask, from which
transformers guesses a packing of its own (1.08); the right mask with linear positions (0.044). So the mask of SDPA is
written as what is added, which is right for every attention that takes one, and mask and positions are always given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lora_llava.modeling.structure import FLEX, SDPA, TREES, Attention

BLOCK = 128
"""Side of a block of FlexAttention's mask; rows are filled up to a multiple of it."""
NO_TREE = -1
"""Tree number of the tokens that fill a row up: nothing else sees them."""


def additive_mask(
    segments: torch.Tensor, dtype: torch.dtype, queries: torch.Tensor | slice = slice(None)
) -> torch.Tensor:
    """Write who sees whom as what is added to attention's scores (1, 1, queries, T): 0, or minus infinity.

    `segments` (2, T) as `data.batch.build_row` makes them; `queries`: the places that see, all if not given. Made once
    for all layers: of a bool mask SDPA would make, and keep for the backward pass, such a copy in each.
    """
    places = torch.arange(segments.shape[1], device=segments.device)
    seen = _sees(segments)(places[queries, None], places[None, :])
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
    return mask[None, None]


def block_mask(segments: torch.Tensor) -> BlockMask:
    """Write who sees whom for FlexAttention; `segments` as in `additive_mask`."""
    sees, length = _sees(segments), segments.shape[1]
    return create_block_mask(
        lambda _batch, _head, query, key: sees(query, key),
        None,
        None,
        length,
        length,
        device=segments.device,
        BLOCK_SIZE=BLOCK,
    )


def _sees(segments: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Tell, for places of a query and a key, whether the one sees the other.

    It sees the earlier tokens of its own conversation and of its tree's prefix (branch 0).
    """
    tree, branch = segments

    def sees(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        shared = (branch[key] == 0) | (branch[query] == branch[key])
        seen: torch.Tensor = (tree[query] == tree[key]) & shared & (query >= key)
        return seen

    return sees


def masked_inputs(batch: Mapping[str, torch.Tensor], attention: Attention, dtype: torch.dtype) -> dict[str, Any]:
    """Return what the model takes of a row, mask and positions in the form of `attention`.

    An attention that is none of ours gets a dense mask, which all understand.
    """
    ids, positions, segments = batch["input_ids"], batch["position_ids"], batch["segments"]
    if attention == TREES:
        places = batch["predicting_places"]
        return {
            "input_ids": ids,
            "position_ids": positions,
            # Of plain text, so that transformers neither guesses a packing from the positions nor makes a mask.
            "attention_mask": torch.ones_like(ids),
            "trees": as_trees(batch["tree_spans"].tolist(), segments, dtype),
            "at_the_end": Queries(places, additive_mask(segments, dtype, places)),
        }
    if attention == FLEX:
        room = (0, -segments.shape[1] % BLOCK)
        # Id 0 is no image's place, whose id is the last of a vocabulary.
        ids, positions = F.pad(ids, room), F.pad(positions, room)
        return {
            "input_ids": ids,
            "position_ids": positions,
            "attention_mask": block_mask(F.pad(segments, room, value=NO_TREE)),
        }
    return {"input_ids": ids, "position_ids": positions, "attention_mask": additive_mask(segments, dtype)}


@dataclass(frozen=True, slots=True)
class Tree:
    """One tree of a row, as attention sees it."""

    length: int
    plain: int
    """Leading tokens that are plain text: the prefix and the first branch."""
    mask: torch.Tensor
    """What is added to the scores of the tokens after those (1, 1, length - plain, length)."""


@dataclass(frozen=True, slots=True)
class Queries:
    """The places of a row whose attention the last layer needs; see `modeling.last_layer`."""

    places: torch.Tensor
    mask: torch.Tensor
    """What is added to their scores (1, 1, places, T)."""


def as_trees(spans: Sequence[Sequence[int]], segments: torch.Tensor, dtype: torch.dtype) -> list[Tree]:
    """Make the trees of a row; `spans` and `segments` as in `data.batch.build_row`."""
    return [
        Tree(end - start, plain - start, additive_mask(segments[:, start:end], dtype, slice(plain - start, None)))
        for start, plain, end in spans
    ]


def attend_by_tree(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _attention_mask: torch.Tensor | None,
    *,
    trees: list[Tree],
    scaling: float,
    at_the_end: Queries | None = None,
    **_others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each tree of a row: as to plain text up to the end of its first branch, by a mask after that.

    `query`, `key`, `value` (1, heads, T, width), as transformers' attention functions take them; returns
    (1, T, heads, width), of the last layer zeros but `at_the_end`. Nothing is computed from tree to tree, and SDPA's
    causal kernels do the longest part.
    """
    key, value = (repeat_kv(tensor, module.num_key_value_groups) for tensor in (key, value))
    attend = partial(F.scaled_dot_product_attention, scale=scaling)
    if at_the_end is not None and module.layer_idx == module.config.num_hidden_layers - 1:
        few = attend(query.index_select(2, at_the_end.places), key, value, attn_mask=at_the_end.mask)
        return torch.zeros_like(query).index_copy(2, at_the_end.places, few).transpose(1, 2), None
    lengths = [tree.length for tree in trees]
    outputs: list[torch.Tensor] = []
    for tree, own, keys, values in zip(trees, *(_cut(part, lengths) for part in (query, key, value)), strict=True):
        (plain, *later), (seen_keys, *_), (seen_values, *_) = (
            _cut(part, [tree.plain, tree.length - tree.plain]) for part in (own, keys, values)
        )
        outputs.append(attend(plain, seen_keys, seen_values, is_causal=True))
        if later:
            outputs.append(attend(later[0], keys, values, attn_mask=tree.mask))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)).transpose(1, 2), None


def _cut(tensor: torch.Tensor, lengths: Sequence[int]) -> Sequence[torch.Tensor]:
    """Cut (1, heads, T, width) into parts; what is whole stays as it is, for a cut's gradient is a copy."""
    if lengths[0] == tensor.shape[2]:
        return [tensor]
    parts: Sequence[torch.Tensor] = tensor.split(list(lengths), dim=2)
    return parts


AttentionInterface.register(TREES, attend_by_tree)
AttentionMaskInterface.register(TREES, sdpa_mask)


def attention_of(model: Any) -> Attention:
    """Name the attention of a (not wrapped) model's language model."""
    return str(model.config.text_config._attn_implementation)


def check_attention(model: Any) -> None:
    """Refuse a model whose attention would read the mask wrongly."""
    if attention_of(model) not in (TREES, FLEX):
        raise ValueError(f"packed rows need {TREES} or {FLEX}, the model has {attention_of(model)!r}")


def set_attention(model: Any, attention: Attention) -> None:
    """Give the language model of a (not wrapped) model another attention; the vision tower keeps its own."""
    model.set_attn_implementation({"text_config": attention})


@contextmanager
def with_sdpa(model: Any) -> Iterator[None]:
    """Attend as transformers does, to what is no packed row: a growing text, a conversation alone."""
    before = attention_of(model)
    set_attention(model, SDPA)
    try:
        yield
    finally:
        set_attention(model, before)
