"""Check the run's directory: free, or as --overwrite and --resume need it; and that its disk has room for the run."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping

from lora_llava.errors import ModelError
from lora_llava.formats.shapes import LlavaShape
from lora_llava.modeling.structure import FP32, stage_parameters
from lora_llava.planning.preflight.findings import Finding, Problem
from lora_llava.planning.preflight.setup import LANGUAGE_MODEL, LLAVA, Setup
from lora_llava.run_directory.problems import problems_of_output_dir, unusable

_WEIGHT, _ADAM, _ADAM_8BIT = 4, 8, 2
"""Bytes per trainable weight in fp32, and of its two AdamW moments in fp32 and in 8 bits."""
_DTYPES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_GIB = 2**30


def output_dir_can_be_used(setup: Setup) -> Iterator[Finding]:
    """The run can use `output_dir`, and none of its inputs would be overwritten there."""
    recipe, start = setup.recipe, setup.start
    problems = problems_of_output_dir(
        recipe.resolved_output_dir, recipe.plain(), overwrite=start == "overwrite", resume=start == "resume"
    )
    yield from (Problem(problem.where, problem.what, problem.fix) for problem in problems)


def room_is_there(setup: Setup) -> Iterator[Finding]:
    """The disk of output_dir has room for what the run will write, apart from cached features (`room_for_features`)."""
    shape = setup.shape
    if shape is None or setup.start == "resume" or not setup.here:
        return
    parts = {"the assembled base": 0 if LLAVA in setup.models else _base_bytes(setup, shape)}
    for stage in setup.recipe.stage_names:
        settings = setup.recipe.stage(stage)
        try:
            trained = sum(part.trainable for part in stage_parameters(shape, stage, setup.recipe.adapter, FP32))
        except ModelError:
            # Another check reports a layer that does not exist.
            return
        state = _WEIGHT + (_ADAM_8BIT if settings.optim.endswith("8bit") else _ADAM)
        # Plus one: the newest is written before the oldest is removed.
        parts[f"checkpoints of {stage}"] = trained * state * (settings.save_total_limit + 1)
        parts[f"the artifact of {stage}"] = trained * _WEIGHT
    yield from _missing_room(setup, parts, "or lower save_total_limit or adapter.r")


def room_for_features(setup: Setup, images: Mapping[str, int]) -> Iterator[Finding]:
    """The disk has room for cached features; `images` counts the images by the recipe key of their data."""
    shape = setup.shape
    if shape is None or not setup.here:
        return
    size = (shape.num_image_tokens + 1) * int(shape.vision["hidden_size"]) * _WEIGHT
    parts = {}
    for stage in setup.recipe.stage_names:
        key = f"stages.{stage}.data"
        if setup.recipe.stage(stage).cache_image_features == "disk":
            # Further sources and validation files have keys below that of the first source.
            count = sum(number for name, number in images.items() if f"{name}.".startswith(f"{key}."))
            parts[f"features of {stage}"] = size * count
    yield from _missing_room(setup, parts, "or set cache_image_features: off")


def _base_bytes(setup: Setup, shape: LlavaShape) -> int:
    config = setup.models[LANGUAGE_MODEL].config
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return sum(math.prod(size) for _, size in shape.tensors()) * _DTYPES.get(dtype, _WEIGHT)


def _missing_room(setup: Setup, parts: Mapping[str, int], other: str) -> Iterator[Finding]:
    directory = setup.recipe.resolved_output_dir
    if unusable(directory):
        # What is free there, such as nothing below /proc, says nothing of the directory that it will be.
        return
    nearest = next(path for path in (directory, *directory.parents) if path.exists())
    free, needed = shutil.disk_usage(nearest).free, sum(parts.values())
    if needed > free:
        named = ", ".join(f"{name} {size / _GIB:.1f}" for name, size in parts.items() if size)
        what = f"the run needs about {needed / _GIB:.1f} GiB ({named}), and {free / _GIB:.1f} GiB are free on the disk"
        yield Problem(
            "output_dir", f"{directory}: {what}", f"Free some space, set output_dir to another disk, {other}."
        )
