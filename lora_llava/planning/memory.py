"""Estimate the memory of a stage from its shapes: weights, gradients, optimizer states, activations."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import LlavaConfig

from lora_llava.data.packing import conversations, row_length
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
_GATHERED_LAYERS = 3
"""Decoder layers whose sharded weights are whole at one time: one computes, the next one is received and unpacked."""
_OFFLOAD_BYTES = 2**28
"""Gradients of one part on the device while DeepSpeed takes them to the host: two copies of a bucket of 64 MiB, the
largest weight, and those of a layer that wait for their turn. An upper estimate, not measured on CUDA."""
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
class LayerSettings:
    """What decides, besides the shapes of the model, how much its decoder layers keep for the backward pass."""

    dtype: ElementType
    """Compute precision."""
    lora_rank: int = 0
    """0: without LoRA."""
    lora_parameters: int = 0
    """Of all layers together."""
    attention: Attention = TREES
    is_fused: bool = True
    """Whether all layers but the last are fused; see `modeling.fused`."""


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


def plain_scale_bytes(config: LlavaConfig) -> int:
    """Return what `undo_double_quantization` adds to the memory of the NF4 weights."""
    return round(linear_weights(config) * (_NF4_BYTES[False] - _NF4_BYTES[True]))


def sharded(
    parameters: list[PartParameters], config: LlavaConfig, bytes_per_weight: float, processes: int
) -> list[PartParameters]:
    """Return `parameters` with the language model's linear layers divided between `processes` processes.

    `bytes_per_weight`: of what is divided; the scales of 4-bit weights stay whole.
    """
    if processes == 1:
        return parameters
    whole = linear_weights(config) * bytes_per_weight
    gathered = _GATHERED_LAYERS * whole / int(config.text_config.num_hidden_layers)
    held = min(whole, whole / processes + gathered)
    return [
        replace(part, bytes=part.bytes - round(whole - held)) if part.part == LANGUAGE_MODEL else part
        for part in parameters
    ]


def expected_memory(optim: str, parameters: list[PartParameters], *, offloads: bool = False) -> list[PartMemory]:
    """Estimate weights, gradients and AdamW's two moments of each part; trainable parameters are fp32.

    `offloads`: gradients and moments are on the host, and a bucket of gradients on the device.
    """
    if offloads:
        return [PartMemory(part.part, part.bytes, min(_OFFLOAD_BYTES, 4 * part.trainable), 0) for part in parameters]
    moments = 2 if "8bit" in optim else 8
    return [PartMemory(part.part, part.bytes, 4 * part.trainable, moments * part.trainable) for part in parameters]


def largest_row(data: StageData) -> tuple[int, int]:
    """Return the most tokens, and the most supervised tokens, of any micro-batch."""
    rows = [row for step in data.plan.steps for row in step if row]
    supervised = (sum(data.encoded.num_supervised[index] for index in conversations([row])) for row in rows)
    return max(row_length(row, data.encoded.items) for row in rows), max(supervised)


def activation_bytes(
    config: LlavaConfig, layer: LayerSettings, recompute: Recompute, tokens: int, supervised: int
) -> int:
    """Estimate the peak memory of a micro-batch besides weights, gradients and optimizer states.

    The micro-batch has `tokens` tokens, `supervised` of them with a loss. Sizes are in bytes per token until the end.
    """
    text, itemsize = config.text_config, layer.dtype.itemsize
    width, mlp_width = int(text.hidden_size), int(text.intermediate_size)
    inputs, whole, last = width * itemsize, layer_elements(config, layer) * itemsize, _last_layer(config, layer)

    # How many layers keep what. The last one is neither checkpointed nor computed at every position.
    checkpointable = int(text.num_hidden_layers) - 1
    if recompute.policy == "selective":
        full = min(recompute.full_layers, checkpointable)
    else:
        full = checkpointable if recompute.policy is True else 0
    rest = checkpointable - full
    is_selective = recompute.policy == "selective" and not layer.is_fused
    rest_bytes = inputs + _layer_products(config) * itemsize if is_selective else whole

    # The peak is at the start of the backward pass, with the last layer or one recomputed layer whole; or, since full
    # layers come first and the backward pass reaches them when the rest is freed, while one of them is recomputed.
    peak_at_start = full * inputs + rest * rest_bytes + max(last, whole - rest_bytes if rest else 0)
    peak_in_full_layers = full * inputs + (whole - inputs if full else 0)
    layers = max(peak_at_start, peak_in_full_layers)

    # Workspace of one layer's backward pass, measured: 5 hidden and 2 intermediate widths.
    layers += (5 * width + 2 * mlp_width) * itemsize

    # SDPA's masks cover the branches after the first, in the model's precision; FlexAttention's is boolean and exists
    # while its blocks are built.
    mask = tokens * tokens * (1 if layer.attention == FLEX else _MASKED_SHARE * itemsize)

    # Logits of one chunk in the model's precision, then in fp32, and their gradient.
    logits = min(supervised, HEAD_CHUNK) * int(text.vocab_size) * (itemsize + 8)

    # LoRA's factors in the compute precision: copies of fused layers, or those that autocast makes.
    copies = layer.lora_parameters * itemsize if layer.is_fused or itemsize != FP32.itemsize else 0
    return round(tokens * layers + mask + logits + copies)


def held_bytes(activations: int, recompute: Recompute, device: str) -> int:
    """Return the memory that the process holds for `activations` live bytes; see CPU_HEAP."""
    return round(activations * CPU_HEAP) if device == "cpu" and recompute.policy is not False else activations


def layer_elements(config: LlavaConfig, layer: LayerSettings) -> int:
    """Count the elements a token that a decoder layer keeps if it is not checkpointed.

    A fused layer keeps its input and the residual after attention; queries, keys, values and attention's output twice
    (as attention returns it, and joined over the trees or copied by FlexAttention); gate and up; the inner products of
    its seven adapters. A test measures the same. SDPA's keys and values are repeated for each query head.

    With PEFT's path, measured on Llama layers: in fp32, 9 hidden and 4 intermediate widths, and the inner products; in
    bf16 the two norms keep fp32 copies as well.
    """
    text = config.text_config
    width, mlp_width, inner = int(text.hidden_size), int(text.intermediate_size), 7 * layer.lora_rank
    if layer.is_fused:
        queries, keys = attention_widths(text)
        return 2 * width + 3 * queries + 2 * (keys if layer.attention == FLEX else queries) + 2 * mlp_width + inner
    widths = 9 if layer.dtype.itemsize == FP32.itemsize else 13
    return widths * width + 4 * mlp_width + inner


def _last_layer(config: LlavaConfig, layer: LayerSettings) -> int:
    """Bytes per token that the last layer keeps: its keys, values and attention; see `modeling.packed`.

    Measured as for `layer_elements`.
    """
    widths = 7 if layer.dtype.itemsize == FP32.itemsize else 9
    return (widths * int(config.text_config.hidden_size) + 3 * layer.lora_rank) * layer.dtype.itemsize


def _layer_products(config: LlavaConfig) -> int:
    """Elements per token that selective checkpointing keeps: outputs of the seven linear layers and of attention."""
    text = config.text_config
    queries, keys = attention_widths(text)
    return 2 * queries + 2 * keys + 2 * int(text.hidden_size) + 2 * int(text.intermediate_size)
