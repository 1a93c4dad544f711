"""Attention masks for packed rows: SDPA per tree, or one FlexAttention block mask.

Shapes: T tokens of a row, R positions where a token is predicted.

Three mistakes here would silently train a wrong model (relative error of the gradients, measured on a small random
model): a bool mask with eager attention, which adds it (0.73); tree positions without a mask, from which transformers
infers a packing of sequences (1.08); the right mask with linear positions (0.044). So masks are additive, which is
right for every attention function that takes one, and mask and `position_ids` are always passed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import AttentionMaskInterface, flex_attention_mask, sdpa_mask

from lora_llava.modeling.fused.tree_attention import Spans, attend_in_trees, spans_of
from lora_llava.modeling.structure import FLEX, SDPA, TREES, Attention

_BLOCK = 128
"""Block size of FlexAttention's mask; rows are padded to a multiple of it."""
_MIN_BLOCKS = 2
"""Blocks of the shortest padded row: torch.compile would compile again for a dimension of size 1."""
_NO_TREE = -1
"""Tree number of padding tokens; no other token sees them."""
_BLOCK_LISTS = ("kv", "full_kv", "q", "full_q")
"""Lists of blocks that a `BlockMask` holds: a tensor `NAME_num_blocks` and a tensor `NAME_indices` of each."""
_LISTS = [name for kind in _BLOCK_LISTS for name in (f"{kind}_num_blocks", f"{kind}_indices")]
_ON_HOST = "tree_spans"
"""The tensor of a batch that Python reads: on the device, reading it would wait for all that was launched."""
_FLEX_NAME = "flex_by_blocks"
"""Name under which transformers knows `attend_by_blocks`; its own `flex_attention` stays what it is."""
PACKED_ATTENTIONS = (TREES, _FLEX_NAME)
"""Names in the language model's configuration of the attentions that take packed rows."""


def additive_mask(
    segments: torch.Tensor, dtype: torch.dtype, queries: torch.Tensor | slice = slice(None)
) -> torch.Tensor:
    """Return the additive mask (1, 1, queries, T) of a row: 0 where a query sees a key, else minus infinity.

    `segments` (2, T) as `data.rows.build_row` makes them; `queries`: positions of the queries, default all. Built once
    for all layers: from a bool mask, SDPA would build such a copy in each, and keep it for the backward pass.
    """
    positions = torch.arange(segments.shape[1], device=segments.device)
    seen = _sees(segments)(positions[queries, None], positions[None, :])
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
    return mask[None, None]


def block_mask(segments: torch.Tensor, lists: Mapping[str, torch.Tensor] | None = None) -> BlockMask:
    """Return FlexAttention's mask of a row: that of torch's `create_block_mask`, without its pass over all T x T pairs.

    `segments` (2, T) as in `additive_mask`, T a multiple of the block size; `lists`: those of `_block_lists` on the
    same device, default: made here.
    """
    lists = lists or to_device(_block_lists(segments.cpu()), segments.device)
    # No views: torch.compile would look at what they are views of, and compile again for its size.
    rows = [row.clone() for row in segments]
    sees, length = _sees(rows), segments.shape[1]
    tensors: dict[str, Any] = {name: lists[name] for name in _LISTS}
    mask = BlockMask(
        seq_lengths=(length, length),
        BLOCK_SIZE=(_BLOCK, _BLOCK),
        mask_mod=lambda _batch, _head, query, key: sees(query, key),
        **tensors,
    )
    # For `block_mask_tensors`: the function above hides them.
    mask.segments = rows  # type: ignore[attr-defined]
    return mask


def has_buffers(mask: Any) -> bool:
    """Tell whether a mask is one of `block_mask`, which `block_mask_tensors` takes."""
    return hasattr(mask, "segments")


def block_mask_tensors(mask: Any) -> list[torch.Tensor]:
    """Return the tensors that make a mask of `block_mask` that of its row, in the same order for every mask."""
    return [*(getattr(mask, name) for name in _LISTS), *mask.segments]


