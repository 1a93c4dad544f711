"""Features of the frozen vision tower, computed once for each image instead of in every epoch.

The tower sees images through a deterministic preprocessing and is never trained, so the features stay the same. They
are passed to the model instead of pixels; the vision tower is replaced by a module that passes them through.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import nn

from lora_llava.data.record import ImageSource, Record
from lora_llava.data.rows import ImageTransform
from lora_llava.errors import TrainingError
from lora_llava.modeling.identity import tower_fields
from lora_llava.modeling.packed import llava_in
from lora_llava.modeling.structure import VISION_TOWER
from lora_llava.system.device import free_memory_bytes
from lora_llava.system.files import staged_file
from lora_llava.system.progress import phase
from lora_llava.system.ranks import by_first, local_world_size
from lora_llava.system.text import counted

BATCH = 16
"""Images that pass through the tower at one time."""
_MAX_MEMORY_SHARE = 0.5
"""Share of the free memory that features may take."""
_CHECKSUM_BYTES = 32
"""A file of features ends with their SHA-256."""
_CHUNK = 2**24
_NUMPY = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "uint16"}
"""How features are stored; numpy has no bfloat16, so its bits are kept."""


_Key = tuple[str, tuple[float, float] | None]
"""What the pixels of an image depend on: its identity and its window."""


def _key(image: ImageSource) -> _Key:
    return image.identity, image.window


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """Features (T, hidden size) by image; replaces an `ImageTransform`."""

    values: torch.Tensor
    """(N, T, hidden size)"""
    rows: Mapping[_Key, int]
    """Row of each image."""

    def __call__(self, record: Record) -> torch.Tensor:
        """Return the features of the image of `record`."""
        assert record.image is not None
        return self.values[self.rows[_key(record.image)]]


class FeatureTower(nn.Module):
    """The vision tower of a model that is fed features; pixels, of sample answers, still pass through the real one."""

    def __init__(self, tower: nn.Module, layer: int) -> None:
        super().__init__()
        self.tower = tower
        self.layer = layer

    def forward(self, pixel_values: torch.Tensor, **options: Any) -> Any:
        """Return hidden states as the tower does: pixels (I, 3, H, W) or features (I, T, hidden size) come in."""
        if pixel_values.dim() == 4:
            return self.tower(pixel_values, **options)
        return SimpleNamespace(hidden_states={self.layer: pixel_values})


def use_features(
    model: Any, records: Sequence[Record], transform: ImageTransform, directory: Path | None
) -> ImageFeatures:
    """Compute the features of all images of `records`, or read them from `directory`; make `model` accept them.

    `directory`: where the features are stored for later runs; None: in memory. Raises TrainingError without room.
    """
    llava = llava_in(model)
    tower, layer = llava.get_submodule(VISION_TOWER), int(llava.config.vision_feature_layer)
    images = {_key(record.image): record for record in records if record.image is not None}
    if directory is None:
        values = _computed(tower, layer, list(images.values()), transform, None)
    else:
        stored = by_first(lambda: _store(tower, layer, list(images.values()), transform, directory))
        values = _open(*stored, _dtype(tower), "r")
    llava.set_submodule(VISION_TOWER, FeatureTower(tower, layer))
    return ImageFeatures(values, {key: row for row, key in enumerate(images)})


def _store(
    tower: nn.Module, layer: int, records: list[Record], transform: ImageTransform, directory: Path
) -> tuple[Path, tuple[int, int, int]]:
    """Return the file with the features of just these images, by this tower, and their shape; compute it if needed."""
    name = hashlib.sha256(json.dumps(_facts(tower, layer, records, transform)).encode()).hexdigest()[:32]
    path = directory / f"{name}.features"
    shape, dtype = _shape(tower, layer, records, transform), _dtype(tower)
    if not _is_whole(path, _num_bytes(shape, dtype)):
        directory.mkdir(parents=True, exist_ok=True)
        try:
            with staged_file(path) as temporary:
                _write(tower, layer, records, transform, temporary)
        except OSError as error:
            raise TrainingError(
                f"cache_image_features: the features could not be written to {directory}: {error.strerror}; make room "
                "or set cache_image_features: off"
            ) from error
    return path, shape


def _is_whole(path: Path, size: int) -> bool:
    """Tell whether a file holds `size` bytes of features and their checksum; say so if it is damaged."""
    if not path.exists():
        return False
    if path.is_file() and path.stat().st_size == size + _CHECKSUM_BYTES:
        with path.open("rb") as handle:
            checksum = _checksum(handle, size)
            if handle.read(_CHECKSUM_BYTES) == checksum:
                return True
    phase(f"The cached features in {path.name} are damaged or of an earlier version; computing them again")
    return False


def _checksum(handle: BinaryIO, size: int) -> bytes:
    """Return the SHA-256 of the next `size` bytes of a file."""
    digest = hashlib.sha256()
    while size and (chunk := handle.read(min(size, _CHUNK))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.digest()


def _write(tower: nn.Module, layer: int, records: list[Record], transform: ImageTransform, path: Path) -> None:
    """Compute features into a file that ends with their checksum."""
    _computed(tower, layer, records, transform, path)
    with path.open("r+b") as handle:
        size = path.stat().st_size - _CHECKSUM_BYTES
        checksum = _checksum(handle, size)
        handle.seek(size)
        handle.write(checksum)


def _facts(tower: nn.Module, layer: int, records: list[Record], transform: ImageTransform) -> dict[str, Any]:
    """Collect all that the features depend on."""
    weights = hashlib.sha256()
    for name, tensor in tower.state_dict().items():
        weights.update(f"{name} {tensor.dtype}".encode())
        weights.update(tensor.contiguous().flatten().view(torch.uint8).cpu().numpy().data)
    return {
        "tower": weights.hexdigest(),
        "config": tower_fields(tower.config),
        "layer": layer,
        "transform": asdict(transform),
        "images": [_image_sha256(record.image) for record in records if record.image],
        "windows": [record.image.window for record in records if record.image],
    }


def _image_sha256(image: ImageSource) -> str:
    data = image.embedded() if image.path is None else image.path.read_bytes()
    return hashlib.sha256(data).hexdigest()


def _dtype(tower: nn.Module) -> torch.dtype:
    return next(tower.parameters()).dtype


@torch.no_grad()
def _features(tower: nn.Module, layer: int, records: Sequence[Record], transform: ImageTransform) -> torch.Tensor:
    first = next(tower.parameters())
    pixels = torch.stack([transform(record) for record in records]).to(first.device, first.dtype)
    features: torch.Tensor = tower(pixels, output_hidden_states=True).hidden_states[layer]
    return features.cpu()


def _shape(tower: nn.Module, layer: int, records: list[Record], transform: ImageTransform) -> tuple[int, int, int]:
    _, tokens, width = _features(tower, layer, records[:1], transform).shape
    return len(records), tokens, width


def _computed(
    tower: nn.Module, layer: int, records: list[Record], transform: ImageTransform, path: Path | None
) -> torch.Tensor:
    """Compute features into memory, or into a file at `path`."""
    shape, dtype = _shape(tower, layer, records, transform), _dtype(tower)
    _check_room(shape, dtype, path)
    values = torch.empty(shape, dtype=dtype) if path is None else _open(path, shape, dtype, "r+")
    for start in range(0, len(records), BATCH):
        part = records[start : start + BATCH]
        values[start : start + len(part)] = _features(tower, layer, part, transform)
    return values


def _num_bytes(shape: tuple[int, int, int], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _check_room(shape: tuple[int, int, int], dtype: torch.dtype, path: Path | None) -> None:
    needed = _num_bytes(shape, dtype)
    if path is None:
        # Each process of the machine has its own copy.
        needed *= local_world_size()
        free, where = int(_MAX_MEMORY_SHARE * free_memory_bytes("cpu")), "half of the free memory is"
    else:
        free, where = shutil.disk_usage(path.parent).free, f"in {path.parent} are"
    if needed > free:
        raise TrainingError(
            f"cache_image_features: the features of {counted(shape[0], 'image')} take {needed / 2**30:.1f} GiB, "
            f"{where} {free / 2**30:.1f} GiB; set cache_image_features: {'disk or ' if path is None else ''}off"
        )


def _open(path: Path, shape: tuple[int, int, int], dtype: torch.dtype, mode: Any) -> torch.Tensor:
    if mode == "r":
        # Copy on write: torch does not know of arrays that cannot be written.
        mode = "c"
    else:
        # Without its blocks, a file on a full disk would end the process at a write to memory (SIGBUS).
        with path.open("wb") as handle:
            os.posix_fallocate(handle.fileno(), 0, _num_bytes(shape, dtype) + _CHECKSUM_BYTES)
    array = np.memmap(path, dtype=_NUMPY[dtype], mode=mode, shape=shape)
    return torch.from_numpy(array).view(dtype)
