"""Who sees whom in a packed row, in the form that the language model's attention takes.

Three mistakes here would train a wrong model without a word (relative error of the gradients measured on a small
random model): a bool mask with eager attention, which adds it (0.73); tree positions without a mask, from which
transformers guesses a packing of its own (1.08); the right mask with linear positions (0.044). So the mask of SDPA is
written as what is added, which is right for every attention that takes one, and mask and positions are always given.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from lora_llava.errors import TrainingError

Attention = str
"""`sdpa`, with a dense mask, or `flex_attention`, which skips the blocks of the mask that hold nothing."""
SDPA, FLEX = "sdpa", "flex_attention"
BLOCK = 128
"""Side of a block of FlexAttention's mask; rows are filled up to a multiple of it."""
NO_TREE = -1
"""Tree number of the tokens that fill a row up: nothing else sees them."""
TRIED_TOKENS, TRIED_TREE, TRIED_PREFIX = 4096, 1024, 640
"""The row on which attentions are compared: trees of an image's tokens and some questions."""
ATTENTION_TOLERANCE = 2e-2
"""Relative difference of two attentions' outputs and gradients in bf16 (rounding alone gives 4e-3)."""


def additive_mask(segments: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Write who sees whom as what is added to attention's scores (1, 1, T, T): 0, or minus infinity.

    `segments` (2, T) as `data.batch.build_row` makes them. Made once for all layers: of a bool mask SDPA would make,
    and keep for the backward pass, such a copy in each.
    """
    places = torch.arange(segments.shape[1], device=segments.device)
    seen = _sees(segments)(places[:, None], places[None, :])
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
    """Return the row's `input_ids`, `position_ids` and `attention_mask` as `attention` takes them."""
    ids, positions, segments = batch["input_ids"], batch["position_ids"], batch["segments"]
    mask: torch.Tensor | BlockMask
    if attention == FLEX:
        room = (0, -segments.shape[1] % BLOCK)
        # Id 0 is no image's place, whose id is the last of a vocabulary.
        ids, positions = F.pad(ids, room), F.pad(positions, room)
        mask = block_mask(F.pad(segments, room, value=NO_TREE))
    else:
        mask = additive_mask(segments, dtype)
    return {"input_ids": ids, "position_ids": positions, "attention_mask": mask}


def attention_of(model: Any) -> Attention:
    """Name the attention of a (not wrapped) model's language model."""
    return str(model.config.text_config._attn_implementation)


def check_attention(model: Any) -> None:
    """Refuse a model whose attention would read the mask wrongly."""
    if attention_of(model) not in (SDPA, FLEX):
        raise ValueError(f"packed rows need {SDPA} or {FLEX}, the model has {attention_of(model)!r}")


def set_attention(model: Any, attention: Attention) -> None:
    """Give the language model of a (not wrapped) model another attention; the vision tower keeps its own."""
    model.set_attn_implementation({"text_config": attention})


@contextmanager
def with_sdpa(model: Any) -> Iterator[None]:
    """Answer with SDPA: FlexAttention would be compiled anew for every length of a growing text."""
    before = attention_of(model)
    set_attention(model, SDPA)
    try:
        yield
    finally:
        set_attention(model, before)


def pick_attention(setting: str, text_config: Any, device: torch.device, dtype: torch.dtype) -> tuple[Attention, str]:
    """Choose the attention that `setting` asks for, `auto` by trying both, and say why.

    Raises TrainingError if FlexAttention is asked for on a CPU, where it has no backward pass, or does not work.
    """
    if device.type == "cpu":
        if setting == FLEX:
            raise TrainingError(
                "attn_implementation: flex_attention has no backward pass on a CPU; set auto or sdpa, or run on CUDA"
            )
        return SDPA, "the one for a CPU"
    if setting == SDPA:
        return SDPA, "as set"
    try:
        heads, keys = int(text_config.num_attention_heads), int(text_config.num_key_value_heads)
        dense, blocks = _compare(heads, keys, int(text_config.head_dim), device, dtype)
    except Exception as error:  # what compiling can raise is open, and `auto` has another way
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if setting == FLEX:
            raise TrainingError(
                f"attn_implementation: flex_attention does not work here ({reason}); set sdpa"
            ) from error
        return SDPA, f"flex_attention does not work here ({reason})"
    figures = f"{TRIED_TOKENS:,} tokens of a layer: flex_attention {1e3 * blocks:.2f} ms, sdpa {1e3 * dense:.2f} ms"
    return (FLEX if setting == FLEX or blocks < dense else SDPA), figures


@cache
def _compare(heads: int, keys: int, width: int, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Time the forward and backward pass of a layer's attention, SDPA's and FlexAttention's, in seconds.

    Raises ValueError where the two do not compute the same.
    """
    segments = _tried_segments(device)
    length = segments.shape[1]
    generator = torch.Generator(device).manual_seed(0)

    def draw(count: int) -> torch.Tensor:
        shape = (1, count, length, width)
        return torch.randn(shape, generator=generator, device=device, dtype=dtype).requires_grad_()

    query, key, value = inputs = (draw(heads), draw(keys), draw(keys))
    mask, blocks = additive_mask(segments, dtype), block_mask(segments)
    compiled = torch.compile(flex_attention)
    ways: list[Callable[[], Any]] = [
        lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=heads != keys),
        lambda: compiled(query, key, value, block_mask=blocks, enable_gqa=heads != keys),
    ]
    results = [_outputs(way, inputs) for way in ways]
    for ours, theirs in zip(*results, strict=True):
        difference = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
        if not difference <= ATTENTION_TOLERANCE:
            raise ValueError(f"its outputs or gradients differ from sdpa's by {difference:.1e}")
    times = [_seconds(way, inputs, device) for way in ways]
    return times[0], times[1]


def _tried_segments(device: torch.device) -> torch.Tensor:
    places = torch.arange(TRIED_TOKENS, device=device)
    inside = places % TRIED_TREE
    # Sixteen questions after the prefix.
    branch = torch.where(inside < TRIED_PREFIX, 0, 1 + (inside - TRIED_PREFIX) // ((TRIED_TREE - TRIED_PREFIX) // 16))
    return torch.stack([places // TRIED_TREE, branch])


def _outputs(way: Callable[[], Any], inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Return the output and the gradients of the inputs."""
    output = way()
    return [output.detach(), *torch.autograd.grad(output.float().square().sum(), inputs)]


def _seconds(way: Callable[[], Any], inputs: tuple[torch.Tensor, ...], device: torch.device, repeats: int = 5) -> float:
    """Time one forward and backward pass; it has run before."""
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        _outputs(way, inputs)
    torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / repeats
