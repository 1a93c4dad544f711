"""The llava-hf layout on disk: its tensor names, and how they are read and written, one at a time.

transformers reads several spellings of one model and writes the one it read; other readers (vLLM, llama.cpp's
converters) know only what llava-hf publishes. What the kit writes has those names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlavaConfig, LlavaForConditionalGeneration

from lora_llava.errors import ModelError
from lora_llava.formats.names import BUFFERS, HEAD, canonical_name

INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
"""As llava-hf publishes; a shard is what a merge holds in memory."""

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def expected_shapes(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor that a model of this configuration has on disk.

    A head that is tied to the embeddings is not stored.
    """
    shapes = {canonical_name(name): tuple(one.shape) for name, one in meta_model(config).state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop(HEAD, None)
    return shapes


class WeightFiles:
    """The tensors of a directory's safetensors files by their canonical names, read when they are asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._places: dict[str, tuple[Path, str]] = {}
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise ModelError(f"{directory}: no .safetensors file. Pickled weights are not read; convert them first.")
        for file in files:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - not a dict
                    if not name.endswith(BUFFERS):
                        self._places[canonical_name(name)] = (file, name)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._places))

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor. The file is opened for it alone, so that no more of it than this stays in memory."""
        file, stored = self._places[name]
        with safe_open(file, framework="pt") as handle:
            tensor: torch.Tensor = handle.get_tensor(stored)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        file, stored = self._places[name]
        with safe_open(file, framework="pt") as handle:
            return tuple(handle.get_slice(stored).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a tensor without reading it."""
        file, stored = self._places[name]
        with safe_open(file, framework="pt") as handle:
            return _DTYPES[handle.get_slice(stored).get_dtype()]

    def check(self, config: LlavaConfig) -> None:
        """Raise ModelError unless these are just the tensors of a model of this configuration."""
        wanted = expected_shapes(config)
        found = {name: self.shape(name) for name in self}
        if config.tie_word_embeddings:
            found.pop(HEAD, None)
        wrong = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
        wrong += [f"{name} does not belong to it" for name in sorted(found.keys() - wanted.keys())]
        wrong += [
            f"{name} is {found[name]}, must be {wanted[name]}"
            for name in sorted(wanted.keys() & found.keys())
            if found[name] != wanted[name]
        ]
        if wrong:
            more = f" (and {len(wrong) - 6} more)" if len(wrong) > 6 else ""
            raise ModelError(f"{self.directory}: not the weights of its config.json: {'; '.join(wrong[:6])}{more}")


def each_tensor(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of a directory's safetensors files under its name there, one in memory at a time."""
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            names = list(handle.keys())
        for name in names:
            with safe_open(file, framework="pt") as handle:
                yield name, handle.get_tensor(name)


def write_weights(
    directory: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[str]:
    """Write tensors to safetensors files of at most `max_shard_bytes` each, with an index if there are several.

    A tensor that is larger has a file of its own. Holds one file's tensors at a time. Returns the names of the files.
    """
    shards: list[dict[str, int]] = []
    held: dict[str, torch.Tensor] = {}
    size = 0

    def write() -> None:
        if held:
            save_file(held, directory / f"{len(shards)}.part", metadata={"format": "pt"})
            shards.append({name: one.numel() * one.element_size() for name, one in held.items()})
            held.clear()

    for name, tensor in tensors:
        length = tensor.numel() * tensor.element_size()
        if size + length > max_shard_bytes:
            write()
            size = 0
        held[name] = tensor.contiguous()
        del tensor
        size += length
    write()
    return _name_shards(directory, shards)


def _name_shards(directory: Path, shards: list[dict[str, int]]) -> list[str]:
    """Give the parts the names that transformers looks for."""
    if len(shards) == 1:
        (directory / "0.part").rename(directory / "model.safetensors")
        return ["model.safetensors"]
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    places: dict[str, str] = {}
    for number, (file, names) in enumerate(zip(files, shards, strict=True)):
        (directory / f"{number}.part").rename(directory / file)
        places.update(dict.fromkeys(names, file))
    total = sum(sum(names.values()) for names in shards)
    write_json(
        directory / INDEX,
        {"metadata": {"total_size": total}, "weight_map": {name: places[name] for name in sorted(places)}},
    )
    return files


def write_json(path: Path, data: Mapping[str, object]) -> None:
    """Write a mapping as JSON."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def meta_model(config: LlavaConfig) -> LlavaForConditionalGeneration:
    """Build the model's shapes without its memory."""
    with torch.device("meta"):
        return LlavaForConditionalGeneration(config)
