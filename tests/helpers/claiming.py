"""Runs without a model: all that a run writes to its directory, in its order, and what a directory holds."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lora_llava.artifact import MANIFEST
from lora_llava.data.bad_records import BadRecord
from lora_llava.formats.names import WEIGHTS
from lora_llava.recipe.settings import Recipe
from lora_llava.run_directory import output
from lora_llava.run_directory.claim import claimed, place
from lora_llava.run_directory.lock import LOCK, locked
from lora_llava.run_directory.written import STATE, current
from lora_llava.system.files import staged
from lora_llava.training.checkpoints.files import Progress, prune, write_checkpoint

Moment = Callable[[str], None]


def a_recipe(root: Path, **settings: Any) -> Recipe:
    """Return a recipe that writes to `root`."""
    stage = {"data": {"path": "./train.json"}, "tokens_per_micro_batch": 4096}
    values = {"name": "tiny", "base": {"model_name_or_path": "./base"}, "stages": {"instruct": stage}}
    return Recipe.model_validate({**values, "output_dir": root, **settings})


def run(recipe: Recipe, seed: str, at: Moment = lambda _: None, *, overwrite: bool = False, steps: int = 3) -> None:
    """Write what a run with an assembled base, `steps` checkpoints and an evaluation writes; `seed` makes it differ."""
    root = recipe.resolved_output_dir
    with locked(root):
        with claimed(root, recipe.plain(), overwrite=overwrite):
            _start(recipe, seed)
            at("started")
            for step in range(1, steps + 1):
                at(f"step {step}")
                output.append_to_log(root, {"stage": "instruct", "step": step, "loss": seed})
                save(root, step, seed)
                at(f"saved {step}")
            with staged(root / "instruct", partial(place, root)) as staging:
                fill(staging, seed)
            with output.writing(root, output.LOSS_PLOT) as picture:
                picture.write_bytes(seed.encode())
            output.write_summary(root, {"seed": seed, "done": True})
        with staged(root / output.EVALUATION, partial(place, root)) as staging:
            (staging / "accuracy.json").write_text(seed, encoding="utf-8")


def _start(recipe: Recipe, seed: str) -> None:
    root = recipe.resolved_output_dir
    output.write_recipe(root, recipe)
    with staged(current(root) / output.BASE) as staging:
        (staging / "config.json").write_text(seed, encoding="utf-8")
    output.write_summary(root, {"seed": seed})
    output.note_skipped(root, "instruct", [BadRecord("a.json", 3, seed, "record", "p")])


def save(root: Path, step: int, seed: str) -> None:
    """Write a checkpoint and remove old ones."""
    parent = root / output.CHECKPOINTS / "instruct"
    progress = Progress("instruct", step, None, 0.25, 1.5, step - 1, 100, 1.0, 2.0, 0.5, 1)

    def placed(staging: Path, target: Path, hashes: Mapping[str, str]) -> None:
        place(root, staging, target, hashes, first=True)

    write_checkpoint(parent, progress, {}, {}, lambda staging, _: fill(staging, seed), placed)
    prune(parent, step, 2)


def fill(directory: Path, seed: str) -> None:
    """Write the files of an artifact, as far as anyone looks at them here."""
    (directory / WEIGHTS).write_text(seed * 100, encoding="utf-8")
    digest = hashlib.sha256((seed * 100).encode()).hexdigest()
    (directory / MANIFEST).write_text(json.dumps({"adapter_sha256": digest}), encoding="utf-8")


def contents(root: Path, *, kits: bool = False) -> dict[str, str]:
    """List all that a directory holds: files with their bytes, links with their targets, directories.

    Without the kit's own directory, unless `kits`.
    """
    if not root.exists():
        return {}
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if not kits and name.split("/")[0] in (STATE, LOCK):
            continue
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        else:
            found[name] = "" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


class Stopped(BaseException):
    """Ends a run at once, as no handler expects."""


def stop_at(moment: str) -> Moment:
    """Make what ends a run at a moment."""

    def stop(name: str) -> None:
        if name == moment:
            raise Stopped

    return stop


def forked(work: Callable[[], None]) -> int:
    """Do `work` in another process; return its exit code, negative if a signal ended it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die(name: str, path: str) -> None:
    """Be killed here."""
    os.kill(os.getpid(), signal.SIGKILL)
