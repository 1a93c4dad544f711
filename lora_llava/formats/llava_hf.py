"""Weights in the llava-hf layout: safetensors files, read and written one tensor at a time.

transformers reads several spellings of the tensor names and writes the one that it read; other readers (vLLM,
llama.cpp's converters) know only the names that llava-hf publishes. The kit writes those.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import LlavaConfig, LlavaForConditionalGeneration

from lora_llava.errors import ArtifactError, ModelError
from lora_llava.formats.names import BUFFERS, HEAD, canonical_name
from lora_llava.formats.shapes import LlavaShape, misfits
from lora_llava.formats.weight_files import INDEX, SINGLE, weight_files
from lora_llava.system.text import first_line, listed

MAX_SHARD_BYTES = 5 * 10**9
"""The size of llava-hf's shards. A merge holds one shard in memory."""

_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""The end of an error of safetensors, which is written in Rust, with the number of the operating system's error."""
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def expected_shapes(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor on disk of a model of this configuration, by canonical name.

    An lm_head that is tied to the embeddings is not stored.
    """
    return dict(LlavaShape.of(config.to_dict()).tensors())


@contextmanager
def open_weights(file: Path) -> Iterator[Any]:
    """Open a safetensors file to read its tensors. Raises ModelError, which names the file, if it is damaged."""
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror or first_line(error)}; download it again") from error
    except SafetensorError as error:
        raise ModelError(f"{file} is damaged or cut off ({first_line(error)}); download it again") from error


def read_tensor(file: Path, name: str) -> torch.Tensor:
    """Read one tensor of a safetensors file. The file is opened for it alone, so that nothing else stays in memory."""
    with open_weights(file) as handle:
        tensor: torch.Tensor = handle.get_tensor(name)
    return tensor


class WeightFiles:
    """The tensors that transformers loads from a directory, by canonical name, read on demand."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._locations: dict[str, tuple[Path, str]] = {}
        self._headers: dict[str, tuple[tuple[int, ...], str]] = {}
        """Shape and dtype by canonical name, read once."""
        for file in weight_files(directory):
            with open_weights(file) as handle:
                for name in handle.keys():  # noqa: SIM118 - not a dict
                    if not name.endswith(BUFFERS):
                        stored = handle.get_slice(name)
                        self._locations[canonical_name(name)] = (file, name)
                        self._headers[canonical_name(name)] = tuple(stored.get_shape()), stored.get_dtype()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._locations))

    def __contains__(self, name: str) -> bool:
        return name in self._locations

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor."""
        return read_tensor(*self._locations[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return self._headers[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor without reading it."""
        return _DTYPES[self._headers[name][1]]

    def check(self, config: LlavaConfig) -> None:
        """Raise ModelError unless these are exactly the tensors of a model of this configuration."""
        expected = expected_shapes(config)
        shapes = {name: self.shape(name) for name in self}
        if config.tie_word_embeddings:
            shapes.pop(HEAD, None)
        if wrong := list(misfits(shapes, expected)):
            raise ModelError(f"{self.directory}: not the weights of its config.json: {listed(wrong, 6, '; ')}")


def each_tensor(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor that transformers loads from a directory by its stored name, one in memory at a time."""
    for file in weight_files(directory):
        with open_weights(file) as handle:
            names = list(handle.keys())
        for name in names:
            yield name, read_tensor(file, name)


def check_identical(ours: torch.Tensor, theirs: torch.Tensor, name: str) -> None:
    """Raise ArtifactError unless two tensors have the same dtype, shape and bytes."""
    same = ours.dtype == theirs.dtype and ours.shape == theirs.shape
    # As bytes: NaN then equals itself, and -0 does not equal 0.
    if not same or not torch.equal(_bytes(ours), _bytes(theirs)):
        raise ArtifactError(f"{name} differs between the file and its source; please report it")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, shown: str | None = None) -> None:
    """Write a safetensors file, as PyTorch's.

    Raises OSError, which names the file (as `shown`), if the disk takes no more; safetensors has its own words for it.
    """
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        if (match := _OS_ERROR.search(str(error))) is None:
            raise
        number = int(match[1])
        raise OSError(number, os.strerror(number), shown or path.name) from error


def write_weights(
    directory: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[str]:
    """Write tensors to safetensors files of at most `max_shard_bytes` each, with an index if there are several.

    A larger tensor gets its own file. Holds the tensors of one file in memory. Returns the names of the files.
    """
    shards: list[dict[str, int]] = []
    held: dict[str, torch.Tensor] = {}
    size = 0

    def write() -> None:
        if held:
            save_tensors(held, directory / f"{len(shards)}.part", shown=SINGLE)
            shards.append({name: tensor.nbytes for name, tensor in held.items()})
            held.clear()

    for name, tensor in tensors:
        length = tensor.nbytes
        if size + length > max_shard_bytes:
            write()
            size = 0
        held[name] = tensor.contiguous()
        # Else the loop variable would keep the last tensor of a shard in memory after its write.
        del tensor
        size += length
    write()
    return _name_shards(directory, shards)


def _name_shards(directory: Path, shards: list[dict[str, int]]) -> list[str]:
    """Rename the parts as transformers expects, now that their number is known."""
    if len(shards) == 1:
        (directory / "0.part").rename(directory / SINGLE)
        return [SINGLE]
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    weight_map: dict[str, str] = {}
    for number, (file, names) in enumerate(zip(files, shards, strict=True)):
        (directory / f"{number}.part").rename(directory / file)
        weight_map.update(dict.fromkeys(names, file))
    total = sum(sum(names.values()) for names in shards)
    write_json(
        directory / INDEX,
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )
    return files


def write_json(path: Path, data: Mapping[str, object]) -> None:
    """Write a mapping as JSON."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def meta_model(config: LlavaConfig) -> LlavaForConditionalGeneration:
    """Build the model on the meta device: shapes without memory."""
    with torch.device("meta"):
        return LlavaForConditionalGeneration(config)
