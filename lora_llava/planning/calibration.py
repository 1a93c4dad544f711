"""Measure the speed of a stage's layers before it is planned: one layer at the model's widths, with random weights.

Rounded, so that two runs on one machine usually plan alike. Resumed runs take the speed of their checkpoint.
"""

from __future__ import annotations

import copy
import gc
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from lora_llava.conversation.encode import IGNORE_INDEX, Encoded
from lora_llava.data.rows import Batch, build_row
from lora_llava.modeling.attention import masked_inputs, set_attention, to_device
from lora_llava.modeling.base import quantize, undo_double_quantization
from lora_llava.modeling.fused.layer import fuse_layers
from lora_llava.modeling.packed import llava_in
from lora_llava.modeling.recompute import set_recompute
from lora_llava.modeling.stages import build_stage
from lora_llava.modeling.structure import FLEX, LANGUAGE_MODEL, Attention
from lora_llava.planning.attention import BRANCH, PREFIX, TREE
from lora_llava.planning.memory_plan import StageShapes
from lora_llava.planning.speed import OTHER_LAYERS, Speed
from lora_llava.system.device import autocast
from lora_llava.system.text import dtype_name

_SHORT = {"cuda": 128, "cpu": 16}
"""Tokens of a row whose kernels take longer to launch than to compute."""
_LONG = {"cuda": 2048, "cpu": 128}
"""Tokens of the shortest row that may take longer to compute than to launch; twice as many are timed as well."""
_LONGEST = {"cuda": 8192, "cpu": 128}
"""Tokens beyond which a longer row is not tried."""
_MIN_RATIO = 1.5
"""A row is bound by computing if it takes this many times as long as the short one."""
_PASSES, _REPEATS = 4, 3
"""Passes between two waits for the device, and how often they are timed; the shortest time counts."""
_CHAIN = 4
"""Times that the layer computes a short row in a pass, each time from its own output, so that what a pass launches
besides counts little: timed one by one, 36 layers seemed to take 1.5 times as long as a whole row took (on an H100)."""
_VOCABULARY = 64
_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, OSError)
"""What compilation and kernels raise where they do not work; a plan can be made without measuring."""


def measure_speed(shapes: StageShapes, attention: Attention, device: torch.device) -> tuple[Speed | None, str]:
    """Time a layer in rows of three lengths; return the speed of all layers, and a line for the console.

    None, with the reason in the line, if the layer cannot be timed. Random numbers are drawn from a generator aside.
    """
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            speed = _speed(_LayerTimer(shapes, attention, device).seconds, shapes, device.type)
    except _FAILURES as error:
        return None, f"speed: assumed, since it cannot be measured here ({type(error).__name__}: {error})"
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    return speed, f"speed: {speed}"


def _speed(seconds: Callable[..., float], shapes: StageShapes, device: str) -> Speed:
    """Return the speed of all layers; `seconds` times one layer, given a row's tokens and a chain's length."""
    short, tokens = seconds(_SHORT[device], _CHAIN), _LONG[device]
    once = seconds(tokens)
    while once < _MIN_RATIO * short and tokens < _LONGEST[device]:
        tokens *= 2
        once = seconds(tokens)
    twice = seconds(2 * tokens)

    # Twice the tokens take the device twice as long, but for dequantizing.
    is_computing = once >= _MIN_RATIO * short and twice > once
    token = (twice - once) / tokens if is_computing else twice / (2 * tokens)
    nf4 = shapes.quantization.type == "nf4"
    dequantizing = max(0.0, once - tokens * token) if is_computing and nf4 else 0.0
    layers = int(shapes.config.text_config.num_hidden_layers)
    return Speed(
        _rounded(short * (layers + OTHER_LAYERS)), _rounded(token * layers), _rounded(dequantizing * layers), True
    )


def _rounded(value: float) -> float:
    """Round to one and a half digits: 1, 1.5, 2, ..., 9.5 times a power of ten."""
    if value <= 0:
        return 0.0
    half = 10.0 ** math.floor(math.log10(value)) / 2
    return float(f"{round(value / half) * half:.2g}")


class _LayerTimer:
    """The first of two layers, as the stage trains it: quantized, adapted, with the attention of the run."""

    def __init__(self, shapes: StageShapes, attention: Attention, device: torch.device) -> None:
        self.device, self.attention = device, attention
        self.dtype: torch.dtype = getattr(torch, dtype_name(shapes.dtype))
        config = copy.deepcopy(shapes.config)
        text = config.text_config
        # The last layer differs from all others, so the one that is timed must not be the last.
        text.num_hidden_layers, text.vocab_size, text.pad_token_id = 2, _VOCABULARY, None
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:2]
        config.vision_config.num_hidden_layers = 1
        with torch.device(device):
            model = LlavaForConditionalGeneration(config).to(self.dtype)
        if shapes.quantization.type == "nf4":
            quantize(model, double_quant=shapes.quantization.double_quant, dtype=self.dtype)
            # Most plans have room for it.
            undo_double_quantization(model)
        self.model = build_stage(model, shapes.stage, shapes.adapter).to(device).train()
        fuse_layers(self.model)
        set_recompute(self.model, False)
        set_attention(llava_in(self.model), attention)
        self.text: Any = llava_in(self.model).get_submodule(LANGUAGE_MODEL)

    def seconds(self, tokens: int, chain: int = 1) -> float:
        """Time a forward and a backward pass over a row of `tokens` tokens, through the layer `chain` times; of one."""
        batch = to_device(_row(tokens), self.device)
        inputs = masked_inputs(batch, self.attention, self.dtype)
        mask = inputs.pop("attention_mask")
        shape = (*inputs.pop("input_ids").shape, int(self.text.config.hidden_size))
        hidden = torch.randn(shape, device=self.device, dtype=self.dtype).requires_grad_()
        inputs["position_embeddings"] = self.text.rotary_emb(hidden, position_ids=inputs["position_ids"])
        layer: nn.Module = self.text.layers[0]

        def run() -> None:
            output = hidden
            with autocast(self.device, self.dtype):
                for _ in range(chain):
                    output = layer(output, attention_mask=mask if self.attention == FLEX else None, **inputs)
            output.backward(hidden.detach())

        # The first pass compiles, the second has gradients to add to, as all later ones.
        run()
        run()
        return min(self._timed(run) for _ in range(_REPEATS)) / chain

    def _timed(self, run: Callable[[], None]) -> float:
        self._wait()
        started = time.perf_counter()
        for _ in range(_PASSES):
            run()
        self._wait()
        return (time.perf_counter() - started) / _PASSES

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _row(tokens: int) -> Batch:
    """Build a row of `tokens` tokens, of trees with an image's prefix and short branches."""
    lengths = [TREE] * (tokens // TREE) + ([tokens % TREE] if tokens % TREE else [])
    return build_row([_tree(length) for length in lengths])


def _tree(length: int) -> list[Encoded]:
    prefix = min(PREFIX, length // 2)
    own = [min(BRANCH, length - start) for start in range(prefix, length, BRANCH)]
    return [Encoded([1] * (prefix + size), [IGNORE_INDEX] * (prefix + size - 1) + [1], prefix) for size in own]
