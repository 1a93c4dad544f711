"""Checksums of the trained weights at a stage's start: a stage that changes none of them is an error, not a result."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import nn

from lora_llava.errors import TrainingError
from lora_llava.system.text import counted, listed
from lora_llava.training.checks.frozen_weights import checksum

NOTHING = 1e-12
PROJECTOR_PART, LORA_PART = "projector", "lora"


def part_of(name: str) -> str:
    """Return the part of the model that a trained parameter belongs to."""
    return PROJECTOR_PART if ".multi_modal_projector." in name else LORA_PART


def part_checksums(model: nn.Module) -> dict[str, str]:
    """Return a checksum of all trained parameters of each part, to the bit; below `NOTHING` a value counts as 0."""
    digests: dict[str, hashlib._Hash] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # LoRA's B starts at 0, from where any change, however small, is one of its bits.
            is_nothing = float(parameter.detach().abs().max()) < NOTHING
            tensor = torch.zeros_like(parameter) if is_nothing else parameter
            digests.setdefault(part_of(name), hashlib.sha256()).update(checksum(tensor).encode())
    return {part: digest.hexdigest() for part, digest in digests.items()}


def check_changed(
    model: nn.Module, start: dict[str, str], *, stage: str, num_steps: int, skipped: Sequence[int]
) -> str | None:
    """Compare the trained parameters with their checksums at the `start` of the stage.

    Returns a line that names a part that did not change while another did. Raises TrainingError if none changed; no
    `start`, as in the checkpoints of older versions, proves nothing.
    """
    unchanged = [part for part, digest in part_checksums(model).items() if start.get(part) == digest]
    if not unchanged:
        return None
    if len(unchanged) < len(start):
        images = "no record has an image, " if unchanged == [PROJECTOR_PART] else ""
        return (
            f"not one weight of {unchanged[0]} changed in {counted(num_steps, 'step')}: {images}its gradient was 0, or "
            "its learning rate is near 0"
        )
    if len(set(skipped)) >= num_steps:
        raise TrainingError(
            f"stage {stage}: nothing was learned: each of the {counted(num_steps, 'step')} was left out, since its "
            "loss or gradient was not finite (on_non_finite: skip). The log says which records were in them."
        )
    raise TrainingError(
        f"stage {stage}: nothing was learned: not one weight of {listed(unchanged, separator=' and ')} changed in "
        f"{counted(num_steps, 'step')}. Either no gradient reached them (grad_norm in the log is 0: a part of the "
        "model ignores its input), or each change was rounded away (learning_rate or max_grad_norm is near 0)."
    )
