"""PEFT's LoRA adapters: how they scale and merge, and the adapter file of an artifact."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from lora_llava.errors import ArtifactError, ModelError
from lora_llava.formats.adapter_config import read_adapter_config
from lora_llava.formats.llava_hf import open_weights, read_tensor
from lora_llava.formats.names import (
    ADAPTER_CONFIG,
    PEFT_PREFIX,
    PROJECTOR_PREFIX,
    WEIGHTS,
    canonical_name,
    memory_name,
    split_lora,
)
from lora_llava.system.text import listed

_EMBEDDINGS = ("embed_tokens.weight", "position_embedding.weight")
_WHOLE = "Take the whole adapter from its source again, all files together."


def check_parts(parts: Collection[str], config: LoraConfig, weight: str, where: Path) -> None:
    """Raise ArtifactError unless `parts` are all the tensors that LoRA of this form has for one weight."""
    expected = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if config.use_dora else set())
    if set(parts) != expected:
        raise ArtifactError(
            f"{where}: {weight} has {', '.join(sorted(parts))}, must have {', '.join(sorted(expected))}"
        )


def lora_fits(a: tuple[int, ...], b: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Tell whether A (rank, inputs) and B (outputs, rank) change a weight (outputs, inputs)."""
    return len(a) == len(b) == len(weight) == 2 and (b[0], a[1]) == weight and a[0] == b[1]


def lora_scaling(config: LoraConfig, alpha: float, rank: int) -> float:
    """Return the factor of `B A`: alpha / r for LoRA, alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023)."""
    return float(alpha / rank**0.5 if config.use_rslora else alpha / rank)


