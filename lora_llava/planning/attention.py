"""Which attention a run takes: on CUDA both are tried on the spot, and compared."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.attention.flex_attention import flex_attention

from lora_llava.errors import TrainingError
from lora_llava.modeling.attention import as_trees, attend_by_tree, block_mask
from lora_llava.modeling.structure import FLEX, SDPA, TREES, Attention, attention_on_cpu

TRIED_TOKENS, TRIED_TREE, TRIED_PREFIX, TRIED_BRANCH = 4096, 1024, 640, 24
"""The row on which attentions are compared: trees of an image's tokens and some questions."""
ATTENTION_TOLERANCE = 2e-2
"""Relative difference of two attentions' outputs and gradients in bf16 (rounding alone gives 4e-3)."""


def pick_attention(setting: str, text_config: Any, device: torch.device, dtype: torch.dtype) -> tuple[Attention, str]:
    """Choose the attention that `setting` asks for, `auto` by trying both, and say why.

    Raises TrainingError if FlexAttention is asked for on a CPU, where it has no backward pass, or does not work.
    """
    if device.type == "cpu":
        return attention_on_cpu(setting), "recipe" if setting == SDPA else "auto, on a CPU"
    if setting == SDPA:
        return TREES, "recipe"
    try:
        heads, keys = int(text_config.num_attention_heads), int(text_config.num_key_value_heads)
        trees, blocks = _compare(heads, keys, int(text_config.head_dim), device, dtype)
    except Exception as error:  # what compiling can raise is open, and `auto` has another way
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if setting == FLEX:
            raise TrainingError(
                f"attn_implementation: flex_attention does not work here ({reason}); set sdpa"
            ) from error
        return TREES, f"auto: flex_attention does not work here ({reason})"
    times = f"{TRIED_TOKENS:,} tokens of a layer: flex_attention {1e3 * blocks:.2f} ms, sdpa {1e3 * trees:.2f} ms"
    return (FLEX if setting == FLEX or blocks < trees else TREES), f"{'recipe' if setting == FLEX else 'auto'}: {times}"


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
    spans = [(start, start + TRIED_PREFIX + TRIED_BRANCH, start + TRIED_TREE) for start in range(0, length, TRIED_TREE)]
    trees, blocks = as_trees(spans, segments, dtype), block_mask(segments)
    layer, scale = SimpleNamespace(num_key_value_groups=heads // keys), width**-0.5
    compiled = torch.compile(flex_attention)
    ways: list[Callable[[], Any]] = [
        lambda: attend_by_tree(layer, query, key, value, None, trees=trees, scaling=scale)[0].transpose(1, 2),
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
    branch = torch.where(inside < TRIED_PREFIX, 0, 1 + (inside - TRIED_PREFIX) // TRIED_BRANCH)
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
