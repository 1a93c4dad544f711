"""The weights of a model by the headers of its safetensors files: which tensors, of what shape and type, and whole."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_llava.errors import ModelError
from lora_llava.formats.names import BUFFERS, HEAD, canonical_name
from lora_llava.planning.preflight.model.shapes import Shape
from lora_llava.system.text import listed

_INDEX = "*.safetensors.index.json"
_PICKLED = ("pytorch_model*.bin", "*.pt", "*.pth")
_LENGTH = 8
"""Bytes at the start of a safetensors file that hold the length of its header."""
_MOST_HEADER = 100_000_000
"""Longest header in bytes, as the safetensors library allows."""
_PLAIN_TYPES = ("F64", "F32", "F16", "BF16")
_NAMED = 3


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor as a header describes it."""

    dtype: str
    shape: Shape


@dataclass(slots=True)
class Weights:
    """The safetensors files of a directory."""

    tensors: dict[str, Tensor]
    """By the names in the files."""
    bytes: int
    problem: tuple[str, str] | None = None
    """Why they cannot be used: what was found, and what to do."""


def read_weights(directory: Path) -> Weights:
    """Read the headers of all safetensors files; what is missing, empty or cut off is the problem of the result."""
    files = sorted(directory.glob("*.safetensors"))
    named = sorted(_indexed(directory))
    if missing := [name for name in named if not (directory / name).exists()]:
        what = f"{directory}: {listed(missing, _NAMED)} of its index {'is' if len(missing) == 1 else 'are'} missing"
        return Weights({}, 0, (what, "Download the model again."))
    if not files:
        return Weights({}, 0, _no_weights(directory))
    weights = Weights({}, sum(file.stat().st_size for file in files))
    for file in files:
        try:
            weights.tensors |= read_header(file)
        except ModelError as error:
            weights.problem = (str(error), "Download the file again.")
            break
    return weights


def read_header(file: Path) -> dict[str, Tensor]:
    """Read which tensors a safetensors file holds; ModelError if the file is damaged or cut off."""
    size = file.stat().st_size
    if size == 0:
        raise ModelError(f"{file} is empty")
    try:
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(_LENGTH), "little")
            if not 0 < length <= min(size - _LENGTH, _MOST_HEADER):
                raise ModelError(
                    f"{file} is damaged or cut off: it holds {size:,} bytes, which is less than its header"
                )
            header: dict[str, Any] = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        end = max((int(one["data_offsets"][1]) for one in header.values()), default=0)
        tensors = {name: Tensor(str(one["dtype"]), tuple(map(int, one["shape"]))) for name, one in header.items()}
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise ModelError(f"{file} is damaged: its header cannot be read") from error
    if size != _LENGTH + length + end:
        raise ModelError(
            f"{file} is damaged or cut off: it holds {size:,} bytes, {_LENGTH + length + end:,} are needed"
        )
    return tensors


def odd_type(tensors: dict[str, Tensor]) -> str | None:
    """Name the type of a weight that is none of the plain ones, as those of quantized models are; None if all are."""
    odd = [one.dtype for name, one in tensors.items() if one.dtype not in _PLAIN_TYPES and not name.endswith(BUFFERS)]
    return odd[0] if odd else None


def misfits(tensors: dict[str, Tensor], wanted: dict[str, Shape], *, prefix: str, extra: bool) -> list[str]:
    """Say which tensors are missing, of another shape or, unless `extra` is allowed, too many.

    `wanted` has canonical names; `prefix` is what the file's names lack in front.
    """
    found: dict[str, Shape] = {}
    wrong = []
    for name, tensor in tensors.items():
        if name.endswith(BUFFERS):
            continue
        try:
            found[canonical_name(prefix + name)] = tensor.shape
        except ModelError:
            wrong += [] if extra else [f"{name} does not belong to it"]
    wrong += [f"{name} is missing" for name in wanted if name not in found]
    # A head that is tied to the embeddings may be stored all the same.
    wrong += [] if extra else [f"{name} does not belong to it" for name in found if name not in wanted and name != HEAD]
    wrong += [
        f"{name} is {found[name]}, must be {shape}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    return wrong


def shown(wrong: Iterable[str]) -> str:
    """Join what is wrong, the first few named."""
    return listed(list(wrong), _NAMED, separator="; ")


def _indexed(directory: Path) -> Iterator[str]:
    """Yield the names of the files that an index of the directory names."""
    for path in directory.glob(_INDEX):
        try:
            places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            yield from {str(name) for name in places.values()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            yield path.name + " (damaged)"


def _no_weights(directory: Path) -> tuple[str, str]:
    pickled = sorted(path.name for pattern in _PICKLED for path in directory.glob(pattern))
    if not pickled:
        return f"{directory} holds no weights (.safetensors)", "Download the whole model."
    return (
        f"{directory} holds pickled weights alone ({listed(pickled, _NAMED)}); they can run code and are not read",
        "Convert them to safetensors first: load the model with transformers, then save_pretrained(...).",
    )