def merge_lora(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, magnitude: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the merged weight (outputs, inputs) in fp32: `W + scaling * B A`, for DoRA with the trained row norms.

    `a` (rank, inputs), `b` (outputs, rank), `magnitude` any shape of `outputs` elements. LoRA: Hu et al. 2021, eq. 3;
    DoRA: Liu et al. 2024, eq. 5.
    """
    merged = torch.addmm(weight.float(), b.float(), a.float(), alpha=scaling)
    if magnitude is not None:
        merged *= (magnitude.flatten() / torch.linalg.norm(merged, dim=1))[:, None]
    return merged


@dataclass(frozen=True, slots=True)
class _LoraKeys:
    """Names of one layer's LoRA tensors in the adapter's file, and its scale."""

    a: str
    b: str
    magnitude: str | None
    rank: int
    """Of the settings."""
    scaling: float


def _module(name: str) -> str:
    """Return the layer of a tensor of LoRA's, as the settings name it."""
    return name.removeprefix(PEFT_PREFIX).removesuffix(".weight").removesuffix(".lora_A")


class Adapter:
    """The adapter of an artifact, by the canonical names of the weights it changes; tensors are read on demand.

    Raises ArtifactError for missing or unknown tensors, and for forms other than LoRA, rsLoRA and DoRA.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / WEIGHTS
        self.config = read_adapter_config(directory)
        with open_weights(self.path) as handle:
            self._names = list(handle.keys())
        self.layers: dict[str, _LoraKeys] = {}
        self.replaced: dict[str, str] = {}
        self._sort()

    def _sort(self) -> None:
        """Divide the file's tensors into LoRA by layer, and weights that replace the base's."""
        parts: dict[str, dict[str, str]] = {}
        for name in self._names:
            unprefixed = name.removeprefix(PEFT_PREFIX)
            lora = split_lora(unprefixed)
            try:
                if lora:
                    weight, part = lora
                    parts.setdefault(canonical_name(weight), {})[part] = name
                else:
                    self.replaced[canonical_name(unprefixed)] = name
            except ModelError as error:
                raise ArtifactError(f"{self.path}: {error}") from error
        for weight, keys in parts.items():
            check_parts(keys, self.config, weight, self.path)
            self.layers[weight] = _LoraKeys(
                keys["lora_A"],
                keys["lora_B"],
                keys.get("lora_magnitude_vector"),
                self._rank(keys["lora_A"]),
                self._scaling(keys["lora_A"]),
            )

    def _scaling(self, name: str) -> float:
        alphas = self.config.alpha_pattern
        alpha = alphas.get(get_pattern_key(alphas.keys(), _module(name)), self.config.lora_alpha)
        return lora_scaling(self.config, float(alpha), self._rank(name))

    def _rank(self, name: str) -> int:
        ranks = self.config.rank_pattern
        return int(ranks.get(get_pattern_key(ranks.keys(), _module(name)), self.config.r))

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor by its name in the file, in fp32; ArtifactError if it holds NaN or infinity."""
        tensor = self.stored(name)
        if not torch.isfinite(tensor).all():
            raise ArtifactError(f"{self.path}: {name} holds NaN or infinity; this adapter cannot be used")
        return tensor.float()

    def stored(self, name: str) -> torch.Tensor:
        """Read one tensor by its name in the file, in the dtype of the file."""
        return read_tensor(self.path, name)

    def __iter__(self) -> Iterator[str]:
        """Yield the canonical names of the weights that the adapter changes."""
        yield from self.layers
        yield from self.replaced

    def check(self, shapes: dict[str, tuple[int, ...]], *, finite: bool = False) -> None:
        """Raise ArtifactError unless the adapter is whole and fits a base with these shapes.

        It is whole with the projector and with LoRA for exactly the layers that its settings name. `finite`: read every
        tensor, and refuse NaN and infinity.
        """
        projector = {name for name in shapes if name.startswith(PROJECTOR_PREFIX)}
        if missing := projector - self.replaced.keys() - self.layers.keys():
            raise ArtifactError(
                f"{self.path}: the projector is missing: {', '.join(sorted(missing))}. The rest of the adapter does "
                "not work without it; use the whole artifact, or convert the adapter with: lora-llava import"
            )
        if unknown := [name for name in self if name not in shapes]:
            raise ArtifactError(f"{self.path}: the base has no {', '.join(sorted(unknown)[:6])}")
        with open_weights(self.path) as handle:
            for name, keys in self.layers.items():
                a, b = (tuple(handle.get_slice(key).get_shape()) for key in (keys.a, keys.b))
                if a[:1] != (keys.rank,):
                    raise ArtifactError(
                        f"{self.path}: LoRA of {name} has the rank {a[0] if a else 'none'}, the adapter's settings "
                        f"have {keys.rank}; take the adapter from its source again"
                    )
                if not lora_fits(a, b, shapes[name]):
                    raise ArtifactError(f"{self.path}: LoRA {b} x {a} does not fit {name}, {shapes[name]}")
            for name, key in self.replaced.items():
                shape = tuple(handle.get_slice(key).get_shape())
                if shape != shapes[name]:
                    raise ArtifactError(f"{self.path}: {name} is {shape} in it, {shapes[name]} in the base")
        self._check_targets(shapes)
        if finite:
            for name in self._names:
                self.read(name)

    def _check_targets(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise ArtifactError unless LoRA is on the layers that the settings name: PEFT leaves out any other."""
        linear = [name for name, shape in shapes.items() if len(shape) == 2 and not name.endswith(_EMBEDDINGS)]
        named = {
            name
            for name in linear
            if name not in self.replaced
            and check_target_module_exists(self.config, memory_name(name).removesuffix(".weight"))
        }
        if missing := sorted(named - self.layers.keys()):
            raise ArtifactError(f"{self.path}: LoRA for {listed(missing, 3)} is missing. {_WHOLE}")
        if unnamed := sorted(self.layers.keys() - named):
            what = f"it has LoRA for {listed(unnamed, 3)}, which {ADAPTER_CONFIG} does not name"
            raise ArtifactError(f"{self.path}: {what}. {_WHOLE}")

    def merge(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return the merged weight in fp32: the base's with LoRA added, or the one that replaces it."""
        if name in self.replaced:
            return self.read(self.replaced[name])
        keys = self.layers[name]
        magnitude = self.read(keys.magnitude) if keys.magnitude else None
        return merge_lora(weight, self.read(keys.a), self.read(keys.b), keys.scaling, magnitude)
