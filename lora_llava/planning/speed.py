"""How long a token takes under each choice that trades memory for time, relative to its plain forward pass."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import LlavaConfig

from lora_llava.modeling.structure import Attention, linear_weights
from lora_llava.planning.memory import Recompute, query_width

DEQUANTIZING = {"cuda": 176, "cpu": 60}
"""Reading NF4 once takes as long as so many tokens' forward pass. CUDA: 2.5 bytes a weight at 70 % of an RTX 4090's
1 TB/s, against 2 FLOP a weight and token at 60 % of its 165 TFLOP/s. CPU: measured on 2 AVX2 cores."""
LAUNCHING = {"cuda": 120, "cpu": 0}
"""Starting a pass's kernels takes as long as so many tokens' forward pass: about a hundred a layer at 5 us each,
against the same RTX 4090: an estimate."""
FORWARD_OF_SELECTIVE = 0.25
"""Share of a forward pass that selective recomputing repeats (FLOPs counted on Llama layers with LoRA)."""
ATTENTION_RATE = {"cuda": 0.5, "cpu": 0.8}
"""Rate of attention's matrix products against that of the linear layers': CUDA, an estimate; CPU, measured."""
ATTENTION_BACKWARD = 2.5
"""Work of attention's backward pass against its forward pass: five matrix products instead of two."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a stage is planned for."""

    device: str
    """`cuda` or `cpu`."""
    usable: int
    """Bytes to plan with."""
    attention: Attention


def relative_cost(
    config: LlavaConfig, machine: Machine, recompute: Recompute, tokens: int, longest: int, *, dequantizes: bool
) -> float:
    """Estimate the time for a token in rows of `tokens`: 2 is a forward and a backward pass with nothing beside.

    `longest`: tokens of the longest conversation. A frozen linear layer's backward pass is as dear as its forward
    pass: there is no gradient of its weight.
    """
    layers = int(config.text_config.num_hidden_layers)
    repeated = repeated_share(recompute, layers)
    fixed = LAUNCHING[machine.device] + (DEQUANTIZING[machine.device] if dequantizes else 0)
    # What lies in other trees is left out.
    seen = min(tokens, longest)
    attention = 2 * seen * query_width(config) * layers / linear_weights(config) / ATTENTION_RATE[machine.device]
    again = 1.0 if recompute.policy is True else 0.0
    return (2 + repeated) * (1 + fixed / tokens) + attention * (1 + ATTENTION_BACKWARD + again)


def repeated_share(recompute: Recompute, layers: int) -> float:
    """Share of a forward pass that is computed twice."""
    if recompute.policy is False:
        return 0.0
    full = layers if recompute.policy is True else recompute.full_layers
    return (full + (layers - full) * FORWARD_OF_SELECTIVE) / layers
