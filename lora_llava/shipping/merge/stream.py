"""Read the base as it was in training, and the merged weights, one tensor at a time."""

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
"""`dequantized`: the language model quantized to NF4 and dequantized, as in training; `original`: as stored."""

Read = Callable[[str], torch.Tensor]
"""Reads the tensor of a canonical name."""


def _training_dtype(manifest: Manifest) -> torch.dtype:
    """Return the dtype that the base had in training."""
    name = manifest.quantization.get("compute_dtype")
    if name is None:
        # Old artifacts do not record it: fp32 on a CPU, bf16 elsewhere, as `pick_dtype` chooses.
        name = "float32" if str(manifest.versions.get("torch", "")).endswith("+cpu") else "bfloat16"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def through_nf4(weight: torch.Tensor, *, dtype: torch.dtype, double_quant: bool) -> torch.Tensor:
    """Quantize a weight to NF4 as `load_base` does, and return the values that its layer computes with.

    Contract: `dtype` is that of the weights before quantization and of the computation; block size and quantization
    type are those of `quantization_config`.
    """
    packed, state = quantize_4bit(weight.to(dtype).contiguous(), compress_statistics=double_quant, quant_type="nf4")
    values: torch.Tensor = dequantize_4bit(packed, state)
    return values.to(dtype)


def base_reader(files: WeightFiles, manifest: Manifest, kind: BaseKind) -> Read:
    """Return a reader of the base's weights: `dequantized` as in training, `original` as stored."""
    if kind == "original":
        return files.read
    dtype = _training_dtype(manifest)
    double_quant = bool(manifest.quantization["double_quant"])

    def read(name: str) -> torch.Tensor:
        tensor = files.read(name)
        # Training quantizes the linear layers of the decoder layers.
        if name.startswith(LAYERS_PREFIX) and name.endswith("_proj.weight"):
            return through_nf4(tensor, dtype=dtype, double_quant=double_quant)
        # The other weights had this dtype in training too. The projector had fp32, but the adapter replaces it.
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
    """Return a reader of the merged weights, in `dtype` (None: that of the base's file).

    `only`: names of the weights to merge; None: all that the adapter changes. The reader raises ArtifactError for a
    merged weight that is not finite in this dtype.
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
