"""GGUF files: written tensor by tensor, then read back and compared with what they were made from.

Format: the GGUF specification of ggml, version 3; quantisers and reader are those of the `gguf` library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.gguf_reader import ReaderTensor
from gguf.quants import dequantize, quantize

from lora_llava.errors import ArtifactError, ModelError
from lora_llava.system.progress import counting

OutType = Literal["f32", "f16", "q8_0", "q4_0"]

Fields = dict[str, tuple[Any, GGUFValueType]]
"""Metadata by key; of an array, the type is that of its elements."""

F32, F16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16
_QUANTIZED = {"q8_0": GGMLQuantizationType.Q8_0, "q4_0": GGMLQuantizationType.Q4_0}
_FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
}
_QUANTIZATION_VERSION = 2

_STEPS = {GGMLQuantizationType.Q8_0: (127, 0.5), GGMLQuantizationType.Q4_0: (8, 1.0)}
"""Of a block, the steps up to its largest magnitude, and the most that a value is off, in steps.

Q4_0 has one step less on the side that its largest value is not on.
"""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a GGUF file."""

    name: str
    shape: tuple[int, ...]
    """Rows first, as in numpy; the file has it in reverse."""
    kind: GGMLQuantizationType
    read: Callable[[], torch.Tensor]
    """Gives what it is made from, when it is needed."""
    heads: int = 0
    """Attention heads whose rows are put in the order of `interleave`; 0: rows stay as they are."""


def string(value: str) -> tuple[str, GGUFValueType]:
    """Metadata: text."""
    return value, GGUFValueType.STRING


def integer(value: int) -> tuple[int, GGUFValueType]:
    """Metadata: a number that counts."""
    return int(value), GGUFValueType.UINT32


def real(value: float) -> tuple[float, GGUFValueType]:
    """Metadata: a number that measures, kept in 32 bits."""
    return float(np.float32(value)), GGUFValueType.FLOAT32


def boolean(value: bool) -> tuple[bool, GGUFValueType]:
    """Metadata: yes or no."""
    return bool(value), GGUFValueType.BOOL


def reals(values: Sequence[float]) -> tuple[list[float], GGUFValueType]:
    """Metadata: several numbers."""
    return [float(np.float32(value)) for value in values], GGUFValueType.FLOAT32


def integers(values: Sequence[int]) -> tuple[list[int], GGUFValueType]:
    """Metadata: several whole numbers."""
    return [int(value) for value in values], GGUFValueType.INT32


def strings(values: Sequence[str]) -> tuple[list[str], GGUFValueType]:
    """Metadata: several texts."""
    return list(values), GGUFValueType.STRING


def general_fields(name: str, kind: str, outtype: OutType) -> Fields:
    """Metadata that every file has; `kind` is `model`, `mmproj` or `adapter`."""
    return {
        "general.type": string(kind),
        "general.name": string(name),
        "general.file_type": integer(_FILE_TYPES[outtype]),
        "general.quantization_version": integer(_QUANTIZATION_VERSION),
    }


def kind_of(shape: tuple[int, ...], outtype: OutType, *, keep_8_bits: bool = False) -> GGMLQuantizationType:
    """Choose how a tensor is stored: vectors in f32, rows that do not divide into blocks in f16.

    With `keep_8_bits` q4_0 becomes q8_0: embeddings and head suffer most, and llama.cpp spares them too.
    """
    if outtype == "f32" or len(shape) == 1:
        return F32
    wanted = _QUANTIZED.get("q8_0" if keep_8_bits and outtype == "q4_0" else outtype, F16)
    return wanted if shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0 else F16


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a query or key projection, (heads * width, ...), from transformers' rotary order to ggml's.

    Rotary embeddings turn pairs of rows: transformers pairs i with i + width / 2, ggml's `llama` 2i with 2i + 1.
    """
    width = rows.shape[0] // heads
    return rows.reshape(heads, 2, width // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def deinterleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo `interleave`."""
    width = rows.shape[0] // heads
    return rows.reshape(heads, width // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path: Path, architecture: str, fields: Fields, tensors: Sequence[Tensor]) -> None:
    """Write a file, holding one tensor at a time. Raises ModelError for a value that its type cannot hold."""
    writer = GGUFWriter(path, architecture)
    for key, (value, kind) in fields.items():
        if isinstance(value, list):
            writer.add_key_value(key, value, GGUFValueType.ARRAY, sub_type=kind)
        else:
            writer.add_key_value(key, value, kind)
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), _size(tensor.shape, tensor.kind), raw_dtype=tensor.kind
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with counting(f"writing {path.name}", len(tensors)) as advance:
            for tensor in tensors:
                writer.write_tensor_data(_encoded(tensor))
                advance(1)
    finally:
        writer.close()


