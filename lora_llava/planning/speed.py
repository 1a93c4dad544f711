"""Estimate the time of rows: of each the longer of launching its kernels and computing them.

Kernels are launched while earlier ones compute, so the two times overlap and do not add up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lora_llava.data.packing import SampledSteps
from lora_llava.modeling.structure import Attention
from lora_llava.planning.memory import Recompute


@dataclass(frozen=True, slots=True)
class Speed:
    """What decides the time of a row: forward and backward pass through all layers, nothing recomputed.

    Times are in seconds if they are measured, else in units of `token`.
    """

    launching: float
    """Time to launch the kernels of a row of any length, as the stage's `quantization.type` has them."""
    token: float
    """Time that the device computes per token."""
    dequantizing: float
    """Time to dequantize the NF4 weights, in both passes."""
    is_measured: bool = False

    def __str__(self) -> str:
        """Describe the time of a row in one line."""
        if not self.is_measured:
            return "assumed, not measured"
        ms, us = 1e3 * self.launching, 1e6 * self.token
        deq = f"{1e3 * self.dequantizing:g} ms + " if self.dequantizing else ""
        return f"a row takes {ms:g} ms to launch, and {deq}{us:g} us per token to compute (measured on one layer)"


ASSUMED = {"cuda": Speed(250.0, 1.0, 150.0), "cpu": Speed(0.0, 1.0, 60.0)}
"""Speed where nothing is measured. CUDA: an RTX 4090 with a 7B model, an estimate. CPU: measured on 2 AVX2 cores;
launching is nothing next to computing there."""
_SELECTIVE_SHARE = 0.25
"""Share of a forward pass that selective checkpointing repeats (FLOPs counted on Llama layers with LoRA)."""
_SELECTIVE_LAUNCHING = 3.0
"""Time to launch a layer with selective checkpointing, relative to one without: PyTorch decides in Python what it
keeps. This and the next two: CPU time of 32 narrow layers in NF4."""
_FULL_LAUNCHING = {True: 1.5, False: 1.8}
"""The same with full checkpointing, of fused layers and of others."""
_DEQUANTIZED_LAUNCHING = {True: 0.7, False: 0.54}
"""The same of layers whose weights are dequantized once."""
OTHER_LAYERS = 4
"""Kernels of a row outside of the layers (vision tower, embedding, mask, loss), in layers: counted on a 7B model."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine that a stage is planned for."""

    device: str
    """`cuda` or `cpu`."""
    usable: int
    """Bytes to plan with."""
    attention: Attention
    measured: Speed | None = None
    """The speed of the stage's layers; None: `ASSUMED`."""

    @property
    def speed(self) -> Speed:
        """The speed to plan with."""
        return self.measured or ASSUMED[self.device]

    def suits_selective(self, tokens: int) -> bool:
        """Tell whether a row of `tokens` tokens takes longer to compute than to launch with selective checkpointing.

        Where launching dominates, full recomputation is faster and smaller.
        """
        launching = _SELECTIVE_LAUNCHING * self.speed.launching
        return launching < (1 + _SELECTIVE_SHARE / 2) * self.speed.token * tokens


@dataclass(frozen=True, slots=True)
class Passes:
    """How the layers compute a row."""

    layers: int
    recompute: Recompute
    nf4: bool
    """Whether the linear layers are quantized to NF4."""
    keep_dequantized: bool
    """Whether they are dequantized once instead of in every pass."""
    is_fused: bool = True
    """Whether the layers are fused. Those that `selective` does not recompute in full then keep everything."""
    graphs: bool = False
    """Whether all layers but the last run as CUDA graphs."""

    def row_times(self, lengths: npt.NDArray[np.int64], speed: Speed) -> npt.NDArray[np.float64]:
        """Return the times of rows of `lengths` tokens, in the unit of `speed`; an empty row takes no time."""
        longer = np.maximum(self.launching(speed), self.computing(lengths, speed))
        times: npt.NDArray[np.float64] = np.where(lengths > 0, longer, 0.0)
        return times

    def computing(self, lengths: npt.NDArray[np.int64], speed: Speed) -> npt.NDArray[np.float64]:
        """Return the times that the device computes rows of `lengths` tokens.

        The backward pass of a frozen linear layer costs as much as its forward pass: its weight has no gradient.
        """
        dequantizing = speed.dequantizing if self.nf4 and not self.keep_dequantized else 0.0
        repeated = self._mean(1.0, 0.0 if self.is_fused else _SELECTIVE_SHARE, 0.0)
        return (1 + repeated / 2) * (dequantizing + speed.token * lengths.astype(np.float64))

    def launching(self, speed: Speed) -> float:
        """Return the time to launch the kernels of a row."""
        if self.graphs:
            return speed.launching * (1 + OTHER_LAYERS) / (self.layers + OTHER_LAYERS)
        selective = 1.0 if self.is_fused else _SELECTIVE_LAUNCHING
        launching = speed.launching * self._mean(_FULL_LAUNCHING[self.is_fused], selective, 1.0)
        return launching * (_DEQUANTIZED_LAUNCHING[self.is_fused] if self.nf4 and self.keep_dequantized else 1.0)

    def _mean(self, full: float, selective: float, none: float) -> float:
        """Average a value of each policy over the layers."""
        if self.recompute.policy is False:
            return none
        num_full = self.layers if self.recompute.policy is True else self.recompute.full_layers
        return (num_full * full + (self.layers - num_full) * selective) / self.layers


def relative_cost(steps: SampledSteps, tokens: int, passes: Passes, speed: Speed) -> float:
    """Return the time per token of the conversations in rows of at most `tokens` tokens; 1 is `speed.token`.

    A step takes as long as the rank whose rows take longest.
    """
    times = passes.row_times(steps.row_lengths(tokens), speed)
    by_rank = times.reshape(len(times), -1, steps.ranks).sum(axis=1)
    return float(by_rank.max(axis=1).sum()) / (speed.token * steps.num_separate_tokens)
