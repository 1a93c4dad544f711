"""Estimate the memory of a stage from its shapes: weights, gradients, optimizer states, activations."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import LlavaConfig

from lora_llava.data.packing import Row, conversations, tree_length
from lora_llava.data.stage import StageData
from lora_llava.formats.shapes import attention_widths
from lora_llava.modeling.structure import (
    FLEX,
    FP32,
    HEAD_CHUNK,
    LANGUAGE_MODEL,
    TREES,
    Attention,
    ElementType,
    PartParameters,
    linear_weights,
)
from lora_llava.recipe.settings import QuantizationSettings
from lora_llava.recipe.stages import GradientCheckpointing
from lora_llava.system.text import counted

_NF4_BYTES = {True: 0.516, False: 0.5625}
"""Bytes per weight in NF4, with and without double quantization: 4 bits, plus a scale per 64 weights (fp32; or 8 bits,
with an fp32 scale per 256 of them)."""
CPU_HEAP = 1.7
"""On a CPU with activation checkpointing, bytes held per live byte: layers allocate and free blocks of many sizes, and
glibc's heap keeps the gaps. Measured: 628 MiB held of 370 planned at 1,536 tokens. An M_MMAP_THRESHOLD of 64 KiB would
avoid it, but costs 25 % more CPU time (median of 3 interleaved runs of 6 Llama layers), mostly in page faults."""
_MASKED_SHARE = 0.25
"""Share of a row's tokens that need a row in SDPA's mask if all of them are one tree: an estimate."""


@dataclass(frozen=True, slots=True)
class Recompute:
    """What the backward pass recomputes; see `modeling.recompute`."""

    policy: GradientCheckpointing
    full_layers: int = 0
    """With `selective`: number of layers, from the first, that are recomputed in full."""

    def __str__(self) -> str:
        """Name the policy."""
        if self.policy is False:
            return "none"
        if self.policy is True:
            return "full"
        return f"selective, {counted(self.full_layers, 'layer')} in full" if self.full_layers else "selective"


@dataclass(frozen=True, slots=True)
class PartMemory:
    """Expected memory of one part of the model, in bytes."""

    part: str
    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Sum of the three."""
        return self.weights + self.gradients + self.optimizer


def in_4_bits(
    parameters: list[PartParameters], config: LlavaConfig, quantization: QuantizationSettings, dtype: ElementType
) -> list[PartParameters]:
    """Return `parameters` with the language model's linear layers in NF4 instead of `dtype`."""
    count = linear_weights(config)
    saved = round(count * (dtype.itemsize - _NF4_BYTES[quantization.double_quant]))
    return [
        replace(part, quantized=count, bytes=part.bytes - saved, dtypes=f"{part.dtypes}, nf4")
        if part.part == LANGUAGE_MODEL
        else part
        for part in parameters
    ]


def expected_memory(optim: str, parameters: list[PartParameters]) -> list[PartMemory]:
    """Estimate weights, gradients and AdamW's two moments of each part; trainable parameters are fp32."""
    moments = 2 if "8bit" in optim else 8
    return [PartMemory(part.part, part.bytes, 4 * part.trainable, moments * part.trainable) for part in parameters]


def largest_row(data: StageData) -> tuple[int, int]:
    """Return the most tokens, and the most supervised tokens, of any micro-batch."""
    rows = [row for step in data.plan.steps for row in step if row]
    return max(_row_length(row, data) for row in rows), max(_row_supervised(row, data) for row in rows)


def _row_length(row: Row, data: StageData) -> int:
    return sum(tree_length(tree, data.encoded.items) for tree in row)


def _row_supervised(row: Row, data: StageData) -> int:
    return sum(data.encoded.num_supervised[index] for index in conversations([row]))


def activation_bytes(
    config: LlavaConfig,
    recompute: Recompute,
    tokens: int,
    supervised: int,
    dtype: ElementType,
    lora_rank: int,
    attention: Attention = TREES,
) -> int:
    """Estimate the peak memory of a micro-batch besides weights, gradients and optimizer states.

    The micro-batch has `tokens` tokens, `supervised` of them with a loss; `lora_rank` is 0 without LoRA. Sizes are
    in bytes per token until the last line.
    """
    text = config.text_config
    width, mlp_width = int(text.hidden_size), int(text.intermediate_size)
    inputs, products = width * dtype.itemsize, _layer_products(config) * dtype.itemsize
    whole, last = _whole_layer(config, dtype, lora_rank), _last_layer(config, dtype, lora_rank)

    # How many layers keep what. The last one is neither checkpointed nor computed at every position.
    checkpointable = int(text.num_hidden_layers) - 1
    if recompute.policy == "selective":
        full = min(recompute.full_layers, checkpointable)
    else:
        full = checkpointable if recompute.policy is True else 0
    rest = checkpointable - full
    rest_bytes = whole if recompute.policy is False else inputs + products

    # The peak is at the start of the backward pass, with the last layer or one recomputed layer whole; or, since full
    # layers come first and the backward pass reaches them when the rest is freed, while one of them is recomputed.
    peak_at_start = full * inputs + rest * rest_bytes + max(last, whole - rest_bytes if rest else 0)
    peak_in_full_layers = full * inputs + (whole - inputs if full else 0)
    layers = max(peak_at_start, peak_in_full_layers)

    # Workspace of one layer's backward pass, measured: 5 hidden and 2 intermediate widths.
    layers += (5 * width + 2 * mlp_width) * dtype.itemsize

    # SDPA's masks cover the branches after the first, in the model's precision; FlexAttention's is boolean and exists
    # while its blocks are built.
    mask = tokens * tokens * (1 if attention == FLEX else _MASKED_SHARE * dtype.itemsize)

    # Logits of one chunk in the model's precision, then in fp32, and their gradient.
    logits = min(supervised, HEAD_CHUNK) * int(text.vocab_size) * (dtype.itemsize + 8)
    return round(tokens * layers + mask + logits)


def held_bytes(activations: int, recompute: Recompute, device: str) -> int:
    """Return the memory that the process holds for `activations` live bytes; see CPU_HEAP."""
    return round(activations * CPU_HEAP) if device == "cpu" and recompute.policy is not False else activations


def _whole_layer(config: LlavaConfig, dtype: ElementType, lora_rank: int) -> int:
    """Bytes per token that a layer with LoRA keeps if nothing is recomputed.

    Measured on Llama layers in fp32: 9 hidden and 4 intermediate widths, and the inner products of its seven adapters.
    In bf16 the two norms keep fp32 copies as well.
    """
    text = config.text_config
    widths = 9 if dtype.itemsize == FP32.itemsize else 13
    return (widths * int(text.hidden_size) + 4 * int(text.intermediate_size) + 7 * lora_rank) * dtype.itemsize


def _last_layer(config: LlavaConfig, dtype: ElementType, lora_rank: int) -> int:
    """Bytes per token that the last layer keeps: its keys, values and attention; see `modeling.packed`.

    Measured as for `_whole_layer`.
    """
    widths = 7 if dtype.itemsize == FP32.itemsize else 9
    return (widths * int(config.text_config.hidden_size) + 3 * lora_rank) * dtype.itemsize


def _layer_products(config: LlavaConfig) -> int:
    """Elements per token that selective checkpointing keeps: outputs of the seven linear layers and of attention."""
    text = config.text_config
    queries, keys = attention_widths(text)
    return 2 * queries + 2 * keys + 2 * int(text.hidden_size) + 2 * int(text.intermediate_size)
