"""Find the files of a model, a directory or a snapshot in the Hub's cache, without the libraries that load it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_llava.errors import ModelError
from lora_llava.recipe.fields import PACKAGED, is_local, packaged
from lora_llava.system.files import read_json
from lora_llava.system.names import did_you_mean, nearest, path_hint


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model by its directory and config.json; no other file is read."""

    name: str
    """As written in the recipe or on the command line."""
    directory: Path | None
    """None if it is not available."""
    config: dict[str, Any] = field(default_factory=dict)
    """Content of config.json; empty if it cannot be read."""
    problem: tuple[str, str] | None = None
    """Why there is no directory or config: what is wrong, and what to do."""
    from_hub: bool = False
    """Whether it is in the Hub's cache, which may lack the weights."""
    gguf_file: str | None = None
    """The GGUF file in the directory, which has everything, the config included."""


def find_model(name: str, revision: str | None, near: Sequence[Path], gguf_file: str | None = None) -> ModelFiles:
    """Find a model's files; a name that is not a directory is treated as a hub id."""
    directory = _directory(name)
    if gguf_file is not None and directory is not None:
        problem = None
        if not (directory / gguf_file).is_file():
            hint = did_you_mean(nearest(gguf_file, [directory]), "Correct base.gguf_file.")
            problem = f"{directory / gguf_file} does not exist", hint
        return ModelFiles(name, directory, problem=problem, gguf_file=gguf_file)
    if directory is None and name.startswith(PACKAGED):
        return ModelFiles(name, None, problem=(f"the package holds no {name}", f"It holds {PACKAGED}vision_tower."))
    if directory is None and is_local(name):
        return ModelFiles(name, None, problem=_no_directory(name))
    if directory is None:
        from lora_llava.planning.preflight.model.hub import find_on_hub

        directory, problem = find_on_hub(name, revision, gguf_file or "config.json")
        if directory is None:
            what, fix = problem
            hint = did_you_mean(nearest(Path(name).name, near))
            return ModelFiles(name, None, problem=(what, f"{hint} {fix}".lstrip()))
        if gguf_file is not None:
            return ModelFiles(name, directory, gguf_file=gguf_file)
        return replace(read_config(name, directory), from_hub=True)
    return read_config(name, directory)


def read_config(name: str, directory: Path) -> ModelFiles:
    """Read config.json in a model's directory."""
    path = directory / "config.json"
    if not path.exists():
        fix = "Give the directory that holds config.json and the weights."
        return ModelFiles(name, directory, problem=(f"{directory} holds no config.json, so it is not a model", fix))
    try:
        return ModelFiles(name, directory, read_json(path))
    except ModelError as error:
        return ModelFiles(name, directory, problem=(str(error).rpartition(";")[0], "Download the model again."))


def _directory(name: str) -> Path | None:
    directory = packaged(name) if name.startswith(PACKAGED) else Path(name).expanduser()
    return directory if directory.is_dir() else None


def _no_directory(name: str) -> tuple[str, str]:
    path = Path(name).expanduser()
    if path.exists():
        return f"{name} is a file", "Give the directory of the model."
    return f"{name} does not exist", path_hint(path)
