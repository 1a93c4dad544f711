"""Estimate the time per token of each choice that trades memory for time, relative to a plain forward pass."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import LlavaConfig

from lora_llava.formats.shapes import attention_widths
from lora_llava.modeling.structure import Attention, linear_weights
from lora_llava.planning.memory import Recompute

_DEQUANTIZING = {"cuda": 176, "cpu": 60}
"""Time to dequantize all NF4 weights once, as the forward pass of this many tokens. CUDA: 2.5 bytes per weight at 70 %
of an RTX 4090's 1 TB/s, against 2 FLOP per weight and token at 60 % of its 165 TFLOP/s. CPU: measured on 2 AVX2 cores.
"""
_LAUNCHING = {"cuda": 120, "cpu": 0}
"""Time to launch the kernels of one pass, as the forward pass of this many tokens: about a hundred kernels per layer at
5 us each, against the same RTX 4090: an estimate."""
_SELECTIVE_SHARE = 0.25
"""Share of a forward pass that selective checkpointing repeats (FLOPs counted on Llama layers with LoRA)."""
_ATTENTION_RATE = {"cuda": 0.5, "cpu": 0.8}
"""FLOP rate of attention's matmuls relative to the linear layers': CUDA, an estimate; CPU, measured."""
_ATTENTION_BACKWARD = 2.5
"""FLOPs of attention's backward pass relative to its forward pass: five matmuls instead of two."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine that a stage is planned for."""

    device: str
    """`cuda` or `cpu`."""
    usable: int
    """Bytes to plan with."""
    attention: Attention


def relative_cost(
    config: LlavaConfig, machine: Machine, recompute: Recompute, tokens: int, longest: int, *, dequantizes: bool
) -> float:
    """Estimate the time per token in rows of `tokens` tokens; 1 is a forward pass of the linear layers.

    `longest`: tokens of the longest conversation. `dequantizes`: every pass dequantizes the NF4 weights. The backward
    pass of a frozen linear layer costs as much as its forward pass: its weight has no gradient.
    """
    layers = int(config.text_config.num_hidden_layers)

    # Linear layers: forward, backward and what is recomputed, each with a cost that does not depend on the row length.
    per_pass = _LAUNCHING[machine.device] + (_DEQUANTIZING[machine.device] if dequantizes else 0)
    linear = (2 + _repeated_share(recompute, layers)) * (1 + per_pass / tokens)

    # Attention: a token attends within its own tree, of which the longest conversation is a bound.
    attended = min(tokens, longest)
    query_width, _ = attention_widths(config.text_config)
    forward = 2 * attended * query_width * layers / linear_weights(config) / _ATTENTION_RATE[machine.device]
    recomputed = 1.0 if recompute.policy is True else 0.0
    return linear + forward * (1 + _ATTENTION_BACKWARD + recomputed)


def _repeated_share(recompute: Recompute, layers: int) -> float:
    """Return the share of a forward pass that is computed twice."""
    if recompute.policy is False:
        return 0.0
    full = layers if recompute.policy is True else recompute.full_layers
    return (full + (layers - full) * _SELECTIVE_SHARE) / layers
