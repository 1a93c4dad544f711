"""The work of one of several processes: whole runs with and without sharding."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_llava.data.record import Record
from lora_llava.data.rows import ImageTransform
from lora_llava.modeling.packed import llava_in
from lora_llava.modeling.structure import LANGUAGE_MODEL
from lora_llava.system.ranks import connected
from lora_llava.training.trainer import PackedTrainer
from tests.helpers.resuming import Stopped, at_step, stop, train

SHARDED = "distributed.shard=true"
SETTINGS = ("quantization.type=nf4", "quantization.keep_dequantized=false", "stages.align.num_train_epochs=1")
SPOILED = "5.png"
"""Its pixels are NaN in the run whose guard skips steps."""


def spoil(patch: pytest.MonkeyPatch) -> None:
    """Have one image read as NaN."""
    original = ImageTransform.__call__

    def read(self: ImageTransform, record: Record) -> torch.Tensor:
        pixels = original(self, record)
        return pixels * float("nan") if record.image is not None and record.image.key.endswith(SPOILED) else pixels

    patch.setattr(ImageTransform, "__call__", read)


def held_elements(trainer: PackedTrainer) -> list[int]:
    """Count the elements of each frozen linear layer that this process holds."""
    layers = llava_in(trainer.model).get_submodule(LANGUAGE_MODEL).layers
    named = [one for name, one in layers.named_parameters() if "_proj" in name and not one.requires_grad]
    return [(one.to_local() if hasattr(one, "to_local") else one).numel() for one in named]


def main(project: Path) -> None:
    """Train, print what this process held, and leave the runs for the tests to compare."""
    torch.set_num_threads(1)
    # As in all tests: no flush of the disk, which other work may keep busy.
    os.fsync = os.fstat  # type: ignore[assignment]
    recipe, held = project / "tiny.yaml", dict[str, Any]()
    with connected():
        for name, more in {"whole": (), "parts": (SHARDED,)}.items():
            with pytest.MonkeyPatch.context() as patch:
                at_step(patch, "instruct", 1, lambda trainer, name=name: held.update({name: held_elements(trainer)}))
                train(recipe, project / name, *SETTINGS, *more)
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, "instruct", 5, stop)
            try:
                train(recipe, project / "stopped", *SETTINGS, SHARDED)
            except Stopped:
                train(recipe, project / "stopped", *SETTINGS, resume="exact")
        with pytest.MonkeyPatch.context() as patch:
            spoil(patch)
            skip = ("stages.align=null", "stages.instruct.on_non_finite=skip", "stages.instruct.data.validation=null")
            train(recipe, project / "skipped", *SETTINGS, *skip, SHARDED)
    print(json.dumps(held))  # noqa: T201 - the tests read it
