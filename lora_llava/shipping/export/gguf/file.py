"""Write GGUF files tensor by tensor, and check them against their source.

Format: the GGUF specification of ggml, version 3, through the `gguf` library's writer, quantizers and reader.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    GGML_QUANT_VERSION,
    GGMLQuantizationType,
    GGUFReader,
    GGUFValueType,
    GGUFWriter,
    Keys,
    LlamaFileType,
)
from gguf.gguf_reader import ReaderTensor
from gguf.quants import dequantize, quantize

from lora_llava.errors import ArtifactError, ModelError
from lora_llava.system.progress import counting

OutType = Literal["f32", "f16", "q8_0", "q4_0"]

Fields = dict[str, Any]
"""Metadata by key: text, boolean, count (uint32) or float (32 bits), or a list of texts, integers (int32) or floats."""

F32, F16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16
_QUANTIZED = {"q8_0": GGMLQuantizationType.Q8_0, "q4_0": GGMLQuantizationType.Q4_0}
_FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
}

_STEPS = {GGMLQuantizationType.Q8_0: (127, 0.5), GGMLQuantizationType.Q4_0: (8, 1.0)}
"""By block type: steps up to a block's largest magnitude, and the largest error of a value, in steps.

Q4_0 has one step less on the side opposite to its largest value, hence a whole step instead of half of one.
"""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a GGUF file."""

    name: str
    shape: tuple[int, ...]
    """Rows first, as in numpy; the file holds it reversed."""
    kind: GGMLQuantizationType
    read: Callable[[], torch.Tensor]
    """Reads the source, in any float dtype; called twice, to write and to check."""
    heads: int = 0
    """Attention heads whose rows `interleave` reorders; 0: rows keep their order."""


def general_fields(name: str, kind: str, outtype: OutType) -> Fields:
    """Return the metadata that every file has; `kind` is `model`, `mmproj` or `adapter`."""
    return {
        Keys.General.TYPE: kind,
        Keys.General.NAME: name,
        Keys.General.FILE_TYPE: int(_FILE_TYPES[outtype]),
        Keys.General.QUANTIZATION_VERSION: GGML_QUANT_VERSION,
    }


def kind_of(shape: tuple[int, ...], outtype: OutType, *, keep_8_bits: bool = False) -> GGMLQuantizationType:
    """Choose the type of a tensor: f32 for vectors, f16 if its rows do not divide into blocks, else `outtype`.

    `keep_8_bits` turns q4_0 into q8_0: embeddings and lm_head lose most by 4 bits, and llama.cpp's own quantization
    keeps them wider too.
    """
    if outtype == "f32" or len(shape) == 1:
        return F32
    kind = _QUANTIZED.get("q8_0" if keep_8_bits and outtype == "q4_0" else outtype, F16)
    return kind if shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else F16


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a query or key projection, (heads * width, ...), from transformers' rotary order to ggml's.

    Rotary embeddings rotate pairs of rows: transformers pairs i with i + width / 2, ggml's `llama` 2i with 2i + 1.
    """
    width = rows.shape[0] // heads
    return rows.reshape(heads, 2, width // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def deinterleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo `interleave`."""
    width = rows.shape[0] // heads
    return rows.reshape(heads, width // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path: Path, architecture: str, fields: Fields, tensors: Sequence[Tensor]) -> None:
    """Write a file, one tensor in memory at a time, and read it back.

    It must hold exactly these fields and tensors, up to each type's rounding: f32 values are equal, f16 values the
    nearest ones; in blocks the error is at most one step. Raises ArtifactError if it does not, or if the disk takes no
    more, and ModelError for a value that is not finite in its type.
    """
    try:
        _write(GGUFWriter(path, architecture), path.name, fields, tensors)
    except OSError as error:
        # numpy's error of a full disk says how many items were written, and no file.
        needed = sum(_size(tensor.shape, tensor.kind) for tensor in tensors) / 2**20
        free = shutil.disk_usage(path.parent).free / 2**20
        raise ArtifactError(
            f"{path.name} cannot be written ({error}): it needs {needed:,.0f} MiB, and its disk has {free:,.0f} MiB "
            "left. Nothing was written; free some space, or name an output on another disk."
        ) from error
    _check(path, architecture, fields, tensors)


def _write(writer: GGUFWriter, name: str, fields: Fields, tensors: Sequence[Tensor]) -> None:
    for key, value in fields.items():
        kind = GGUFValueType.get_type(value)
        # A single integer is a count; those of a list have a sign.
        writer.add_key_value(key, value, GGUFValueType.UINT32 if kind == GGUFValueType.INT32 else kind)
    # The header needs the shapes and sizes of all tensors before the first one is read.
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), _size(tensor.shape, tensor.kind), raw_dtype=tensor.kind
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with counting(f"writing {name}", len(tensors)) as advance:
            for tensor in tensors:
                writer.write_tensor_data(_encoded(tensor))
                advance(1)
    finally:
        writer.close()


