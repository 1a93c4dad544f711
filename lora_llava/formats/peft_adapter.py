"""The adapter of an artifact by the canonical names of the weights it changes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open

from lora_llava.errors import ArtifactError, ModelError
from lora_llava.formats.names import PROJECTOR_PREFIX, canonical_name

WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
_LORA = re.compile(r"^(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(\.weight)?$")

_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to initialise LoRA that take it out of the base's weights first, so that it fits no base but the changed one."""

_OTHER_FORMS = (
    "use_qalora", "use_bdlora", "alora_invocation_tokens", "layer_replication", "target_parameters",
    "trainable_token_indices", "lora_bias", "arrow_config", "fan_in_fan_out", "megatron_config", "kasa_config",
    "velora_config", "monteclora_config",
)  # fmt: skip
"""Settings of PEFT's that make of LoRA something other than `W + scale * B A`, DoRA apart."""


def check_form(config: LoraConfig, where: Path) -> None:
    """Refuse an adapter that is not LoRA, rsLoRA or DoRA on the base as it is."""
    if getattr(config.peft_type, "value", config.peft_type) != "LORA":
        raise ArtifactError(f"{where}: a {config.peft_type} adapter; only LoRA, rsLoRA and DoRA are read")
    found = [name for name in _OTHER_FORMS if getattr(config, name, None)]
    initialised = str(config.init_lora_weights).lower()
    if initialised.startswith(_CHANGES_THE_BASE):
        raise ArtifactError(
            f"{where}: init_lora_weights is {initialised!r}, which changes the base that the adapter is made for. "
            "Convert it to plain LoRA first: PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)."
        )
    if config.bias != "none":
        found.append(f"bias={config.bias!r}")
    if found:
        raise ArtifactError(f"{where}: adapters with {', '.join(found)} cannot be read; only LoRA, rsLoRA and DoRA")


@dataclass(frozen=True, slots=True)
class LoraKeys:
    """Where the parts of one layer's LoRA are in the file, and its scale."""

    a: str
    b: str
    magnitude: str | None
    scaling: float


class Adapter:
    """The tensors of an adapter file, read when they are asked for.

    Raises ArtifactError for keys that are missing or belong to nothing, and for forms other than LoRA's.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / WEIGHTS
        self.config: LoraConfig = LoraConfig.from_pretrained(str(directory))
        check_form(self.config, directory)
        with safe_open(self.path, framework="pt") as handle:
            names = list(handle.keys())
        self.layers: dict[str, LoraKeys] = {}
        self.replaced: dict[str, str] = {}
        self._sort(names)

    def _sort(self, names: list[str]) -> None:
        """Divide the file's tensors into LoRA by layer, and weights that replace the base's."""
        parts: dict[str, dict[str, str]] = {}
        for name in names:
            plain = name.removeprefix(PEFT_PREFIX)
            match = _LORA.match(plain)
            try:
                if match:
                    weight = canonical_name(match["module"] + ".weight")
                    parts.setdefault(weight, {})[match["part"]] = name
                else:
                    self.replaced[canonical_name(plain)] = name
            except ModelError as error:
                raise ArtifactError(f"{self.path}: {error}") from error
        dora = bool(self.config.use_dora)
        wanted = {"lora_A", "lora_B", "lora_magnitude_vector"} if dora else {"lora_A", "lora_B"}
        for weight, found in parts.items():
            if found.keys() != wanted:
                raise ArtifactError(
                    f"{self.path}: {weight} has {', '.join(sorted(found))}, must have {', '.join(sorted(wanted))}"
                )
            self.layers[weight] = LoraKeys(
                found["lora_A"], found["lora_B"], found.get("lora_magnitude_vector"), self._scaling(found["lora_A"])
            )

    def _scaling(self, name: str) -> float:
        module = name.removeprefix(PEFT_PREFIX).removesuffix(".weight").removesuffix(".lora_A")
        alphas, ranks = self.config.alpha_pattern, self.config.rank_pattern
        alpha = alphas.get(get_pattern_key(alphas.keys(), module), self.config.lora_alpha)
        rank = ranks.get(get_pattern_key(ranks.keys(), module), self.config.r)
        return float(alpha / rank**0.5 if self.config.use_rslora else alpha / rank)

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor by its name in the file, in fp32; ArtifactError if it holds NaN or infinity."""
        tensor = self.stored(name)
        if not torch.isfinite(tensor).all():
            raise ArtifactError(f"{self.path}: {name} holds NaN or infinity; this adapter cannot be used")
        return tensor.float()

    def stored(self, name: str) -> torch.Tensor:
        """Read one tensor by its name in the file, just as it is there."""
        with safe_open(self.path, framework="pt") as handle:
            tensor: torch.Tensor = handle.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        """Yield the canonical names of the weights it changes."""
        yield from self.layers
        yield from self.replaced

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise ArtifactError unless the whole projector is in it and everything has a place in the base."""
        projector = {name for name in shapes if name.startswith(PROJECTOR_PREFIX)}
        if missing := projector - self.replaced.keys() - self.layers.keys():
            raise ArtifactError(
                f"{self.path}: the projector is missing: {', '.join(sorted(missing))}. What was trained with it "
                "does not work without it; take the whole artifact, or bring the adapter in with: lora-llava import"
            )
        if strange := [name for name in self if name not in shapes]:
            raise ArtifactError(f"{self.path}: the base has no {', '.join(sorted(strange)[:6])}")
        with safe_open(self.path, framework="pt") as handle:
            for name, keys in self.layers.items():
                a, b = (tuple(handle.get_slice(key).get_shape()) for key in (keys.a, keys.b))
                if len(shapes[name]) != 2 or (b[0], a[1]) != shapes[name] or a[0] != b[1]:
                    raise ArtifactError(f"{self.path}: LoRA {b} x {a} does not fit {name}, {shapes[name]}")
            for name, key in self.replaced.items():
                shape = tuple(handle.get_slice(key).get_shape())
                if shape != shapes[name]:
                    raise ArtifactError(f"{self.path}: {name} is {shape} in it, {shapes[name]} in the base")

    def fold(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return what becomes of a base weight, in fp32: `W + s B A`; for DoRA scaled to the learnt row norms.

        LoRA: Hu et al. 2021, eq. 3; rsLoRA: Kalajdzievski 2023 (s = alpha / sqrt r); DoRA: Liu et al. 2024, eq. 5.
        """
        if name in self.replaced:
            return self.read(self.replaced[name])
        keys = self.layers[name]
        folded = torch.addmm(weight.float(), self.read(keys.b), self.read(keys.a), alpha=keys.scaling)
        if keys.magnitude is not None:
            folded *= (self.read(keys.magnitude).flatten() / torch.linalg.norm(folded, dim=1))[:, None]
        return folded