def clone_mask(mask: Any) -> BlockMask:
    """Return a copy of a mask of `block_mask` that shares no tensor with it."""
    return block_mask(torch.stack(mask.segments), {name: getattr(mask, name).clone() for name in _LISTS})


def _block_lists(segments: torch.Tensor) -> dict[str, torch.Tensor]:
    """List the blocks of a row's mask in which something is seen; `segments` (2, T) on the CPU, T = B x block size.

    Returns the tensors of a `BlockMask` by name, counts (1, 1, B) and indices (1, 1, B, B), int32: for each block of
    queries the blocks of keys that it sees in part (`kv`) and entirely (`full_kv`), for each block of keys the blocks
    of queries that see it in part (`q`) and entirely (`full_q`). As many indices as counted come first and ascend.
    """
    # Neighbors of one tree and branch form a run: sees[q, k], whether run q sees the earlier run k.
    runs, run_of_token = torch.unique_consecutive(segments, dim=1, return_inverse=True)
    tree, branch = runs
    shared = (branch[None, :] == 0) | (branch[:, None] == branch[None, :])
    sees = ((tree[:, None] == tree[None, :]) & shared).tril(-1).double()

    # sizes[b, r], tokens of run r in block b. Within a run every token sees itself and those before it.
    num_blocks, num_runs = segments.shape[1] // _BLOCK, runs.shape[1]
    block_of_token = torch.arange(segments.shape[1]) // _BLOCK
    cells = torch.bincount(block_of_token * num_runs + run_of_token, minlength=num_blocks * num_runs)
    sizes = cells.view(num_blocks, num_runs).double()
    within = (sizes @ sizes.T).tril(-1) + torch.diag((sizes * (sizes + 1) / 2).sum(1))
    seen = sizes @ sees @ sizes.T + within

    entirely = seen == _BLOCK * _BLOCK
    partly = (seen > 0) & ~entirely
    lists: dict[str, torch.Tensor] = {}
    for name, blocks in zip(_BLOCK_LISTS, (partly, entirely, partly.T, entirely.T), strict=True):
        lists[f"{name}_num_blocks"] = blocks.sum(1, dtype=torch.int32)
        lists[f"{name}_indices"] = blocks.int().argsort(dim=1, descending=True, stable=True).int()
    # Copies, since a view would have torch.compile look at what it is a view of.
    return {name: values[None, None].clone(memory_format=torch.contiguous_format) for name, values in lists.items()}


def with_block_lists(batch: Mapping[str, torch.Tensor], lengths: Sequence[int] = ()) -> dict[str, torch.Tensor]:
    """Add to a row what its block mask is made from: the work of a data loader's worker, not of the training loop.

    The row will be padded to the first of `lengths`, ascending, that holds it; if none does, as little as possible.
    """
    segments = batch["segments"]
    return {**batch, **_block_lists(F.pad(segments, _padding(segments.shape[1], lengths), value=_NO_TREE))}


