"""Choose the attention of a run; on CUDA, check both implementations against each other and time them."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from lora_llava.errors import TrainingError
from lora_llava.modeling.attention import as_trees, attend_by_blocks, attend_by_tree, block_mask
from lora_llava.modeling.structure import FLEX, SDPA, TREES, Attention, attention_on_cpu

_ROW, _SHORT_ROW = 4096, 2048
"""Tokens of the two trial rows."""
TREE, PREFIX, BRANCH = 1024, 640, 24
"""Tokens of each tree in a trial row, of its prefix (an image), and of a branch (a question)."""
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}
"""Largest relative difference of outputs and gradients by dtype. In bf16, rounding alone gives 4e-3, and in fp16 less;
in fp32, FlexAttention's kernels multiply in TF32 where PyTorch is set to, which is no fp32."""
_REPEATS = 5
"""Passes that are timed."""
_FLEX_FROM = (8, 0)
"""Lowest compute capability on which `auto` tries FlexAttention: its kernels want more shared memory than older cards
have, and compiling them takes a minute."""


def pick_attention(setting: str, text_config: Any, device: torch.device, dtype: torch.dtype) -> tuple[Attention, str]:
    """Choose the attention that `setting` names, or for `auto` the faster; return it and the reason.

    Raises TrainingError if FlexAttention is set but does not work here; on a CPU it has no backward pass.
    """
    if device.type == "cpu":
        return attention_on_cpu(setting), "recipe" if setting == SDPA else "auto, on a CPU"
    if setting == SDPA:
        return TREES, "recipe"
    capability = torch.cuda.get_device_capability(device)
    if setting != FLEX and capability < _FLEX_FROM:
        number = ".".join(map(str, capability))
        return TREES, f"auto: flex_attention is not tried on a card of compute capability {number}"
    try:
        heads, keys = int(text_config.num_attention_heads), int(text_config.num_key_value_heads)
        trees, blocks = _compare(heads, keys, int(text_config.head_dim), device, dtype)
    except Exception as error:  # Compilation can raise anything, and `auto` can fall back.
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if setting == FLEX:
            raise TrainingError(
                f"attn_implementation: flex_attention does not work here ({reason}); set sdpa"
            ) from error
        return TREES, f"auto: flex_attention does not work here ({reason})"
    times = f"{_ROW:,} tokens of a layer: flex_attention {1e3 * blocks:.2f} ms, sdpa {1e3 * trees:.2f} ms"
    return (FLEX if setting == FLEX or blocks < trees else TREES), f"{'recipe' if setting == FLEX else 'auto'}: {times}"


@cache
def _compare(heads: int, keys: int, width: int, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Time forward plus backward of one layer's attention, with SDPA per tree and with FlexAttention, in seconds.

    Raises ValueError if their outputs or gradients differ.
    """
    # The compiled FlexAttention must be right for every length, so two are compared; comparing also compiles.
    for length in (_SHORT_ROW, _ROW):
        inputs, attentions = _trial(heads, keys, width, _trial_segments(length, device), dtype)
        results = [_outputs(attend, inputs) for attend in attentions]
        for sdpa, flex in zip(*results, strict=True):
            difference = float((sdpa.float() - flex.float()).norm() / flex.float().norm())
            if not difference <= _TOLERANCE[dtype]:
                raise ValueError(f"its outputs or gradients differ from sdpa's by {difference:.1e}")
    times = [_seconds(attend, inputs, device) for attend in attentions]
    return times[0], times[1]


def _trial(
    heads: int, keys: int, width: int, segments: torch.Tensor, dtype: torch.dtype
) -> tuple[tuple[torch.Tensor, ...], list[Callable[[], Any]]]:
    """Draw query (1, heads, T, width), key and value (1, keys, T, width) of a row; return them and both attentions."""
    length, device = segments.shape[1], segments.device
    generator = torch.Generator(device).manual_seed(0)

    def draw(count: int) -> torch.Tensor:
        shape = (1, count, length, width)
        return torch.randn(shape, generator=generator, device=device, dtype=dtype).requires_grad_()

    query, key, value = inputs = (draw(heads), draw(keys), draw(keys))
    spans = [(start, start + PREFIX + BRANCH, start + TREE) for start in range(0, length, TREE)]
    trees, blocks = as_trees(spans, segments, dtype), block_mask(segments)
    layer, scale = SimpleNamespace(num_key_value_groups=heads // keys), width**-0.5
    return inputs, [
        lambda: attend_by_tree(layer, query, key, value, None, trees=trees, scaling=scale)[0].transpose(1, 2),
        lambda: attend_by_blocks(layer, query, key, value, blocks, scaling=scale)[0].transpose(1, 2),
    ]


def _trial_segments(length: int, device: torch.device) -> torch.Tensor:
    """Return the segments (2, T) of a trial row: tree and branch of each position; branch 0 is the prefix."""
    positions = torch.arange(length, device=device)
    in_tree = positions % TREE
    branch = torch.where(in_tree < PREFIX, 0, 1 + (in_tree - PREFIX) // BRANCH)
    return torch.stack([positions // TREE, branch])


def _outputs(attend: Callable[[], Any], inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Return the output of `attend` and the gradients of `inputs`."""
    output = attend()
    return [output.detach(), *torch.autograd.grad(output.float().square().sum(), inputs)]


def _seconds(attend: Callable[[], Any], inputs: tuple[torch.Tensor, ...], device: torch.device) -> float:
    """Time one forward and backward pass, in seconds; it must have run before."""
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(_REPEATS):
        _outputs(attend, inputs)
    torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / _REPEATS
