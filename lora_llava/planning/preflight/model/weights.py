"""Read the headers of a model's safetensors files: its tensors, their shapes and types, and whether it is complete."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_llava.errors import ModelError
from lora_llava.formats.names import BUFFERS, HEAD, canonical_name
from lora_llava.formats.shapes import Shape, misfits
from lora_llava.formats.weight_files import NoWeightsError, weight_files
from lora_llava.system.text import listed, printable

_LENGTH = 8
"""Bytes at the start of a safetensors file that hold the length of its header."""
_MAX_HEADER = 100_000_000
"""Longest header that the safetensors library allows, in bytes."""
_TYPES = frozenset(
    "F64 F32 F16 BF16 I64 I32 I16 I8 U64 U32 U16 U8 BOOL C64 F8_E4M3 F8_E5M2 F8_E8M0 F6_E2M3 F6_E3M2 F4".split()
)
"""All types of the safetensors format."""
_UNQUANTIZED_TYPES = ("F64", "F32", "F16", "BF16")
_NAMED = 3


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor by its header."""

    dtype: str
    shape: Shape


@dataclass(slots=True)
class Weights:
    """The weights that transformers loads from a directory."""

    tensors: dict[str, Tensor]
    """By the names in the files."""
    bytes: int
    problem: tuple[str, str] | None = None
    """Why they cannot be used: what is wrong, and what to do."""


def read_weights(directory: Path) -> Weights:
    """Read the headers of the files that are loaded; a missing, empty or truncated one is the result's `problem`."""
    try:
        files = weight_files(directory)
    except NoWeightsError as error:
        return Weights({}, 0, (error.what, error.fix))
    weights = Weights({}, sum(file.stat().st_size for file in files))
    for file in files:
        try:
            weights.tensors |= read_header(file)
        except ModelError as error:
            weights.problem = (str(error), "Download the file again.")
            break
    return weights


def read_header(file: Path) -> dict[str, Tensor]:
    """Read which tensors a safetensors file has. Raises ModelError if the file is damaged or truncated."""
    size = file.stat().st_size
    if size == 0:
        raise ModelError(f"{file} is empty")
    try:
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(_LENGTH), "little")
            if not 0 < length <= min(size - _LENGTH, _MAX_HEADER):
                raise ModelError(
                    f"{file} is damaged or cut off: it holds {size:,} bytes, which is less than its header"
                )
            header: dict[str, Any] = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        spans = sorted((int(entry["data_offsets"][0]), int(entry["data_offsets"][1])) for entry in header.values())
        tensors = {name: Tensor(str(entry["dtype"]), tuple(map(int, entry["shape"]))) for name, entry in header.items()}
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise ModelError(f"{file} is damaged: its header cannot be read") from error
    end = 0
    for start, stop in spans:
        # By the format, tensors follow each other without gaps.
        if start != end or stop < start:
            raise ModelError(f"{file} is damaged: its header places tensors outside of it or over each other")
        end = stop
    if unknown := {tensor.dtype for tensor in tensors.values()} - _TYPES:
        raise ModelError(f"{file} is damaged: it has no type {printable(min(unknown), 20)}")
    if size != _LENGTH + length + end:
        raise ModelError(
            f"{file} is damaged or cut off: it holds {size:,} bytes, {_LENGTH + length + end:,} are needed"
        )
    return tensors


def odd_type(tensors: dict[str, Tensor]) -> str | None:
    """Return the type of a weight that is quantized, judging by its type; None if there is none."""
    dtypes = [tensor.dtype for name, tensor in tensors.items() if not name.endswith(BUFFERS)]
    return next((dtype for dtype in dtypes if dtype not in _UNQUANTIZED_TYPES), None)


def wrong_tensors(tensors: dict[str, Tensor], expected: dict[str, Shape], *, prefix: str, extra: bool) -> list[str]:
    """List the tensors that are missing, of another shape or, unless `extra` is allowed, unexpected.

    `expected` has canonical names; `prefix` is what the names in the file lack.
    """
    actual: dict[str, Shape] = {}
    wrong = []
    for name, tensor in tensors.items():
        if name.endswith(BUFFERS):
            continue
        try:
            actual[canonical_name(prefix + name)] = tensor.shape
        except ModelError:
            wrong += [] if extra else [f"{name} does not belong to it"]
    # A head that is tied to the embeddings may be stored as well.
    actual = {name: shape for name, shape in actual.items() if name in expected or not (extra or name == HEAD)}
    return [*wrong, *misfits(actual, expected)]


def shown(wrong: Iterable[str]) -> str:
    """Join the first few problems, and count the rest."""
    return listed(list(wrong), _NAMED, separator="; ")
