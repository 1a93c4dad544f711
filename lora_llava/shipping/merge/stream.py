"""The base as the adapter saw it in training, and the merged weights, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from lora_llava.artifact import Manifest
from lora_llava.errors import ArtifactError
from lora_llava.formats.llava_hf import WeightFiles
from lora_llava.formats.names import LAYERS_PREFIX
from lora_llava.formats.peft_adapter import Adapter
from lora_llava.system.text import dtype_name

BaseKind = Literal["dequantized", "original"]
"""`dequantized`: the language model through NF4 and back, as the adapter saw it in training; `original`: as stored."""

Read = Callable[[str], torch.Tensor]
"""Gives the tensor of a canonical name."""


def training_dtype(manifest: Manifest) -> torch.dtype:
    """Return the precision in which the base was held in training."""
    name = manifest.quantization.get("compute_dtype")
    if name is None:
        # Artifacts from before it was written down: fp32 on a CPU, bf16 elsewhere, as `pick_dtype` has it.
        name = "float32" if str(manifest.versions.get("torch", "")).endswith("+cpu") else "bfloat16"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def is_quantized_in_training(name: str) -> bool:
    """Tell whether NF4 applies to a weight: the linear layers inside the language model's blocks."""
    return name.startswith(LAYERS_PREFIX) and name.endswith("_proj.weight")


def through_nf4(weight: torch.Tensor, *, dtype: torch.dtype, double_quant: bool) -> torch.Tensor:
    """Quantise a weight as `load_base` does and return what its layer then computes with.

    Contract: `dtype` is the precision of the weights when they were quantised and of the computation; the block
    size and the type of bitsandbytes are those of `quantization_config`.
    """
    packed, state = quantize_4bit(weight.to(dtype).contiguous(), compress_statistics=double_quant, quant_type="nf4")
    values: torch.Tensor = dequantize_4bit(packed, state)
    return values.to(dtype)


def base_reader(files: WeightFiles, manifest: Manifest, kind: BaseKind) -> Read:
    """Return a function that reads the base's weights: `dequantized` as they were in training, `original` as stored."""
    if kind == "original":
        return files.read
    dtype = training_dtype(manifest)
    double_quant = bool(manifest.quantization["double_quant"])

    def read(name: str) -> torch.Tensor:
        tensor = files.read(name)
        if is_quantized_in_training(name):
            return through_nf4(tensor, dtype=dtype, double_quant=double_quant)
        # Everything but the projector, which is replaced, was held in this precision too.
        return tensor.to(dtype)

    return read


def merged_reader(
    files: WeightFiles,
    read: Read,
    adapter: Adapter,
    dtype: torch.dtype | None,
    *,
    only: Collection[str] | None = None,
) -> Read:
    """Return a function that gives the merged weights, in `dtype` (None: that of the base's file).

    `only` names the weights to fold (None: all that the adapter changes). It raises ArtifactError for a folded
    weight that is not finite in this precision.
    """
    changed = set(adapter if only is None else only)

    def merged(name: str) -> torch.Tensor:
        tensor = read(name)
        if name in changed:
            tensor = adapter.merge(name, tensor)
        tensor = tensor.to(dtype or files.dtype(name))
        if name in changed and not torch.isfinite(tensor).all():
            raise ArtifactError(f"{name}: not finite in {dtype_name(tensor.dtype)} once merged; use --dtype float32")
        return tensor

    return merged