def _size(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // int(block) * int(size)


def _values(tensor: Tensor) -> np.ndarray:
    """Read what a tensor is made from, in fp32."""
    values: np.ndarray = tensor.read().float().reshape(tensor.shape).contiguous().numpy()
    return values


def _encoded(tensor: Tensor) -> np.ndarray:
    values = _values(tensor)
    if tensor.heads:
        values = np.ascontiguousarray(interleave(values, tensor.heads))
    with np.errstate(over="ignore"):
        encoded: np.ndarray = quantize(values, tensor.kind)
    if not np.isfinite(values if tensor.kind in _STEPS else encoded).all():
        raise ModelError(
            f"{tensor.name}: not finite in {tensor.kind.name.lower()}; if the model itself is sound, use --outtype f32"
        )
    return encoded


def check_gguf(path: Path, architecture: str, fields: Fields, tensors: Sequence[Tensor]) -> None:
    """Read a file back; ArtifactError unless it holds just these fields and tensors, each within its type's rounding.

    In f32 values are the same, in f16 the nearest; in blocks they are off by no more than a step.
    """
    reader = GGUFReader(path)
    found = {key: one.contents() for key, one in reader.fields.items() if not key.startswith("GGUF.")}
    wanted = {"general.architecture": architecture} | {key: value for key, (value, _) in fields.items()}
    if found != wanted:
        wrong = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
        raise _differs(path, ", ".join(wrong))
    stored = {one.name: one for one in reader.tensors}
    if strange := stored.keys() ^ {tensor.name for tensor in tensors}:
        raise _differs(path, ", ".join(sorted(strange)[:6]))
    with counting(f"checking {path.name}", len(tensors)) as advance:
        for tensor in tensors:
            _check_tensor(path, stored[tensor.name], tensor)
            advance(1)


def _check_tensor(path: Path, one: ReaderTensor, tensor: Tensor) -> None:
    if one.tensor_type != tensor.kind or tuple(reversed(one.shape.tolist())) != tensor.shape:
        raise _differs(path, tensor.name)
    # Not through the reader's map of the file, whose pages would all stay in memory.
    stored_bytes = np.fromfile(path, np.uint8, count=int(one.n_bytes), offset=int(one.data_offset))
    rows = stored_bytes.view(one.data.dtype).reshape(one.data.shape)
    values = dequantize(rows, tensor.kind).reshape(tensor.shape)
    if not _agree(deinterleave(values, tensor.heads) if tensor.heads else values, _values(tensor), tensor):
        raise _differs(path, tensor.name)


def _agree(found: np.ndarray, source: np.ndarray, tensor: Tensor) -> bool:
    if tensor.kind == F32:
        return np.array_equal(found, source)
    if tensor.kind == F16:
        return np.array_equal(found, source.astype(np.float16).astype(np.float32))
    steps, most = _STEPS[tensor.kind]
    blocks = (source.size // GGML_QUANT_SIZES[tensor.kind][0], -1)
    largest = np.abs(source.reshape(blocks)).max(axis=1, keepdims=True)
    # The step itself is stored in f16: off by 2^-11 of itself, or by 2^-25 where it is tiny.
    rounding = largest * 2.0**-11 + steps * 2.0**-25
    bound = largest * (1 + 1e-5) / steps * most + rounding
    return bool((np.abs(found - source).reshape(blocks) <= bound).all())


def _differs(path: Path, what: str) -> ArtifactError:
    return ArtifactError(f"{path.name}: {what} was written otherwise than it was read; please report it")