def padded_length(length: int) -> int:
    """Return the tokens that FlexAttention pads a row of `length` tokens to."""
    return max(_MIN_BLOCKS, -(-length // _BLOCK)) * _BLOCK


def _padding(length: int, lengths: Sequence[int] = ()) -> tuple[int, int]:
    """Return the padding tokens of a row of `length` tokens for FlexAttention, left and right."""
    return 0, next((padded for padded in lengths if padded >= length), padded_length(length)) - length


def _sees(segments: Iterable[torch.Tensor]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return the predicate on positions of a query and a key: whether the query sees the key.

    A token sees itself and the earlier tokens of its own conversation and of its tree's prefix (branch 0).
    """
    tree, branch = segments

    def sees(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        shared = (branch[key] == 0) | (branch[query] == branch[key])
        seen: torch.Tensor = (tree[query] == tree[key]) & shared & (query >= key)
        return seen

    return sees


def masked_inputs(batch: Mapping[str, torch.Tensor], attention: Attention, dtype: torch.dtype) -> dict[str, Any]:
    """Return the model's inputs for a row: `input_ids`, `position_ids` (1, T) and the mask that `attention` takes.

    Any other attention than SDPA per tree and FlexAttention gets a dense additive mask, which all of them understand.
    """
    ids, positions, segments = batch["input_ids"], batch["position_ids"], batch["segments"]
    if attention == TREES:
        targets, tree_spans = batch["unique_target_positions"], batch["tree_spans"].tolist()
        # Reading the branches of a row on CUDA would wait for the device.
        spans = spans_of(segments, tree_spans, dtype) if segments.device.type == "cpu" else None
        trees = {"trees": as_trees(tree_spans, segments, dtype)} if spans is None else {"spans": spans}
        return {
            "input_ids": ids,
            "position_ids": positions,
            # All ones, so that transformers neither infers a packing from the positions nor builds a mask.
            "attention_mask": torch.ones_like(ids),
            **trees,
            "last_queries": Queries(targets, additive_mask(segments, dtype, targets)),
        }
    if attention == FLEX:
        lists = batch if "kv_indices" in batch else None
        padding = _padding(segments.shape[1], [] if lists is None else [lists["kv_indices"].shape[-1] * _BLOCK])
        # Padding with id 0 adds no image: the image token's id is the last of the vocabulary.
        ids, positions = F.pad(ids, padding), F.pad(positions, padding)
        padded = F.pad(segments, padding, value=_NO_TREE)
        return {
            "input_ids": ids,
            "position_ids": positions,
            "attention_mask": block_mask(padded, lists),
        }
    return {"input_ids": ids, "position_ids": positions, "attention_mask": additive_mask(segments, dtype)}


def to_device(batch: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Copy a row to `device` without waiting for it, except what `masked_inputs` reads on the host."""
    # A copy from memory that is not pinned waits; the data loader pins what it loads.
    return {
        name: tensor if name == _ON_HOST else tensor.to(device, non_blocking=device.type == "cuda")
        for name, tensor in batch.items()
    }


@dataclass(frozen=True, slots=True)
class Tree:
    """Attention within one tree of a row."""

    length: int
    causal_length: int
    """Leading tokens with a plain causal mask: the prefix and the first branch."""
    mask: torch.Tensor
    """Additive mask of the tokens after those (1, 1, length - causal_length, length)."""


@dataclass(frozen=True, slots=True)
class Queries:
    """The queries that the last layer needs; see `modeling.packed`."""

    positions: torch.Tensor
    """(R,)"""
    mask: torch.Tensor
    """Their additive mask (1, 1, R, T)."""


def as_trees(spans: Sequence[Sequence[int]], segments: torch.Tensor, dtype: torch.dtype) -> list[Tree]:
    """Return the trees of a row; `spans` (trees, 3) and `segments` (2, T) as `data.rows.build_row` makes them."""
    return [
        Tree(
            end - start,
            branch_end - start,
            additive_mask(segments[:, start:end], dtype, slice(branch_end - start, None)),
        )
        for start, branch_end, end in spans
    ]


def attend_by_tree(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _attention_mask: torch.Tensor | None,
    *,
    trees: Sequence[Tree] = (),
    scaling: float,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each tree of a row: causally up to the end of its first branch, with a mask after that.

    With `spans` among `options` in place of `trees`, with no masks: see `attend_in_trees`. `query` (1, heads, T, D),
    `key`, `value` (1, key-value heads, T, D), as transformers' attention functions take them; of `options` only
    `spans` and `last_queries` are read. Returns (1, T, heads, D), in the last layer zeros except at `last_queries`.
    Nothing is computed across trees, and SDPA's causal kernels do the longest part.
    """
    # Grouped-query attention: give each query head its key and value.
    key, value = (repeat_kv(tensor, module.num_key_value_groups) for tensor in (key, value))
    attend = partial(F.scaled_dot_product_attention, scale=scaling)

    # The last layer: only the queries from which something is predicted, over the whole row.
    last: Queries | None = options.get("last_queries")
    if last is not None and module.layer_idx == module.config.num_hidden_layers - 1:
        attended = attend(query.index_select(2, last.positions), key, value, attn_mask=last.mask)
        return torch.zeros_like(query).index_copy(2, last.positions, attended).transpose(1, 2), None

    spans: Sequence[Spans] | None = options.get("spans")
    if spans is not None:
        return attend_in_trees(query, key, value, spans, scaling).transpose(1, 2), None

    # Every other layer, tree by tree: prefix and first branch causally, later branches with the mask.
    lengths = [tree.length for tree in trees]
    outputs: list[torch.Tensor] = []
    per_tree = zip(trees, _split(query, lengths), _split(key, lengths), _split(value, lengths), strict=True)
    for tree, queries, keys, values in per_tree:
        parts = [tree.causal_length, tree.length - tree.causal_length]
        causal, *later = _split(queries, parts)
        outputs.append(attend(causal, _split(keys, parts)[0], _split(values, parts)[0], is_causal=True))
        if later:
            outputs.append(attend(later[0], keys, values, attn_mask=tree.mask))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)).transpose(1, 2), None


def _split(tensor: torch.Tensor, lengths: Sequence[int]) -> Sequence[torch.Tensor]:
    """Split (1, heads, T, width) along T; a single part is returned as is, since the gradient of a split is a copy."""
    if lengths[0] == tensor.shape[2]:
        return [tensor]
    parts: Sequence[torch.Tensor] = tensor.split(list(lengths), dim=2)
    return parts


def attend_by_blocks(
    _module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: BlockMask,
    *,
    scaling: float,
    **_options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend with FlexAttention by a block mask; shapes as in `attend_by_tree`, T a multiple of the block size."""
    heads, key_heads = query.shape[1], key.shape[1]
    grouped = heads != key_heads
    # FlexAttention's kernels group queries by powers of two.
    if grouped and heads & (heads - 1):
        key, value = (repeat_kv(tensor, heads // key_heads) for tensor in (key, value))
        grouped = False
    for tensor in (query, key, value):
        # All but T: else a row of as many blocks as there are heads would be compiled for that coincidence.
        torch._dynamo.mark_static(tensor, [0, 1, 3])
    attend = _compiled_flex_attention()
    attended: torch.Tensor = attend(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=grouped)
    return attended.transpose(1, 2), None


@cache
def _compiled_flex_attention() -> Callable[..., torch.Tensor]:
    """Compile FlexAttention once, for rows of all lengths."""
    compiled: Callable[..., torch.Tensor] = torch.compile(flex_attention, dynamic=True)
    return compiled


AttentionInterface.register(TREES, attend_by_tree)
AttentionMaskInterface.register(TREES, sdpa_mask)
AttentionInterface.register(_FLEX_NAME, attend_by_blocks)
AttentionMaskInterface.register(_FLEX_NAME, flex_attention_mask)


def attention_of(model: Any) -> Attention:
    """Return the attention of the language model of an unwrapped model."""
    name = str(model.config.text_config._attn_implementation)
    return FLEX if name == _FLEX_NAME else name


def check_attention(model: Any) -> None:
    """Raise ValueError for a model whose attention would misread the mask."""
    if attention_of(model) not in (TREES, FLEX):
        raise ValueError(f"packed rows need {TREES} or {FLEX}, the model has {attention_of(model)!r}")


def set_attention(model: Any, attention: Attention) -> None:
    """Set the attention of the language model of an unwrapped model; the vision tower keeps its own."""
    model.set_attn_implementation({"text_config": _FLEX_NAME if attention == FLEX else attention})


def with_sdpa(model: Any) -> AbstractContextManager[None]:
    """Use plain SDPA inside the `with` block, for what is not a packed row: decoding, a single conversation."""
    return with_attention(model, SDPA)


@contextmanager
def with_attention(model: Any, attention: Attention) -> Iterator[None]:
    """Use another attention of the language model inside the `with` block."""
    before = attention_of(model)
    set_attention(model, attention)
    try:
        yield
    finally:
        set_attention(model, before)
