"""Choose the files to publish: a fixed list, without the paths of this machine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_llava.artifact import RECIPE, portable
from lora_llava.errors import ArtifactError
from lora_llava.formats.manifest import MANIFEST
from lora_llava.formats.names import ADAPTER_CONFIG, MERGE_REPORT, WEIGHTS
from lora_llava.formats.weight_files import INDEX, SINGLE, weight_files
from lora_llava.recipe.fields import is_local
from lora_llava.recipe.file import dump_portable
from lora_llava.shipping.hub.facts import DATA_PICTURES, PICTURES, Facts
from lora_llava.system.files import read_json

CARD = "README.md"
_TOKENIZER = "tokenizer.json"
_READERS = (
    "chat_template.jinja", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "special_tokens_map.json", "added_tokens.json", _TOKENIZER, "tokenizer.model", "tokenizer_config.json",
)  # fmt: skip
_LEGAL = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "USE_POLICY.md")
_ARTIFACT = (ADAPTER_CONFIG, WEIGHTS, MANIFEST, RECIPE)
_MODEL = ("config.json", MERGE_REPORT)
_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_PATH_KEYS = ("_name_or_path", "name_or_path")
"""Keys in which transformers records where a model was loaded from."""

_SECRET = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_HOMES = r"(?<![\w-])/(?:home|Users)/[\w.-]+"
"""Matches in relative paths too: `../../home/somebody`."""


@dataclass(frozen=True, slots=True)
class RepoFile:
    """A file of the repository: its name there, and a local file or the bytes to upload."""

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    @property
    def changed(self) -> bool:
        """Whether the published file differs from the local one."""
        return isinstance(self.content, bytes) and self.name != CARD

    @property
    def shows_data(self) -> bool:
        """Whether images or texts of the data can be seen in it."""
        return self.name in DATA_PICTURES


@dataclass(frozen=True, slots=True)
class Content:
    """All files to publish except the card, and the names of those left out."""

    files: list[RepoFile]
    left_out: list[str]


def collect(facts: Facts) -> Content:
    """List the files of an artifact or a model to publish. Raises ArtifactError if a required one is missing."""
    directory = facts.directory
    listed = [*(_ARTIFACT if facts.is_adapter else _MODEL), *_READERS, *_LEGAL]
    if not facts.is_adapter:
        listed += _shards(directory)
    present = [name for name in listed if (directory / name).is_file()]
    files = [RepoFile(name, _published(_refuse_outside_link(directory / name), facts)) for name in present]
    if (directory / CARD).is_file():
        _refuse_outside_link(directory / CARD)
    names = {file.name for file in files}
    required = {_TOKENIZER, "tokenizer_config.json", ADAPTER_CONFIG if facts.is_adapter else "config.json"}
    if missing := required - names:
        raise ArtifactError(
            f"{directory}: {', '.join(sorted(missing))} is missing; the model cannot be used without it"
        )
    files += [RepoFile(name, _refuse_outside_link(path)) for name, path in facts.pictures.items()]
    others = [path for path in directory.iterdir() if path.name not in names | {CARD}]
    left_out = [f"{path.name}/" if path.is_dir() else path.name for path in others]
    return Content(sorted(files, key=lambda file: file.name), sorted(left_out))


def _refuse_outside_link(path: Path) -> Path:
    """Return a file to publish; ArtifactError if it is a link to a file that lies outside of its directory."""
    real, directory = path.resolve(), path.parent.resolve()
    # A snapshot in the Hub's cache consists of links to the blobs of its repository.
    blobs = directory.parents[1] / "blobs" if directory.parent.name == "snapshots" else directory
    if not real.is_relative_to(directory) and not real.is_relative_to(blobs):
        raise ArtifactError(
            f"{path} is a link to {real}, outside of its directory; nothing was uploaded. Put a copy of the file there "
            "to publish it, or remove the link"
        )
    return path


def is_ours(name: str) -> bool:
    """Tell whether a push writes files of this name; others in the repository were added by hand."""
    return name in (*_ARTIFACT, *_MODEL, INDEX, *_READERS, *PICTURES) or _SHARD.fullmatch(name) is not None


def _shards(directory: Path) -> list[str]:
    """Return the names of the weight files that transformers loads, with their index if there is one."""
    names = [path.name for path in weight_files(directory)]
    if odd := [name for name in names if not _SHARD.fullmatch(name)]:
        raise ArtifactError(f"{directory / INDEX} names {', '.join(odd)}, which is not a name of a shard")
    return names if names == [SINGLE] else [INDEX, *names]


def _published(path: Path, facts: Facts) -> Path | bytes:
    """Return the file to publish, or the bytes to publish instead if it contains paths of this machine."""
    if path.name == RECIPE:
        text = dump_portable(path)
        return path if text == path.read_text(encoding="utf-8") else text.encode()
    if path.suffix != ".json" or path.name in (_TOKENIZER, INDEX):
        return path
    data = read_json(path, ArtifactError, "take it from its source again")
    clean = _without_paths(data, facts)
    if path.name == MANIFEST and facts.manifest:
        clean = portable(facts.manifest)
    return path if clean == data else (json.dumps(clean, indent=2, ensure_ascii=False) + "\n").encode()


def _without_paths(data: dict[str, Any], facts: Facts) -> dict[str, Any]:
    """Drop the paths that models were loaded from, and name an adapter's local base without its path."""
    clean = {
        key: _without_paths(value, facts) if isinstance(value, dict) else value
        for key, value in data.items()
        if not (key in _PATH_KEYS and is_local(str(value)))
    }
    if "base_model_name_or_path" in clean and facts.manifest and facts.base_id is None:
        clean["base_model_name_or_path"] = facts.manifest.base["name"]
    return clean


def check_private(files: Iterable[RepoFile], token: str | None) -> None:
    """Raise ArtifactError if a text among `files` contains an access token or a path of a home directory.

    The last line of defense: the kit writes neither, but the files may have been edited.
    """
    home = str(Path.home())
    paths = re.compile(rf"{_HOMES}|(?<![\w-]){re.escape(home)}(?![\w.-])" if len(home) > 1 else _HOMES)
    for file in files:
        if file.name in (_TOKENIZER, "tokenizer.model") or file.name.endswith((".safetensors", ".png")):
            continue
        data = file.content if isinstance(file.content, bytes) else file.content.read_bytes()
        text = data.decode("utf-8", errors="replace")
        for number, line in enumerate(text.splitlines(), 1):
            what = None
            if _SECRET.search(line) or (token and token in line):
                what = "an access token"
            elif paths.search(line):
                what = "a path of this machine"
            if what:
                raise ArtifactError(f"{file.name}, line {number}, contains {what}; nothing was uploaded. Remove it.")
