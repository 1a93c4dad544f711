"""Checksum trained weights at the start of a stage: a stage that changes none of them has failed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from lora_llava.errors import TrainingError
from lora_llava.system.text import counted, listed
from lora_llava.training.checks.check import Check
from lora_llava.training.checks.frozen_weights import checksum

_NEGLIGIBLE = 1e-12
PROJECTOR_PART, LORA_PART = "projector", "lora"


class TrainedWeights(Check):
    """Compares the trained weights with their checksums at the start of the stage."""

    key: ClassVar[str] = "start"

    def __init__(self, stage: str, skipped: Sequence[int], overflowed: Sequence[int] = ()) -> None:
        """`skipped`, `overflowed`: the steps that were left out; the guard adds to both."""
        self.stage = stage
        self.skipped = skipped
        self.overflowed = overflowed
        self.start: dict[str, str] = {}
        """Checksum of each part at the start of the stage."""

    def before_training(self, model: nn.Module) -> None:
        """Checksum the trained weights of `model`."""
        self.start = _part_checksums(model)

    def after_training(self, model: nn.Module, num_steps: int) -> str | None:
        """Return a line if one part did not change while another did; raise TrainingError if none changed.

        A checkpoint of an older version has no checksums, and passes.
        """
        unchanged = [part for part, digest in _part_checksums(model).items() if self.start.get(part) == digest]
        if not unchanged:
            return None
        steps = counted(num_steps, "step")
        if len(unchanged) < len(self.start):
            images = "no record has an image, " if unchanged == [PROJECTOR_PART] else ""
            return (
                f"not one weight of {unchanged[0]} changed in {steps}: {images}its gradient was 0, or its learning "
                "rate is near 0"
            )
        head = f"stage {self.stage}: nothing was learned: "
        if 0 < num_steps <= len(set(self.overflowed)):
            raise TrainingError(
                f"{head}the gradients of each of the {steps} overflowed in fp16 while the loss scale was found. Train "
                "for more steps, or set precision: fp32."
            )
        if len(set(self.skipped)) >= num_steps:
            raise TrainingError(
                f"{head}each of the {steps} was left out, since its loss or gradient was not finite (on_non_finite: "
                "skip). The log says which records were in them."
            )
        raise TrainingError(
            f"{head}not one weight of {listed(unchanged, separator=' and ')} changed in {steps}. Either no gradient "
            "reached them (grad_norm in the log is 0: a part of the model ignores its input), or each change was "
            "rounded away (learning_rate or max_grad_norm is near 0)."
        )

    def state(self) -> dict[str, str]:
        """Return the checksums."""
        return self.start

    def restore(self, state: dict[str, str] | None) -> None:
        """Take the checksums of a checkpoint; those of `before_training` are not of the stage's start then."""
        if state is not None:
            self.start = state


def part_of(name: str) -> str:
    """Return the part that a trained parameter belongs to, LoRA or projector."""
    return PROJECTOR_PART if ".multi_modal_projector." in name else LORA_PART


def _part_checksums(model: nn.Module) -> dict[str, str]:
    """Return a checksum of the trained parameters of each part; tensors below `_NEGLIGIBLE` everywhere count as 0."""
    digests: dict[str, hashlib._Hash] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # LoRA's B starts at 0, so any change, however small, would change its bits.
            is_negligible = float(parameter.detach().abs().max()) < _NEGLIGIBLE
            tensor = torch.zeros_like(parameter) if is_negligible else parameter
            digests.setdefault(part_of(name), hashlib.sha256()).update(checksum(tensor).encode())
    return {part: digest.hexdigest() for part, digest in digests.items()}