def _size(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // int(block) * int(size)


def _values(tensor: Tensor) -> np.ndarray:
    """Read the source of a tensor in fp32."""
    values: np.ndarray = tensor.read().float().reshape(tensor.shape).contiguous().numpy()
    return values


def _encoded(tensor: Tensor) -> np.ndarray:
    values = _values(tensor)
    if tensor.heads:
        values = np.ascontiguousarray(interleave(values, tensor.heads))
    # Overflow in f16 is an error of ours below, not a warning of numpy's.
    with np.errstate(over="ignore"):
        encoded: np.ndarray = quantize(values, tensor.kind)
    if not np.isfinite(values if tensor.kind in _STEPS else encoded).all():
        raise ModelError(
            f"{tensor.name}: not finite in {tensor.kind.name.lower()}; if the model itself is finite, use --outtype f32"
        )
    return encoded


def as_stored(tensor: Tensor) -> torch.Tensor:
    """Return the values of a tensor after the rounding of its type, in fp32 and in the order of their source."""
    values = dequantize(quantize(_values(tensor), tensor.kind), tensor.kind)
    return torch.from_numpy(np.ascontiguousarray(values.reshape(tensor.shape), dtype=np.float32))


def _check(path: Path, architecture: str, fields: Fields, tensors: Sequence[Tensor]) -> None:
    reader = GGUFReader(path)
    written = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    expected = {Keys.General.ARCHITECTURE: architecture} | {key: _rounded(value) for key, value in fields.items()}
    if written != expected:
        wrong = sorted(key for key in written.keys() | expected.keys() if written.get(key) != expected.get(key))
        raise _differs(path, ", ".join(wrong))
    stored = {tensor.name: tensor for tensor in reader.tensors}
    if unmatched := stored.keys() ^ {tensor.name for tensor in tensors}:
        raise _differs(path, ", ".join(sorted(unmatched)[:6]))
    with counting(f"checking {path.name}", len(tensors)) as advance:
        for tensor in tensors:
            _check_tensor(path, stored[tensor.name], tensor)
            advance(1)


def _rounded(value: Any) -> Any:
    """Round the floats of a field to 32 bits, as the file holds them."""
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(np.float32(value)) if isinstance(value, float) else value


def _check_tensor(path: Path, stored: ReaderTensor, tensor: Tensor) -> None:
    if stored.tensor_type != tensor.kind or tuple(reversed(stored.shape.tolist())) != tensor.shape:
        raise _differs(path, tensor.name)
    # Not through the reader's memory map of the file: its pages would all stay in memory.
    stored_bytes = np.fromfile(path, np.uint8, count=int(stored.n_bytes), offset=int(stored.data_offset))
    rows = stored_bytes.view(stored.data.dtype).reshape(stored.data.shape)
    values = dequantize(rows, tensor.kind).reshape(tensor.shape)
    if not _agree(deinterleave(values, tensor.heads) if tensor.heads else values, _values(tensor), tensor):
        raise _differs(path, tensor.name)


def _agree(values: np.ndarray, source: np.ndarray, tensor: Tensor) -> bool:
    if tensor.kind == F32:
        return np.array_equal(values, source)
    if tensor.kind == F16:
        return np.array_equal(values, source.astype(np.float16).astype(np.float32))
    steps, max_error = _STEPS[tensor.kind]
    blocks = (source.size // GGML_QUANT_SIZES[tensor.kind][0], -1)
    largest = np.abs(source.reshape(blocks)).max(axis=1, keepdims=True)
    # The step is stored in f16: a relative error of 2^-11, or an absolute one of 2^-25 where it is tiny.
    rounding = largest * 2.0**-11 + steps * 2.0**-25
    bound = largest * (1 + 1e-5) / steps * max_error + rounding
    return bool((np.abs(values - source).reshape(blocks) <= bound).all())


def _differs(path: Path, what: str) -> ArtifactError:
    return ArtifactError(f"{path.name}: {what} differs between the file and its source; please report it")
